"""CUDA graphs: private pools, memory freed inside a capture, sharing of pools, checkpoints."""

from __future__ import annotations

import gc

import torch
from contents import MIB, block, check, filled, pattern, same
from on_device import on_device


def private_segments() -> list[dict]:
    """The segments that belong to graphs or pools."""
    return [segment for segment in torch.cuda.memory_snapshot() if tuple(segment["segment_pool_id"]) != (0, 0)]


def segments_of(pool: tuple[int, int]) -> list[dict]:
    """The segments of one pool."""
    return [one for one in torch.cuda.memory_snapshot() if tuple(one["segment_pool_id"]) == tuple(pool)]


def load(tensor: torch.Tensor, seed: int) -> None:
    """Fills a tensor in place."""
    tensor.copy_(pattern(seed, tensor.numel()))


@on_device()
def test_replay_on_new_inputs() -> None:
    """A graph of copies with a temporary inside gives each input's bytes."""
    given = filled(0, 3 * MIB)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        between = torch.empty_like(given)
        between.copy_(given)
        result = torch.empty_like(given)
        result.copy_(between)
        del between
    for seed in range(1, 5):
        load(given, seed)
        graph.replay()
        check(result, seed, f"replay {seed}")


@on_device()
def test_memory_of_a_graph_stays_its_own() -> None:
    """Ordinary tensors never get a graph's block while the graph lives, though it is free between replays."""
    given = filled(0, 3 * MIB)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        between = torch.empty_like(given)
        between.copy_(given)
        result = torch.empty_like(given)
        result.copy_(between)
        hidden = (between.data_ptr(), between.data_ptr() + between.numel())
        del between
    others = [filled(seed, 3 * MIB) for seed in range(10, 30)]
    for other in others:
        assert not hidden[0] <= other.data_ptr() < hidden[1], "a block of the graph's pool was handed out"
    load(given, 1)
    graph.replay()
    check(result, 1)
    for seed, other in enumerate(others, 10):
        check(other, seed, "an ordinary tensor after the replay")


@on_device()
def test_freed_inside_a_capture_is_reused_inside_it() -> None:
    """Within one capture a freed block serves the next request."""
    graph = torch.cuda.CUDAGraph()
    given = filled(3, 4 * MIB)
    with torch.cuda.graph(graph):
        first = torch.empty_like(given)
        first.copy_(given)
        address = first.data_ptr()
        del first
        second = torch.empty_like(given)
        second.copy_(given)
        same(second.data_ptr(), address, "the second tensor of the capture")
    graph.replay()
    check(second, 3)


@on_device()
def test_two_graphs_share_a_pool() -> None:
    """The second graph reuses what the first has freed; what the first returned stays whole."""
    given = filled(0, 4 * MIB)
    first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(first):
        scratch = torch.empty_like(given)
        scratch.copy_(given)
        one = torch.empty_like(given)
        one.copy_(scratch)
        address = scratch.data_ptr()
        del scratch
    reserved = torch.cuda.memory_reserved()
    with torch.cuda.graph(second, pool=first.pool()):
        scratch = torch.empty_like(given)
        same(scratch.data_ptr(), address, "the block that the first graph freed")
        scratch.copy_(one)
        del scratch
        two = torch.empty_like(given)
        two.copy_(one)
    same(torch.cuda.memory_reserved(), reserved, "reserved bytes with the second graph")
    same(first.pool(), second.pool())
    for seed in (5, 6):
        load(given, seed)
        first.replay()
        second.replay()
        check(one, seed, "the first graph's result")
        check(two, seed, "the second graph's result")


@on_device()
def test_graphs_without_a_common_pool_do_not_share() -> None:
    """Each has memory of its own."""
    given = filled(0, 4 * MIB)
    results = []
    graphs = [torch.cuda.CUDAGraph() for _ in range(3)]
    for graph in graphs:
        with torch.cuda.graph(graph):
            result = torch.empty_like(given)
            result.copy_(given)
            results.append(result)
    same(len({graph.pool() for graph in graphs}), 3, "pools")
    for seed, graph in enumerate(graphs):
        load(given, seed)
        graph.replay()
    for seed, result in enumerate(results):
        check(result, seed, f"the result of graph {seed}")


