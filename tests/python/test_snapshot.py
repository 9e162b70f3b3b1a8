"""`torch.cuda.memory._snapshot()`, memory history, and PyTorch's own tools that read them."""

from __future__ import annotations

import os
import pickle
import tempfile
import threading

import torch
from contents import MIB, block, filled, same
from on_device import on_device
from versions import LATER, needs


def blocks(state: str) -> list[dict]:
    """The snapshot's blocks in this state."""
    found = torch.cuda.memory._snapshot()["segments"]
    return [one for segment in found for one in segment["blocks"] if one["state"] == state]


def actions(snapshot: dict, device: int = 0) -> list[str]:
    """What happened on a device, in order."""
    return [entry["action"] for entry in snapshot["device_traces"][device]]


@on_device()
def test_segments_and_blocks() -> None:
    """Every field that readers of snapshots use."""
    tensors = [block(1000), block(3 * MIB)]
    snapshot = torch.cuda.memory._snapshot()
    same(len(snapshot["segments"]), 2)
    for segment in snapshot["segments"]:
        same(segment["device"], 0)
        same(segment["stream"], 0)
        same(tuple(segment["segment_pool_id"]), (0, 0))
        assert segment["segment_type"] in ("small", "large")
        same(segment["is_expandable"] in (True, False), True)
        same(segment["total_size"], sum(one["size"] for one in segment["blocks"]))
        address = segment["address"]
        for one in segment["blocks"]:
            same(one["address"], address, "blocks follow one another")
            address += one["size"]
    allocated = blocks("active_allocated")
    same(sorted(one["requested_size"] for one in allocated), [1000, 3 * MIB])
    same(sorted(one["size"] for one in allocated), [1024, 3 * MIB])
    same({one["address"] for one in allocated}, {tensor.data_ptr() for tensor in tensors})


@on_device()
def test_the_older_snapshot() -> None:
    """`torch.cuda.memory_snapshot()` is the list of segments."""
    tensor = block(3 * MIB)
    found = torch.cuda.memory_snapshot()
    same(len(found), 1)
    same(found[0]["allocated_size"], tensor.numel())
    same(found[0]["active_size"], tensor.numel())
    same(found[0]["requested_size"], tensor.numel())


@on_device()
def test_the_settings_are_in_the_snapshot() -> None:
    """`allocator_settings` is there for the readers."""
    settings = torch.cuda.memory._snapshot()["allocator_settings"]
    assert "PYTORCH_CUDA_ALLOC_CONF" in settings and "max_split_size" in settings, settings


@on_device()
def test_history_names_every_action() -> None:
    """Allocation, frees, segments and the snapshot itself appear in order, with sizes and addresses."""
    torch.cuda.memory._record_memory_history()
    tensor = block(30 * MIB)
    address = tensor.data_ptr()
    del tensor
    torch.cuda.empty_cache()
    snapshot = torch.cuda.memory._snapshot()
    # A segment that grows is mapped and unmapped piece by piece.
    names = {"segment_map": "segment_alloc", "segment_unmap": "segment_free"}
    found = [names.get(action, action) for action in actions(snapshot) if action != "snapshot"]
    steps = [action for action, before in zip(found, [None, *found]) if action != before]
    same(steps, ["segment_alloc", "alloc", "free_requested", "free_completed", "segment_free"])
    for entry in snapshot["device_traces"][0]:
        if entry["action"] in ("alloc", "free_requested", "free_completed"):
            same((entry["addr"], entry["size"]), (address, 30 * MIB), entry["action"])
            same(entry["stream"], 0)
    # The traces tell how much is reserved at each time: in the end nothing.
    reserved = 0
    for entry in snapshot["device_traces"][0]:
        sign = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}.get(entry["action"], 0)
        reserved += sign * entry["size"]
    same(reserved, 0, "reserved bytes by the trace")
    torch.cuda.memory._record_memory_history(enabled=None)


