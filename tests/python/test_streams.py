"""Several streams: pools by stream, record_stream, and events. Streams run late here, so a block that is handed out
too early shows as wrong contents."""

from __future__ import annotations

import ctypes

import torch
from contents import MIB, block, check, filled, pattern, same
from on_device import on_device


def on_side(side: torch.cuda.Stream, source: torch.Tensor, target: torch.Tensor) -> None:
    """Queues a copy on `side` behind what the current stream has queued."""
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        target.copy_(source, non_blocking=True)


@on_device()
def test_a_recorded_block_waits_for_the_stream() -> None:
    """Freed while another stream reads it, a block is not handed out before that stream is done."""
    side = torch.cuda.Stream()
    for count in (600, 300_000, 5 * MIB):
        source, kept = filled(1, count), block(count)
        on_side(side, source, kept)
        source.record_stream(side)
        address = source.data_ptr()
        del source
        intruders = [filled(seed, count) for seed in range(2, 6)]
        assert address != intruders[0].data_ptr(), "handed out while a stream reads it"
        side.synchronize()
        check(kept, 1, "the copy on the side stream")
        for seed, intruder in enumerate(intruders, 2):
            check(intruder, seed, "a tensor allocated meanwhile")
        again = block(count)
        reused = [one.data_ptr() for one in (*intruders, again)]  # by an earlier one if its event was seen completed
        assert address in reused, "the block was not used again after the stream was done"
        del intruders, intruder, again, kept


@on_device()
def test_without_record_stream_the_simulator_shows_the_corruption() -> None:
    """The same program without record_stream is wrong, and is seen to be: these tests can fail."""
    side = torch.cuda.Stream()
    count = 5 * MIB
    source, kept = filled(1, count), block(count)
    on_side(side, source, kept)
    address = source.data_ptr()
    del source
    intruder = block(count)
    same(intruder.data_ptr(), address, "an unrecorded block is reused at once")
    staged = pattern(2, count).pin_memory()
    intruder.copy_(staged, non_blocking=True)
    torch.cuda.current_stream().synchronize()
    side.synchronize()
    assert not torch.equal(kept.cpu(), pattern(1, count)), "the early reuse did no harm: the streams do not run late"


@on_device()
def test_active_bytes_fall_when_the_stream_is_done() -> None:
    """A block that waits is neither allocated nor free: `active_pending_free`."""
    side = torch.cuda.Stream()
    source, kept = filled(1, 4 * MIB), block(4 * MIB)
    on_side(side, source, kept)
    source.record_stream(side)
    del source
    stats = torch.cuda.memory_stats()
    same(stats["allocated_bytes.all.current"], 4 * MIB)
    same(stats["active_bytes.all.current"], 8 * MIB)
    found = [one["state"] for segment in torch.cuda.memory_snapshot() for one in segment["blocks"]]
    same(found.count("active_pending_free"), 1, f"the blocks' states {found}")
    side.synchronize()
    del kept
    block(1)  # looks at the events
    same(torch.cuda.memory_stats()["active_bytes.all.current"], torch.cuda.memory_allocated())


@on_device()
def test_a_block_recorded_on_several_streams_waits_for_all() -> None:
    """The last of three streams decides."""
    sides = [torch.cuda.Stream() for _ in range(3)]
    count = 3 * MIB
    source = filled(1, count)
    copies = [block(count) for _ in sides]
    for side, kept in zip(sides, copies):
        on_side(side, source, kept)
        source.record_stream(side)
    address = source.data_ptr()
    del source
    sides[0].synchronize()
    sides[1].synchronize()
    held = filled(9, count)
    assert held.data_ptr() != address, "handed out before the last stream was done"
    sides[2].synchronize()
    for kept in copies:
        check(kept, 1)
    same(block(count).data_ptr(), address, "after the last stream")