@on_device()
def test_a_graph_gives_its_memory_back() -> None:
    """When graph and results are gone, empty_cache returns the pool; while a result lives, its segment stays."""
    given = filled(0, 4 * MIB)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = torch.empty_like(given)
        result.copy_(given)
    graph.replay()
    torch.cuda.synchronize()
    assert private_segments(), "the graph has no private segment"
    graph.reset()
    del graph
    gc.collect()
    torch.cuda.empty_cache()
    check(result, 0, "the result after the graph has gone")
    assert private_segments(), "the result's segment was released"
    del result
    torch.cuda.empty_cache()
    same(private_segments(), [], "private segments at the end")
    del given
    torch.cuda.empty_cache()
    same(torch.cuda.memory_reserved(), 0)


@on_device()
def test_events_wait_for_the_end_of_the_capture() -> None:
    """record_stream and free inside a capture: no event query may break the capture."""
    given = filled(0, 4 * MIB)
    side = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scratch = torch.empty_like(given)
        scratch.copy_(given)
        result = torch.empty_like(given)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            result.copy_(scratch)
        scratch.record_stream(side)
        address = scratch.data_ptr()
        del scratch
        held = [torch.empty_like(given) for _ in range(3)]
        assert address not in [one.data_ptr() for one in held], (
            "handed out while the side stream of the capture reads it"
        )
        torch.cuda.current_stream().wait_stream(side)
    for seed in (1, 2):
        load(given, seed)
        graph.replay()
        check(result, seed)
    torch.cuda.synchronize()
    del held
    block(MIB)
    active = [
        one for segment in private_segments() for one in segment["blocks"] if one["state"] == "active_pending_free"
    ]
    same(active, [], "blocks still waiting after the capture")


@on_device()
def test_a_block_recorded_before_is_freed_during_a_capture() -> None:
    """An ordinary block in use on a side stream, freed while another stream captures."""
    side = torch.cuda.Stream()
    source, kept = filled(1, 4 * MIB), block(4 * MIB)
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    given = filled(0, 2 * MIB)
    capturing = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        kept.copy_(source, non_blocking=True)
    source.record_stream(side)
    with torch.cuda.stream(capturing):
        graph.capture_begin(capture_error_mode="thread_local")
        result = torch.empty_like(given)
        result.copy_(given)
        del source
        graph.capture_end()
    others = [filled(seed, 4 * MIB) for seed in range(10, 14)]
    side.synchronize()
    check(kept, 1)
    for seed, other in enumerate(others, 10):
        check(other, seed)
    graph.replay()
    check(result, 0)


@on_device()
def test_new_memory_during_a_capture() -> None:
    """A capture may need new segments: reserving and populating them must not invalidate it."""
    given = filled(0, 2 * MIB)
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    results = []
    with torch.cuda.graph(graph):
        for _ in range(40):
            result = torch.empty_like(given)
            result.copy_(given)
            results.append(result)
        results.append(torch.empty(300 * MIB, dtype=torch.uint8, device="cuda"))
    load(given, 9)
    graph.replay()
    for result in results[:-1]:
        check(result, 9)


@on_device()
def test_another_thread_allocates_during_a_capture() -> None:
    """What another thread allocates meanwhile is ordinary memory, and the capture stays valid."""
    import threading

    given = filled(0, 2 * MIB)
    graph = torch.cuda.CUDAGraph()
    outside: list[torch.Tensor] = []

    def allocate() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            outside.extend(block(2 * MIB) for _ in range(10))

    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = torch.empty_like(given)
        result.copy_(given)
        thread = threading.Thread(target=allocate)
        thread.start()
        thread.join()
    pool = segments_of(graph.pool())
    for tensor in outside:
        for segment in pool:
            inside = segment["address"] <= tensor.data_ptr() < segment["address"] + segment["total_size"]
            assert not inside, "another thread's tensor went to the graph's pool"
    load(given, 4)
    graph.replay()
    check(result, 4)


