"""What memory beyond the device limit costs, in counts: faults, pages that move, bytes each way over the link.

The experiments of `benches/beyond.py` on the simulated device, where they come out the same each time. Kernels do
nothing there, so copies of weights and state stand for them. Each test also runs with a regression planted in the
program, and then its figures must be wrong, by faults where pages come by faults: else it would show nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from string import Template
from typing import Any

import pytest
from contents import MIB, same
from on_device import about_uvm
from simulated import HERE
from simulating import simulate

#: Takes long, and is the same for every version of PyTorch.
pytestmark = pytest.mark.one_version

#: A small GPU whose link is PCIe: what has not been mapped beforehand faults there.
MACHINE = ("--device", "h100", "--host", "4GiB", "--seed", "late", "--hbm")
SMALL, LARGER = "96MiB", "192MiB"
#: The limit that everything but the sweep has, and what a layer's weights, an activation or a moment take, in MiB: from
#: 10 MiB on the allocator takes no more than whole pages.
LIMIT, UNIT = 80, 10
LAYERS = 4 * LIMIT // UNIT
#: Pages of 2 MiB of all weights.
PAGES = LAYERS * UNIT // 2
#: Of the sweep: layers, and its limits in MiB beside the activation, from all of the weights to a fifth.
SWEPT = 15
LIMITS = tuple(fifths * SWEPT * UNIT // 5 for fifths in (5, 4, 3, 2, 1))
#: Steps of training, and the first one in which nothing moves any more: by then twice the limit was freed since the
#: state was made.
STEPS, SETTLED = 12, 8

PLACED = f"use_uvm:True,uvm_access_pattern:gpu_first,uvm_device_limit_mb:{LIMIT}"
#: Nobody populates ahead of use, and nobody says where memory should be.
FAULTING = f"use_uvm:True,uvm_access_pattern:balanced,uvm_prefetch:False,uvm_device_limit_mb:{LIMIT}"

#: What every program begins with. `phase` notes what was counted since the last one.
BEGIN = f"""
import ctypes, json, os, sys
import torch
from torch import nn
sys.path.insert(0, {str(HERE)!r})
import torch_uvm
from contents import check, pattern

UNIT, LAYERS, MIB = {UNIT} << 20, {LAYERS}, 1 << 20
torch.cuda.init()
phases, before = {{}}, {{}}

def phase(name, **more):
    global before
    torch.cuda.synchronize()  # the simulator writes its report whenever it has waited
    with open(os.path.join(os.environ["TORCH_UVM_SIM_REPORT"], f"{{os.getpid()}}.json")) as file:
        found = json.loads(file.readline())
    counters, traffic, populated = found["counters"], found["traffic"], found["populated"]
    now = {{key: counters[key] for key in ("device_faults", "host_faults", "migrations", "evictions",
                                          "prefetch_skipped", "slow_discard_writes", "host_overcommitted")}}
    now |= {{f"{{cause}}_{{way}}": traffic[cause][f"bytes_{{way}}"] for cause in traffic for way in ("h2d", "d2h")}}
    now |= {{"populated_by_faults": populated["faults"]["bytes_device"] + populated["faults"]["bytes_host"]}}
    device = torch_uvm.memory_info().populated_device
    phases[name] = {{**{{key: now[key] - before.get(key, 0) for key in now}}, "device": device, **more}}
    before = now

class Managed:
    '''As torch_uvm._streaming.pinned.Pinned, of cudaMallocManaged alone: pages come and go by faults.'''
    def __init__(self, count, device=0):
        pointer = ctypes.c_void_p()
        runtime = ctypes.CDLL(f"libcudart.so.{{torch.version.cuda.partition('.')[0]}}")
        assert runtime.cudaMallocManaged(ctypes.byref(pointer), ctypes.c_size_t(count), 1) == 0
        self.cpu = torch.frombuffer((ctypes.c_char * count).from_address(pointer.value), dtype=torch.uint8)
        self.__cuda_array_interface__ = {{
            "shape": (count,), "typestr": "|u1", "data": (pointer.value, False), "version": 3
        }}
    def cuda(self, offset=0, count=None):
        whole = torch.as_tensor(self, device="cuda")
        return whole[offset:] if count is None else whole[offset : offset + count]

