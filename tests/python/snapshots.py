"""Small snapshots that tests of `report` are made of."""

from __future__ import annotations

from typing import Any

MIB = 1 << 20
GIB = 1 << 30


def frame(filename: str, line: int, name: str) -> dict[str, Any]:
    """A frame of a stack."""
    return {"filename": filename, "line": line, "name": name}


def plain(**changes: Any) -> dict[str, Any]:
    """A snapshot of PyTorch's: two segments, four blocks, a history that has lost its beginning."""
    stack = [
        frame("??", 0, "torch::unwind::unwind()"),
        frame("/venv/site-packages/torch/nn/modules/linear.py", 109, "__init__"),
        frame("/home/me/model.py", 12, "build"),
        frame("/home/me/train.py", 3, "<module>"),
    ]
    backward = [
        frame("??", 0, "torch::unwind::unwind()"),
        frame("", 0, "torch::autograd::generated::MmBackward0::apply(x)"),
    ]

    def block(address: Any, size: Any, state: Any, frames: Any) -> dict[str, Any]:
        return {
            "address": address,
            "size": size,
            "requested_size": size,
            "state": state,
            "frames": frames,
        }

    common = {"device": 0, "stream": 0, "segment_pool_id": (0, 0), "is_expandable": False, "frames": []}
    segments = [
        {
            **common,
            "address": GIB,
            "total_size": 20 * MIB,
            "segment_type": "large",
            "allocated_size": 12 * MIB,
            "active_size": 13 * MIB,
            "requested_size": 12 * MIB,
            "blocks": [
                block(GIB, 8 * MIB, "active_allocated", stack),
                block(GIB + 8 * MIB, 7 * MIB, "inactive", []),
                block(GIB + 15 * MIB, MIB, "active_awaiting_free", stack),
                block(GIB + 16 * MIB, 4 * MIB, "active_allocated", backward),
            ],
        },
        {
            **common,
            "address": 4 * GIB,
            "total_size": 2 * MIB,
            "segment_type": "small",
            "allocated_size": 0,
            "active_size": 0,
            "requested_size": 0,
            "blocks": [block(4 * GIB, 2 * MIB, "inactive", [])],
        },
    ]

    def event(action: Any, size: Any, time: Any) -> dict[str, Any]:
        return {
            "action": action,
            "addr": GIB,
            "size": size,
            "stream": 0,
            "time_us": time,
            "frames": [],
        }

    trace = [event("segment_alloc", 20 * MIB, 10), event("alloc", 8 * MIB, 20), event("alloc", 6 * MIB, 30)]
    trace += [event("free_requested", 6 * MIB, 40), event("free_completed", 6 * MIB, 41), event("alloc", 4 * MIB, 50)]
    return {
        "segments": segments,
        "device_traces": [trace],
        "allocator_settings": {},
        "external_annotations": [],
        **changes,
    }


def with_places() -> dict[str, Any]:
    """The same, with one range of which a part is a hole, on the GPU and in the host."""
    segment = {
        "base": GIB,
        "range_bytes": 64 * MIB,
        "filled": 20 * MIB,
        "vacant": 3 * MIB,
        "place": "host",
        "memory": "managed",
        "populated_device": 0,
        "populated_host": 20 * MIB,
        "populated_unplaced": 0,
        "small": False,
        "growing": True,
        "pool": (0, 0),
    }

    def sample(time: Any, device: Any, host: Any, allocated: Any) -> dict[str, Any]:
        return {
            "time_us": time,
            "device": device,
            "host": host,
            "unplaced": 0,
            "allocated": allocated,
        }

    return plain(
        torch_uvm={
            "version": 1,
            "torch": "2.11.0",
            "config": {"use_uvm": True},
            "devices": [
                {
                    "device": 0,
                    "name": "NVIDIA GH200 480GB",
                    "memory_info": {
                        "capacity": 10 * GIB,
                        "device_limit": 15 * GIB // 8,
                        "allocated": 12 * MIB,
                        "reserved": 22 * MIB,
                    },
                    "statistics": {"num_ooms": 0, "allocated_bytes.all.peak": 14 * MIB},
                    "place_stats": {
                        "populated_device_peak": 1900 * MIB,
                        "populated_host_peak": 333 * MIB,
                        "moved_to_device": 77 * MIB,
                        "moved_to_host": 55 * MIB,
                        "prefetches": 4,
                        "advices": 5,
                        "discards": 6,
                        "stage": 1,
                        "stage_changes": 9,
                    },
                    "segments": [segment],
                    "samples": [sample(10, 2 * MIB, 0, 0), sample(1_000_010, 2 * MIB, 20 * MIB, 12 * MIB)],
                }
            ],
        }
    )