@on_device()
def test_history_has_python_stacks() -> None:
    """The frames of an allocation name this function."""
    torch.cuda.memory._record_memory_history(context="all", stacks="python")

    def allocate_here() -> torch.Tensor:
        return block(3 * MIB)

    tensor = allocate_here()
    frames = blocks("active_allocated")[0]["frames"]
    assert "allocate_here" in [frame["name"] for frame in frames], frames
    entry = next(one for one in torch.cuda.memory._snapshot()["device_traces"][0] if one["action"] == "alloc")
    assert "allocate_here" in [frame["name"] for frame in entry["frames"]], entry["frames"]
    del tensor
    freed = [one for one in torch.cuda.memory._snapshot()["device_traces"][0] if one["action"] == "free_requested"]
    assert freed and freed[-1]["frames"], "a free has no stack under context='all'"
    torch.cuda.memory._record_memory_history(enabled=None)


@on_device()
def test_history_has_a_limit() -> None:
    """Only the newest `max_entries` are kept."""
    torch.cuda.memory._record_memory_history(max_entries=10, stacks="python")
    for _ in range(50):
        block(3 * MIB)
    last = block(4 * MIB)
    found = torch.cuda.memory._snapshot()["device_traces"][0]
    same(len(found), 10)
    sizes = [entry["size"] for entry in found if entry["action"] == "alloc"]
    assert 4 * MIB in sizes, "the newest entry is missing"
    del last
    torch.cuda.memory._record_memory_history(enabled=None)


@on_device()
def test_state_only_history() -> None:
    """`enabled='state'` keeps the stacks of live blocks, and of the trace no more than the newest entry."""
    torch.cuda.memory._record_memory_history(enabled="state", stacks="python")
    tensor = block(3 * MIB)
    snapshot = torch.cuda.memory._snapshot()
    assert len(actions(snapshot)) <= 1, actions(snapshot)
    assert blocks("active_allocated")[0]["frames"], "no stack"
    torch.cuda.memory._record_memory_history(enabled=None)
    del tensor


@on_device()
def test_history_stops_when_told() -> None:
    """Nothing is recorded afterwards."""
    torch.cuda.memory._record_memory_history()
    block(3 * MIB)
    torch.cuda.memory._record_memory_history(enabled=None)
    before = len(torch.cuda.memory._snapshot()["device_traces"][0])
    block(5 * MIB)
    assert len(torch.cuda.memory._snapshot()["device_traces"][0]) <= before


@on_device()
def test_out_of_memory_is_in_the_trace() -> None:
    """With the size that was refused and what the device had free."""
    torch.cuda.set_per_process_memory_fraction(0.25)
    torch.cuda.memory._record_memory_history(stacks="python")
    try:
        block(1024 * MIB)
    except torch.cuda.OutOfMemoryError:
        pass
    entries = [one for one in torch.cuda.memory._snapshot()["device_traces"][0] if one["action"] == "oom"]
    same(len(entries), 1)
    same(entries[0]["size"], 1024 * MIB)
    assert entries[0]["device_free"] >= 0
    torch.cuda.memory._record_memory_history(enabled=None)


@on_device()
def test_the_visualiser_opens_it() -> None:
    """torch.cuda._memory_viz: every command it has for allocator snapshots."""
    from torch.cuda import _memory_viz

    torch.cuda.memory._record_memory_history(stacks="python")
    kept = filled(1, 3 * MIB)
    before = torch.cuda.memory._snapshot()
    tensors = [block(size) for size in (1000, 5 * MIB, 30 * MIB)]
    del tensors[1]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = torch.empty_like(kept)
        result.copy_(kept)
    after = torch.cuda.memory._snapshot()
    for plot in (_memory_viz.trace_plot, _memory_viz.segment_plot):
        page = plot(after)
        assert "<html>" in page and len(page) > 1000, page[:200]
    assert "segment" in _memory_viz.segsum(after)
    assert "TOTAL MEM" in _memory_viz.trace(after)

    def as_text(lines: str) -> str:
        """Instead of a flame graph, whose script would come from the network."""
        return lines

    total = sum(int(line.rsplit(" ", 1)[1]) for line in _memory_viz.segments(after, as_text).splitlines())
    same(total, torch.cuda.memory_reserved(), "all segments in the flame graph")
    assert "active_allocated" in _memory_viz.memory(after, as_text)
    assert _memory_viz.compare(before["segments"], after["segments"], as_text)
    torch.cuda.memory._record_memory_history(enabled=None)


