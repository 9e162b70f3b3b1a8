"""Which block a request gets: reuse, splitting, merging, and the settings that bear on it."""

from __future__ import annotations

import random

import torch
from contents import MIB, block, check, filled, same
from on_device import on_device


def segment_of(tensor: torch.Tensor) -> dict:
    """The snapshot's segment that holds a tensor."""
    for segment in torch.cuda.memory_snapshot():
        if segment["address"] <= tensor.data_ptr() < segment["address"] + segment["total_size"]:
            return segment
    raise AssertionError("the tensor lies in no segment")


def states(tensor: torch.Tensor) -> list[tuple[str, int]]:
    """The blocks of a tensor's segment."""
    return [(one["state"], one["size"]) for one in segment_of(tensor)["blocks"]]


@on_device()
def test_a_freed_block_is_used_again() -> None:
    """At once, on the same stream, without asking CUDA for more."""
    for count in (700, MIB, 5 * MIB, 50 * MIB):
        tensor = block(count)
        address, reserved = tensor.data_ptr(), torch.cuda.memory_reserved()
        del tensor
        tensor = block(count)
        same(tensor.data_ptr(), address, f"{count} bytes again")
        same(torch.cuda.memory_reserved(), reserved)
        del tensor


@on_device()
def test_blocks_never_overlap() -> None:
    """A thousand random allocations and frees; every live tensor keeps its contents."""
    choice = random.Random(7)
    live: dict[int, torch.Tensor] = {}
    for seed in range(1000):
        if live and choice.random() < 0.48:
            victim = choice.choice(list(live))
            check(live.pop(victim), victim, f"tensor {victim}")
        else:
            live[seed] = filled(seed, choice.choice((100, 512, 4000, 70_000, 600_000, 2 * MIB)))
    for seed, tensor in live.items():
        check(tensor, seed, f"tensor {seed}")
    ranges = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.numel()) for tensor in live.values())
    assert all(end <= start for (_, end), (start, _) in zip(ranges, ranges[1:])), "blocks overlap"


@on_device()
def test_a_large_block_is_split_and_merged() -> None:
    """Pieces of a freed block lie side by side, and become one block again."""
    whole = block(60 * MIB)
    address = whole.data_ptr()
    del whole
    pieces = [block(20 * MIB) for _ in range(3)]
    same(sorted(piece.data_ptr() - address for piece in pieces), [0, 20 * MIB, 40 * MIB], "where the pieces lie")
    pieces.clear()
    again = block(60 * MIB)
    same(again.data_ptr(), address, "the merged block")


@on_device()
def test_neighbours_merge_in_any_order() -> None:
    """Freeing three neighbours in each order leaves one free block."""
    from itertools import permutations

    for order in permutations(range(3)):
        whole = block(60 * MIB)
        address = whole.data_ptr()
        del whole
        pieces: list[torch.Tensor | None] = [block(20 * MIB) for _ in range(3)]
        for index in order:
            pieces[index] = None
        again = block(60 * MIB)
        same(again.data_ptr(), address, f"freed in the order {order}")
        del again


@on_device()
def test_small_and_large_do_not_mix() -> None:
    """Blocks of at most 1 MiB come from small segments."""
    small, large = block(MIB), block(MIB + 1)
    same(segment_of(small)["segment_type"], "small")
    same(segment_of(large)["segment_type"], "large")
    assert segment_of(small)["address"] != segment_of(large)["address"]


@on_device()
def test_the_best_fit_is_taken() -> None:
    """Of two free blocks the smaller that suffices is used."""
    kept = []
    holes = {}
    for count in (40 * MIB, 24 * MIB, 32 * MIB):
        holes[count] = block(count)
        kept.append(block(2 * MIB))
    addresses = {count: tensor.data_ptr() for count, tensor in holes.items()}
    holes.clear()
    tensor = block(24 * MIB)
    same(tensor.data_ptr(), addresses[24 * MIB], "24 MiB beside holes of 24, 32 and 40")
    other = block(31 * MIB)
    same(other.data_ptr(), addresses[32 * MIB], "31 MiB beside holes of 32 and 40")


@on_device("use_uvm:True,max_split_size_mb:32")
def test_max_split_size() -> None:
    """A block above the limit is not split, and a small request does not take it."""
    big = block(64 * MIB)
    address = big.data_ptr()
    del big
    tensor = block(4 * MIB)
    assert not address <= tensor.data_ptr() < address + 64 * MIB, "4 MiB were cut from a block of 64 MiB"
    big = block(60 * MIB)
    same(big.data_ptr(), address, "the unsplit block")
    same(torch.cuda.memory_stats()["oversize_allocations.current"], 1)
    del big
    same(torch.cuda.memory_stats()["oversize_allocations.current"], 0)
    same(torch.cuda.memory_stats()["max_split_size"], 32 * MIB)


@on_device("use_uvm:True,roundup_power2_divisions:4")
def test_roundup_power2_divisions() -> None:
    """5000 bytes become 5120: the next quarter of a power of two."""
    tensor = block(5000)
    same(torch.cuda.memory_stats()["allocated_bytes.all.current"], 5120)
    same(torch.cuda.memory_stats()["requested_bytes.all.current"], 5000)
    del tensor
    tensor = block(21 * MIB)
    same(torch.cuda.memory_stats()["allocated_bytes.all.current"], 24 * MIB)
    del tensor


@on_device("use_uvm:True,garbage_collection_threshold:0.6,max_split_size_mb:40")
def test_garbage_collection_threshold() -> None:
    """Above the threshold, old cached blocks are given back before memory grows."""
    torch.cuda.set_per_process_memory_fraction(0.25)  # 512 MiB, of which 60 % are 307
    old = [block(50 * MIB) for _ in range(7)]
    old.clear()
    tensor = block(60 * MIB)
    assert torch.cuda.memory_reserved() < 400 * MIB, torch.cuda.memory_reserved()
    del tensor


@on_device("use_uvm:True,expandable_segments:True", uvm_only=True)
def test_expandable_segments_is_accepted() -> None:
    """Managed segments grow anyway."""
    tensor = filled(1, 5 * MIB)
    check(tensor, 1)
    same(torch.cuda.get_allocator_backend(), "uvm")


@on_device()
def test_the_cache_serves_another_size_after_it_is_emptied() -> None:
    """Nothing of a released segment is handed out again by mistake."""
    for count in (30 * MIB, 70 * MIB, 10 * MIB):
        tensors = [filled(seed, count) for seed in range(3)]
        for seed, tensor in enumerate(tensors):
            check(tensor, seed)
        del tensors, tensor
        torch.cuda.empty_cache()
        same(torch.cuda.memory_reserved(), 0)


@on_device(uvm_only=True)
def test_segments_grow_in_place() -> None:
    """Tensors one after the other lie in one segment, which is populated as they come."""
    first = block(30 * MIB)
    reserved = torch.cuda.memory_reserved()
    more = [block(30 * MIB) for _ in range(4)]
    same({segment_of(tensor)["address"] for tensor in more}, {segment_of(first)["address"]}, "segments in use")
    assert torch.cuda.memory_reserved() > reserved
    assert torch.cuda.memory_reserved() < 5 * 30 * MIB + 128 * MIB, torch.cuda.memory_reserved()