class Layer(nn.Module):
    checks = False
    def __init__(self, seed):
        super().__init__()
        self.seed, self.weight = seed, nn.Parameter(pattern(seed, UNIT).clone(), requires_grad=False)
    def forward(self, x):
        x.copy_(self.weight)  # stands for the kernel
        if Layer.checks:
            check(x, self.seed, f"layer {{self.seed}}")
        return x

def checked(model):
    Layer.checks = True
    model(x)
    Layer.checks = False

x = torch.empty(UNIT, dtype=torch.uint8, device="cuda")
torch.set_grad_enabled(False)
"""
END = "\nprint(json.dumps(phases))\n"

#: Three passes through weights of four times the limit.
FORWARD = """
$plant
model = nn.Sequential(*(Layer(seed) for seed in range(LAYERS)))
$attach
phase("load")
for number in range(3):
    model(x)
    phase(f"pass {number}")
checked(model)
"""
PINNED_IS_MANAGED = "import torch_uvm._streaming.attach\ntorch_uvm._streaming.attach.Pinned = Managed"
NOTHING_IS_COPIED = (
    "import torch_uvm._streaming.slots\n"
    "torch_uvm._streaming.slots.Slot.fill = lambda slot, contents, copies: slot.ready.record(copies)\n"
    "checked = lambda model: None  # the contents are wrong, of course"
)
WEIGHTS_ARE_MANAGED = """
for layer in model:
    layer.weight.data = Managed(UNIT).cuda().copy_(layer.weight.data)
"""

#: Another limit for each model, from all of the weights to a fifth of them.
SWEEP = """
$plant
import warnings
warnings.simplefilter("ignore")  # newer versions have another name for it
for limit in $limits:
    torch.cuda.memory._set_allocator_settings(f"uvm_device_limit_mb:{limit + UNIT // MIB}")
    model = nn.Sequential(*(Layer(seed) for seed in range($layers)))
    stream = torch_uvm.stream_weights(model, device_bytes=limit * MIB)
    phase(f"limit {limit} load")
    for number in range(2):
        model(x)
        phase(f"limit {limit} pass {number}")
    checked(model)
    model.to("cpu")
    stream.remove()  # moved to the CPU before: the device needs no room for them
    del model, stream
    torch_uvm.empty_cache()
    phase(f"limit {limit} unload")