@on_device()
def test_each_stream_has_its_own_blocks() -> None:
    """A block freed on one stream does not serve another, even if nothing uses it any more."""
    side = torch.cuda.Stream()
    tensor = block(5 * MIB)
    address = tensor.data_ptr()
    del tensor
    with torch.cuda.stream(side):
        other = block(5 * MIB)
        assert other.data_ptr() != address, "a block of another stream's pool"
        other_address = other.data_ptr()
        del other
        same(block(5 * MIB).data_ptr(), other_address, "on the side stream again")
    same(block(5 * MIB).data_ptr(), address, "on the first stream again")
    streams = {segment["stream"] for segment in torch.cuda.memory_snapshot()}
    same(streams, {0, side.cuda_stream}, "streams in the snapshot")


@on_device()
def test_recording_a_blocks_own_stream_changes_nothing() -> None:
    """It needs no event: the block is reused at once."""
    tensor = block(5 * MIB)
    tensor.record_stream(torch.cuda.current_stream())
    address = tensor.data_ptr()
    del tensor
    same(block(5 * MIB).data_ptr(), address)


@on_device()
def test_emptying_the_cache_waits_for_recorded_streams() -> None:
    """empty_cache synchronises what is pending, frees it, and leaves the contents of the copy right."""
    side = torch.cuda.Stream()
    source, kept = filled(1, 5 * MIB), block(5 * MIB)
    on_side(side, source, kept)
    source.record_stream(side)
    del source
    torch.cuda.empty_cache()
    check(kept, 1)
    del kept
    torch.cuda.empty_cache()
    same(torch.cuda.memory_reserved(), 0)


@on_device()
def test_many_streams_with_contents() -> None:
    """A ring of copies over eight streams, every source freed at once: each copy holds what it should."""
    sides = [torch.cuda.Stream() for _ in range(8)]
    copies: list[tuple[int, torch.Tensor]] = []
    for seed in range(200):
        side = sides[seed % len(sides)]
        count = 1000 + 7919 * (seed % 40)
        source = filled(seed, count)
        kept = block(count)
        on_side(side, source, kept)
        source.record_stream(side)
        del source
        kept.record_stream(side)
        copies.append((seed, kept))
        if len(copies) > 60:
            old_seed, old = copies.pop(0)
            sides[old_seed % len(sides)].synchronize()
            check(old, old_seed, f"copy {old_seed}")
    torch.cuda.synchronize()
    for seed, kept in copies:
        check(kept, seed, f"copy {seed}")


@on_device(schedule=11)
def test_with_a_random_schedule() -> None:
    """The same, the streams running in a seeded random order."""
    test_many_streams_with_contents.body()


@on_device()
def test_memory_pressure_waits_for_recorded_blocks() -> None:
    """When the limit is met, blocks that wait for a stream are given back before the program is refused."""
    side = torch.cuda.Stream()
    torch.cuda.set_per_process_memory_fraction(0.125)  # 256 MiB
    source = filled(1, 100 * MIB)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        kept = block(50 * MIB)
        kept.copy_(source[: 50 * MIB], non_blocking=True)
    source.record_stream(side)
    del source
    other = block(180 * MIB)
    same(kept.cpu()[:1000].tolist(), pattern(1, 100 * MIB)[:1000].tolist())
    del other, kept


@on_device(uvm_only=True)
def test_a_destroyed_stream_costs_one_block() -> None:
    """A block recorded on an external stream that is gone when the block is freed is lost. All else goes on."""
    handle = ctypes.c_void_p()
    same(int(torch.cuda.cudart().cudaStreamCreate(ctypes.addressof(handle))), 0)
    lost = filled(1, 30 * MIB)
    lost.record_stream(torch.cuda.ExternalStream(handle.value))
    same(int(torch.cuda.cudart().cudaStreamDestroy(handle.value)), 0)
    address = lost.data_ptr()
    del lost
    side = torch.cuda.Stream()
    for _ in range(3):
        tensor = filled(2, 40 * MIB)
        assert tensor.data_ptr() != address
        tensor.record_stream(side)
        check(tensor, 2)
        del tensor
        torch.cuda.synchronize()
    torch.cuda.empty_cache()
    same(torch.cuda.memory_reserved(), 30 * MIB, "only that block stays")