@on_device()
def test_out_of_memory_during_a_capture() -> None:
    """The program gets OutOfMemoryError; a later capture works."""
    given = filled(0, 2 * MIB)
    torch.cuda.set_per_process_memory_fraction(0.25)
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.empty(1024 * MIB, dtype=torch.uint8, device="cuda")
    except torch.cuda.OutOfMemoryError:
        pass
    else:
        raise AssertionError("1 GiB under a limit of 512 MiB")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = torch.empty_like(given)
        result.copy_(given)
    load(given, 8)
    graph.replay()
    check(result, 8)


@on_device()
def test_checkpoint_and_restore() -> None:
    """CUDA graph trees: a pool's state is taken, blocks come and go, and the state is put back."""
    given = filled(0, 3 * MIB)
    side = torch.cuda.Stream()
    first = torch.cuda.CUDAGraph()
    with torch.cuda.graph(first, stream=side):
        outputs = [torch.empty_like(given) for _ in range(3)]
        for output in outputs:
            output.copy_(given)
        del outputs[1], output
    pool = first.pool()
    same(torch._C._cuda_checkPoolLiveAllocations(0, pool, {one.data_ptr() for one in outputs}), True)
    same(torch._C._cuda_checkPoolLiveAllocations(0, pool, {outputs[0].data_ptr()}), False)

    def shape() -> list[tuple]:
        """What a checkpoint keeps of the pool."""
        return [
            (segment["address"], segment["total_size"], [(one["size"], one["state"]) for one in segment["blocks"]])
            for segment in sorted(segments_of(pool), key=lambda segment: segment["address"])
        ]

    before = shape()
    state = torch._C._cuda_getCheckpointState(0, pool)
    second = torch.cuda.CUDAGraph()
    with torch.cuda.graph(second, pool=pool, stream=side):
        later = torch.empty_like(given)
        later.copy_(given)
    assert shape() != before
    torch._C._cuda_setCheckpointPoolState(0, state, [later.untyped_storage()._cdata], [])
    del later
    after = shape()
    for segment in before:
        assert segment in after, f"{segment} is not in {after}"
    first.replay()
    for output in outputs:
        check(output, 0)


@on_device()
def test_live_blocks_come_back_with_the_checkpoint() -> None:
    """Tensors that died after the checkpoint are live again once it is restored, and can be freed by address."""
    given = filled(0, 3 * MIB)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [torch.empty_like(given), torch.empty_like(given)]
    pool = graph.pool()
    state = torch._C._cuda_getCheckpointState(0, pool)
    addresses = [output.data_ptr() for output in outputs]

    def live() -> int:
        return sum(one["state"] == "active_allocated" for segment in segments_of(pool) for one in segment["blocks"])

    same(live(), 2)
    outputs.clear()
    same(live(), 0)
    torch._C._cuda_setCheckpointPoolState(0, state, [], [])
    same(live(), 2)
    for left, address in zip((1, 0), addresses):
        torch.cuda.caching_allocator_delete(address)
        same(live(), left)


@on_device()
def test_statistics_through_a_graphs_life() -> None:
    """Capturing, replaying and dropping a graph leaves the books balanced."""
    from test_statistics import check_agreement

    given = filled(0, 3 * MIB)
    allocated = torch.cuda.memory_allocated()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [torch.empty_like(given) for _ in range(4)]
    check_agreement("after the capture")
    graph.replay()
    del results[1:3]
    check_agreement("with some results freed")
    del graph
    check_agreement("without the graph")
    results.clear()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    check_agreement("at the end")
    assert torch.cuda.memory_allocated() <= allocated + 1024, "the graph left memory behind"