"""

#: Weights of 40 MiB, as much of activations and `x` as there is room for beside them, and 80 MiB of AdamW's state, made
#: at the end of the first step.
TRAIN = """
weights = [nn.Parameter(torch.empty(UNIT // 4, device="cuda")) for _ in range(4)]
for seed, weight in enumerate(weights):
    weight.view(torch.uint8).copy_(pattern(seed, UNIT))
optimizer = torch.optim.AdamW(weights, foreach=False)
$attach

def step(number):
    activations = []
    for weight in weights[:3]:  # forward
        x.copy_(weight.view(torch.uint8))
        activations.append(torch.empty(UNIT, dtype=torch.uint8, device="cuda").copy_(x))
    for seed in (2, 1, 0):  # backward
        x.copy_(activations.pop())
        if number < $settled:
            check(x, seed, f"activation {seed} of step {number}")
    if number == 0:
        for weight in weights:
            weight.grad = weight.data  # nothing reads it
        optimizer.step()
        for seed, moment in enumerate(moments()):
            moment.copy_(pattern(10 + seed, UNIT))
    for moment in moments():  # reads and writes it
        x.copy_(moment)
        moment.copy_(x)

def moments():
    return [optimizer.state[weight][name].view(torch.uint8) for weight in weights for name in ("exp_avg", "exp_avg_sq")]

phase("load")
for number in range($steps):
    step(number)
    phase(f"step {number}", moves=torch_uvm.statistics().moves_out)
for seed, weight in enumerate(weights):
    check(weight.view(torch.uint8), seed, "weight")
for seed, moment in enumerate(moments()):
    check(moment, 10 + seed, "moment")
"""

#: What no phase of a sound program has.
NEVER = (
    *("device_faults", "host_faults", "populated_by_faults", "faults_h2d", "faults_d2h"),
    *("evictions", "evictions_h2d", "evictions_d2h"),
    *("prefetch_skipped", "slow_discard_writes", "host_overcommitted"),
)
#: Nor any in which nothing moves.
CALM = (*NEVER, "migrations", "prefetches_h2d", "prefetches_d2h", "copies_d2h", "remote_d2h")


def phases_of(
    program: str, folder: Path, conf: str = PLACED, hbm: str = SMALL, **parts: object
) -> dict[str, dict[str, int]]:
    """What each phase of a program counted. It has checked the contents itself."""
    code = Template(BEGIN + program + END).substitute({"plant": "", "attach": "", **parts})
    ended, found = simulate(code, folder, *MACHINE, hbm, conf=conf)
    assert ended.status == 0, ended.text
    (process,) = found["processes"]
    assert process["complete"], process
    phases: dict[str, dict[str, int]] = json.loads(ended.out)
    return phases


def differences(
    phases: dict[str, dict[str, int]], expected: dict[str, dict[str, int]], zero: tuple[str, ...] = CALM
) -> dict[str, dict[str, Any]]:
    """By phase the figures that are not what was expected: what was found, and what was expected. Those of `zero` that
    `expected` leaves out should be 0."""
    wrong = {
        name: {
            figure: (phases[name][figure], wanted)
            for figure, wanted in {**dict.fromkeys(zero, 0), **figures}.items()
            if phases[name][figure] != wanted
        }
        for name, figures in expected.items()
    }
    return {name: figures for name, figures in wrong.items() if figures}


def faulty(wrong: dict[str, dict[str, Any]]) -> set[str]:
    """The phases in which pages came by faults, or left for want of room, and should not have."""
    return {name for name, figures in wrong.items() if {"device_faults", "evictions"} & set(figures)}


PASSES = ("pass 0", "pass 1", "pass 2")


@pytest.mark.parametrize("plant", [None, "pinned memory is managed", "nothing is copied"])
@about_uvm
def test_forward_of_weights_that_stream(plant: str | None, tmp_path: Path) -> None:
    """Weights of four times the limit: each pass copies what does not stay, once, and nothing else crosses the link."""
    plants = {None: "", "pinned memory is managed": PINNED_IS_MANAGED, "nothing is copied": NOTHING_IS_COPIED}
    phases = phases_of(FORWARD, tmp_path, plant=plants[plant], attach="stream = torch_uvm.stream_weights(model)")
    # Three quarters of what `x` leaves hold three slots and two layers.
    resident = (LIMIT - UNIT) * 3 // 4 // UNIT - 3
    streamed = (LAYERS - resident) * UNIT * MIB
    expected = {name: {"copies_h2d": streamed, "remote_h2d": 0} for name in PASSES}
    expected["load"] = {"copies_h2d": resident * UNIT * MIB, "remote_h2d": 0}
    wrong = differences(phases, expected)
    if plant is None:
        same(wrong, {})
        assert all(phases[name]["device"] <= LIMIT * MIB for name in phases), phases
    elif plant == "nothing is copied":
        same(wrong, {name: {"copies_h2d": (0, streamed)} for name in PASSES})
    else:
        assert faulty(wrong) >= set(PASSES), wrong


@pytest.mark.parametrize("plant", [None, "balanced, no prefetch", "managed memory alone"])
@about_uvm
def test_forward_with_nothing_done(plant: str | None, tmp_path: Path) -> None:
    """gpu_first places in the host what goes beyond the limit: reached there in each pass, and it stays there.

    The plants are the naive ways. With managed memory alone each page comes by a fault in each pass.
    """
    phases = phases_of(
        FORWARD,
        tmp_path,
        FAULTING if plant == "balanced, no prefetch" else PLACED,
        attach=WEIGHTS_ARE_MANAGED if plant == "managed memory alone" else "model.cuda()",
    )
    beyond = (LAYERS * UNIT + UNIT - LIMIT) * MIB
    expected = {name: {"copies_h2d": 0, "remote_h2d": beyond} for name in PASSES}
    expected["load"] = {"copies_h2d": LAYERS * UNIT * MIB, "remote_d2h": beyond, "device": LIMIT * MIB}
    wrong = differences(phases, expected)
    if plant is None:
        same(wrong, {})
        return
    assert "load" in faulty(wrong) and phases["load"]["device_faults"] >= PAGES, wrong
    assert phases["load"]["evictions"] > 0, phases
    if plant == "managed memory alone":
        weights = LAYERS * UNIT * MIB
        for name in PASSES[1:]:
            naive = {
                "device_faults": PAGES, "evictions": PAGES, "migrations": 2 * PAGES,
                "faults_h2d": weights, "evictions_d2h": weights, "remote_h2d": 0,
            }  # fmt: skip
            same({figure: phases[name][figure] for figure in naive}, naive, name)


@pytest.mark.parametrize("plant", [None, "pinned memory is managed"])
@about_uvm
def test_streaming_at_falling_limits(plant: str | None, tmp_path: Path) -> None:
    """From all of the weights to a fifth: what a pass copies grows by what the limit falls, and nothing ever faults."""
    phases = phases_of(
        SWEEP, tmp_path, PLACED, LARGER, limits=LIMITS, layers=SWEPT, plant=PINNED_IS_MANAGED if plant else ""
    )
    expected = {}
    for limit in LIMITS:
        # Three of the layers that would fit make room for the slots, where anything streams.
        streamed = SWEPT - (limit // UNIT - 3) if limit < SWEPT * UNIT else 0
        figures = {"copies_h2d": streamed * UNIT * MIB, "remote_h2d": 0, "device": (limit + UNIT) * MIB}
        expected |= {f"limit {limit} pass {number}": figures for number in range(2)}
        expected[f"limit {limit} load"] = {"copies_h2d": (SWEPT - streamed) * UNIT * MIB}
    copied = [expected[f"limit {limit} pass 1"]["copies_h2d"] for limit in LIMITS if limit < SWEPT * UNIT]
    same({after - before for before, after in zip(copied, copied[1:])}, {SWEPT * UNIT * MIB // 5})
    wrong = differences(phases, expected)
    if plant is None:
        same(wrong, {})
    else:
        streaming = {f"limit {limit} pass 0" for limit in LIMITS[1:]}
        assert faulty(wrong) & streaming, wrong


@pytest.mark.parametrize("plant", [None, "balanced, no prefetch"])
@pytest.mark.parametrize("how", ["offload_optimizer", "nothing done"])
@about_uvm
def test_training(how: str, plant: str | None, tmp_path: Path) -> None:
    """State that does not fit is reached in host memory, and nothing else is: whatever moves for that moves once.

    With nothing done the state takes the activations' place at first, since it is made while they are gone; when the
    allocator knows what lives long, it moves out.
    """
    phases = phases_of(
        TRAIN,
        tmp_path,
        FAULTING if plant else PLACED,
        attach="torch_uvm.offload_optimizer(optimizer)" if how == "offload_optimizer" else "",
        steps=STEPS,
        settled=SETTLED,
    )
    state = 8 * UNIT * MIB
    # With nothing done the state has the place of three activations at first.
    moved = 0 if how == "offload_optimizer" else 3
    settled = {"copies_h2d": 0, "remote_h2d": state, "remote_d2h": state, "device": LIMIT * MIB, "moves": moved}
    later = {f"step {number}": settled for number in range(SETTLED, STEPS)}
    before: dict[str, dict[str, int]] = {name: {} for name in phases if name not in later}
    wrong = {**differences(phases, later), **differences(phases, before, NEVER)}
    if plant is None:
        same(wrong, {})
        same(sum(figures["prefetches_d2h"] for figures in phases.values()), moved * UNIT * MIB)
        same(sum(figures["prefetches_h2d"] for figures in phases.values()), 0)
    else:
        assert faulty(wrong) >= {"load", "step 0"} and set(wrong) >= set(later), wrong
        assert phases["load"]["device_faults"] + phases["step 0"]["device_faults"] >= (4 + 8) * UNIT // 2, phases