@on_device()
def test_it_can_be_dumped_and_read_back() -> None:
    """`_dump_snapshot` writes what the viewer in the browser loads."""
    torch.cuda.memory._record_memory_history(stacks="all")
    tensor = block(3 * MIB)
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "snapshot.pickle")
        torch.cuda.memory._dump_snapshot(path)
        with open(path, "rb") as file:
            read = pickle.load(file)
    same(read["segments"][0]["total_size"], torch.cuda.memory_reserved())
    assert "alloc" in actions(read)
    torch.cuda.memory._record_memory_history(enabled=None)
    del tensor


@on_device()
def test_history_through_a_graph() -> None:
    """Private pools appear with their ids, blocks with their stacks."""
    torch.cuda.memory._record_memory_history(stacks="python")
    graph = torch.cuda.CUDAGraph()
    given = filled(1, 3 * MIB)
    with torch.cuda.graph(graph):
        result = torch.empty_like(given)
        result.copy_(given)
    found = [one for one in torch.cuda.memory._snapshot()["segments"] if tuple(one["segment_pool_id"]) == graph.pool()]
    assert found, "the graph's pool is not in the snapshot"
    live = [one for segment in found for one in segment["blocks"] if one["state"] == "active_allocated"]
    same([one["requested_size"] for one in live], [3 * MIB])
    assert live[0]["frames"]
    torch.cuda.memory._record_memory_history(enabled=None)


@on_device()
def test_observers_are_told_of_out_of_memory() -> None:
    """`_cuda_attach_out_of_memory_observer`: device, bytes asked, bytes held, bytes free."""
    calls: list[tuple[int, int, int, int]] = []
    torch._C._cuda_attach_out_of_memory_observer(lambda *arguments: calls.append(arguments))
    torch.cuda.set_per_process_memory_fraction(0.25)
    kept = block(100 * MIB)
    try:
        block(1024 * MIB)
    except torch.cuda.OutOfMemoryError:
        pass
    same(len(calls), 1)
    device, asked, held, free = calls[0]
    same((device, asked), (0, 1024 * MIB))
    assert held >= 100 * MIB and free >= 0, calls
    del kept


@on_device()
def test_the_profiler_reports_memory() -> None:
    """torch.profiler's memory events come from the allocator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        tensor = block(5 * MIB)
        del tensor
    most = max(event.device_memory_usage for event in profile.key_averages())
    assert most >= 5 * MIB, most


def entries(*wanted: str) -> list[dict]:
    """The trace's entries with one of these actions."""
    return [entry for entry in torch.cuda.memory._snapshot()["device_traces"][0] if entry["action"] in wanted]


@needs("skip_actions")
@on_device()
def test_history_without_some_actions() -> None:
    """`skip_actions`: the named ones are not recorded, the others are; a name that is none is an error."""
    skipped = ["free_requested", "segment_alloc", "segment_map"]
    torch.cuda.memory._record_memory_history(stacks="python", skip_actions=skipped)
    tensor = block(30 * MIB)
    del tensor
    same([entry["action"] for entry in entries("alloc", "free_completed", *skipped)], ["alloc", "free_completed"])
    torch.cuda.memory._record_memory_history(enabled=None)
    torch.cuda.memory._record_memory_history(stacks="python", clear_history=True)
    tensor = block(60 * MIB)
    del tensor
    assert entries("free_requested") and entries("segment_alloc", "segment_map"), "skipped although nobody says so"
    try:
        torch.cuda.memory._record_memory_history(skip_actions=["dance"])
    except (RuntimeError, ValueError) as error:
        assert "dance" in str(error), error
    else:
        raise AssertionError("an action that is none was accepted")
    torch.cuda.memory._record_memory_history(enabled=None)


@needs("_set_memory_metadata")
@on_device()
def test_metadata_of_a_thread() -> None:
    """What a thread sets is on the entries of what it does afterwards, and on no other thread's."""
    memory = torch.cuda.memory
    if LATER["_memory_metadata_supported"]:
        assert memory._memory_metadata_supported()
    memory._record_memory_history(stacks="python")
    same(memory._get_memory_metadata(), "")
    kept = [block(3 * MIB)]
    memory._set_memory_metadata("mine")
    same(memory._get_memory_metadata(), "mine")
    kept.append(block(4 * MIB))
    seen = []

    def elsewhere() -> None:
        seen.append(memory._get_memory_metadata())
        memory._set_memory_metadata("its own")
        kept.append(block(5 * MIB))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    same(seen, [""])
    same(memory._get_memory_metadata(), "mine")
    kept.append(block(6 * MIB))
    memory._set_memory_metadata("")
    kept.append(block(7 * MIB))
    found = [(entry["size"] // MIB, entry["user_metadata"]) for entry in entries("alloc")]
    same(found, [(3, ""), (4, "mine"), (5, "its own"), (6, "mine"), (7, "")])
    memory._record_memory_history(enabled=None)


@needs("_annotate_tensor")
@on_device()
def test_annotations_of_a_tensor() -> None:
    """An entry of its own, with the block's address and size and the note; a view's is its whole tensor's."""
    memory = torch.cuda.memory
    tensor = block(3 * MIB)
    memory._annotate_tensor(tensor, "nobody records this")
    memory._record_memory_history(stacks="python")
    memory._annotate_tensor(tensor, "the first")
    memory._annotate_tensor(tensor[MIB:], "the second")
    found = [(entry["addr"], entry["size"], entry["user_metadata"]) for entry in entries("annotate")]
    same(found, [(tensor.data_ptr(), 3 * MIB, note) for note in ("the first", "the second")])
    memory._record_memory_history(enabled=None)


@needs("_allocation_traceback")
@on_device()
def test_the_stack_of_an_allocation() -> None:
    """`_allocation_traceback`: by a live block's address; none for another address, or where nothing was recorded."""
    memory = torch.cuda.memory
    before = block(3 * MIB)
    memory._record_memory_history(stacks="python")

    def allocate_here() -> torch.Tensor:
        return block(4 * MIB)

    tensor = allocate_here()
    address = tensor.data_ptr()
    frames = memory._allocation_traceback(address)
    assert frames and "allocate_here" in [frame["name"] for frame in frames], frames
    for other in (before.data_ptr(), 0, 0xDEAD000):
        same(memory._allocation_traceback(other), None, f"{other:#x}")
    del tensor
    same(memory._allocation_traceback(address), None, "freed")
    memory._record_memory_history(enabled=None)


@needs("compile_context")
@on_device(timeout=180)
def test_what_compiled_code_allocates() -> None:
    """`compile_context`: entries name the compiled region that they come from, and "N/A" outside of any."""
    torch.cuda.memory._record_memory_history(stacks="python", compile_context=True)
    given = block(3 * MIB)
    compiled = torch.compile(lambda tensor: torch.empty_like(tensor), backend="eager")
    result = compiled(given)
    after = block(5 * MIB)
    found = {entry["addr"]: entry["compile_context"] for entry in entries("alloc")}
    assert "0/0" in found[result.data_ptr()], found
    same((found[given.data_ptr()], found[after.data_ptr()]), ("N/A", "N/A"))
    torch.cuda.memory._record_memory_history(enabled=None)
