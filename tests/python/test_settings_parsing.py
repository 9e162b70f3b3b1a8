"""Settings strings are read as PyTorch reads them: with our keys in them, a string is accepted or refused as without.

PyTorch's own allocator is asked about each string, then ours about the same string with our keys woven in, and the two
must agree: both accept it, with the same settings of PyTorch's afterwards, or both refuse it with the same words.
"""

from __future__ import annotations

import functools
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from on_device import about_uvm
from simulated import environment
from test_activation import with_the_plugin
from versions import LATER

CUDA, GENERAL, HIP = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"

#: As they stand in scripts, images and bug reports; and then what one can do wrong.
STRINGS = (
    "",
    " ",
    "\n",
    "expandable_segments:True",
    "expandable_segments:False",
    "expandable_segments: True",
    " expandable_segments:True ",
    "expandable_segments:True\n",
    "expandable_segments:True\r",
    "expandable_segments:True\r\n",
    "expandable_segments\t:\tTrue",
    "expandable_segments:True,",
    "expandable_segments:true",
    "expandable_segments:1",
    "expandable_segments",
    "expandable_segments:",
    "expandable_segments=True",
    "Expandable_Segments:True",
    "'expandable_segments:True'",
    '"expandable_segments:True"',
    "expandable_segments:True,max_split_size_mb:128",
    "expandable_segments:True;max_split_size_mb:128",
    "expandable_segments:True max_split_size_mb:128",
    "max_split_size_mb:64",
    "max_split_size_mb : 64",
    "max_split_size_mb:64,garbage_collection_threshold:0.5",
    "max_split_size_mb:64, garbage_collection_threshold:0.5",
    "max_split_size_mb:64,\n  garbage_collection_threshold:0.5\n",
    "max_split_size_mb:64,\r\ngarbage_collection_threshold:0.5\r\n",
    "max_split_size_mb:64,\tgarbage_collection_threshold:0.5",
    "max_split_size_mb:64,\\\n    garbage_collection_threshold:0.5",
    "garbage_collection_threshold:0.6,max_split_size_mb:128",
    "garbage_collection_threshold:0.9,max_split_size_mb:512,roundup_power2_divisions:16",
    "max_split_size_mb:64,,garbage_collection_threshold:0.5",
    ",max_split_size_mb:64",
    "max_split_size_mb:64,",
    "max_split_size_mb:64, ",
    "max_split_size_mb:64,,",
    ",",
    ",,",
    "max_split_size_mb:64,max_split_size_mb:128",
    "max_split_size_mb:64:65",
    "max_split_size_mb::64",
    "max_split_size_mb:64garbage_collection_threshold:0.5",
    "max_split_size_mb",
    "max_split_size_mb:",
    "max_split_size_mb:,",
    "max_split_size_mb:abc",
    "max_split_size_mb:64MB",
    "max_split_size_mb:64.5",
    "max_split_size_mb:-1",
    "max_split_size_mb:1",
    "max_split_size_mb:[64]",
    "max_split_size_mb=64",
    "max_split_size:64",
    "max_spilt_size_mb:64",
    "garbage_collection_threshold:0",
    "garbage_collection_threshold:1.5",
    "garbage_collection_threshold:0,8",
    "roundup_power2_divisions:4",
    "roundup_power2_divisions:3",
    "roundup_power2_divisions:[256:1,512:2,1024:4,>:8]",
    "roundup_power2_divisions:[ 256:1, 512:2,\n 1024:4, >:8 ]",
    "roundup_power2_divisions:[256:1,512:2,>:8],max_split_size_mb:64",
    "max_split_size_mb:64,roundup_power2_divisions:[256:1,512:2,>:8]",
    "roundup_power2_divisions:[256:1,512:2,]",
    "roundup_power2_divisions:[256:1,512:2",
    "roundup_power2_divisions:256:1,512:2]",
    "roundup_power2_divisions:[]",
    "roundup_power2_divisions:[256:3]",
    "roundup_power2_divisions:[[256:1]]",
    "backend:native",
    "backend:nativ",
    "backend:",
    "backend",
    "max_non_split_rounding_mb:40",
    "release_lock_on_cudamalloc:True",
    "release_lock_on_cudamalloc:yes",
    "pinned_use_cuda_host_register:True,pinned_num_register_threads:8",
    "pinned_num_register_threads:7",
    "pinned_use_background_threads:True",
    "large_segment_size_mb:64",
    "per_process_memory_fraction:0.5",
    "per_process_memory_fraction:2",
    "graph_capture_record_stream_reuse:True",
    "throw_on_cudamalloc_oom:True",
    "use_uvm2:True",
    "uvm:True",
    "no_such_key:1",
    "no_such_key",
    "no_such_key:[1,2],max_split_size_mb:64",
    ":",
    ":64",
    "[",
    "]",
    "[]",
    "True",
    "max_split_size_mb:64,None",
    "None",
    "0",
    "max_split_size_mb:64,\vgarbage_collection_threshold:0.5",
    "max_split_size_mb:64,\f",
    "größe:64",
)

#: What both variables, and the third one that PyTorch knows, hold.
TOGETHER = (
    {CUDA: "max_split_size_mb:64", GENERAL: "garbage_collection_threshold:0.5"},
    {CUDA: "max_split_size_mb:64", GENERAL: "no_such_key:1"},
    {CUDA: "no_such_key:1", GENERAL: "max_split_size_mb:64"},
    {CUDA: "", GENERAL: "max_split_size_mb:64"},
    {CUDA: "max_split_size_mb:64", GENERAL: ""},
    {GENERAL: "max_split_size_mb:64"},
    {GENERAL: "no_such_key:1"},
    {GENERAL: "max_split_size_mb:64", HIP: "garbage_collection_threshold:0.5"},
    {CUDA: "max_split_size_mb:64", HIP: "garbage_collection_threshold:0.5"},
    {CUDA: "max_split_size_mb:64", HIP: "no_such_key:1"},
    {HIP: "max_split_size_mb:64"},
)

# Reads cases, lines of JSON, and says of each what became of it, in a fork of its own: PyTorch reads its settings once.
PROGRAM = """
import json, os, sys
import torch
ours = sys.argv[1] == "uvm"
if ours:
    from torch_uvm import _activate

def settled(case):
    os.environ.update(case["variables"])
    if ours:
        _activate.autoload()
    torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
    if "then" in case:
        names = ("_accelerator_setAllocatorSettings", "_cuda_cudaCachingAllocator_set_allocator_settings")
        getattr(torch._C, next(name for name in names if hasattr(torch._C, name)))(case["then"])
    found = torch._C._cuda_memorySnapshot(None)["allocator_settings"]
    return {name: value for name, value in found.items() if not name.startswith(("last", "PYTORCH"))}

def verdict(case):
    try:
        answer = ["accepted", settled(case), torch.cuda.get_allocator_backend()]
    except Exception as error:
        lines = str(error).splitlines() or [""]
        answer = ["refused", type(error).__name__, lines[0], torch.cuda.get_allocator_backend()]
    return answer

for line in sys.stdin:
    receive, reply = os.pipe()
    if os.fork() == 0:
        os.write(reply, json.dumps(verdict(json.loads(line))).encode())
        os._exit(0)
    os.close(reply)
    with os.fdopen(receive, "rb") as pipe:
        answer = json.loads(pipe.read() or '["died"]')
    os.wait()
    print(json.dumps(answer))
"""


def verdicts(backend: str, cases: list[dict[str, Any]]) -> list[list[Any]]:
    """What becomes of each case: its `variables`, and `then` settings that the running program makes."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, backend],
        input="".join(json.dumps(case) + "\n" for case in cases),
        env=environment("", require=True),
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(cases), done.stdout + done.stderr
    return found


@functools.cache
def natives() -> dict[str, list[Any]]:
    """What PyTorch's own allocator makes of STRINGS in its variable."""
    return dict(zip(STRINGS, verdicts("native", [{"variables": {CUDA: string}} for string in STRINGS])))


def disagreements(cases: list[dict[str, Any]], expected: list[list[Any]]) -> list[str]:
    """Where ours finds something else than native has found. Where settings are accepted, ours must be the backend."""
    wrong = []
    for case, theirs, ours in zip(cases, expected, verdicts("uvm", cases)):
        # Beside use_uvm a backend is ours to refuse, whatever its value is.
        ours_to_refuse = "backend" in str(case)
        agree = "beside use_uvm:True" in ours[2] if ours_to_refuse else ours[:-1] == theirs[:-1]
        if not agree or (ours[0] == "accepted" and ours[-1] != "uvm"):
            wrong.append(f"{case}: ours {ours}, native {theirs}")
    return wrong


def woven(string: str, ours: str) -> list[str]:
    """A string with our keys before it, and behind it where PyTorch would get that far."""
    if not string.strip():
        return [f"{ours}{string}"]
    if natives()[string][0] == "refused":
        return [f"{ours},{string}"]
    return [f"{ours},{string}", f"{string}{ours}" if string.rstrip().endswith(",") else f"{string},{ours}"]


@with_the_plugin
@about_uvm
def test_strings_with_our_keys_in_them() -> None:
    """In front and behind, with white space around them and without; all forms in turn."""
    forms = itertools.cycle(
        ("use_uvm:True", "use_ uvm : True", "use_uvm:True,uvm_prefetch:False", "\n  use_uvm:True", "use_uvm\t:True\r\n")
    )
    cases, expected = [], []
    for string in STRINGS:
        for text in woven(string, next(forms)):
            cases.append({"variables": {CUDA: text}})
            # White space alone belongs to our key's value then.
            expected.append(natives()[string if string.strip() else ""])
    wrong = disagreements(cases, expected)
    assert not wrong, "\n".join(wrong)
    accepted = sum(verdict[0] == "accepted" for verdict in expected)
    assert min(accepted, len(expected) - accepted) > 40, (accepted, len(expected))


@with_the_plugin
@about_uvm
def test_strings_in_both_variables() -> None:
    """Our key in either one. A variable that holds nothing else is to PyTorch one that is not set."""
    cases, plain = [], []
    for variables in TOGETHER:
        for name in (CUDA, GENERAL):
            theirs = variables.get(name, "")
            # An empty variable is set, and PyTorch looks no further: so our key cannot be put into it.
            if name in variables and not theirs:
                continue
            cases.append({"variables": {**variables, name: f"use_uvm:True,{theirs}" if theirs else "use_uvm:True"}})
            # The variable for HIP is not read where the one for CUDA is set, also where that one has only ours.
            ignored = {HIP} if name == CUDA else set()
            plain.append({"variables": {key: value for key, value in variables.items() if key not in ignored}})
    wrong = disagreements(cases, verdicts("native", plain))
    assert not wrong, "\n".join(wrong)


@with_the_plugin
@about_uvm
def test_strings_at_run_time() -> None:
    """Through the function that takes settings of a running program."""
    expected = verdicts("native", [{"variables": {}, "then": string} for string in STRINGS])
    cases, wanted = [], []
    for string, verdict in zip(STRINGS, expected):
        for text in woven(string, "uvm_prefetch:False")[:1] if string.strip() else [string]:
            cases.append({"variables": {CUDA: "use_uvm:True"}, "then": text})
            wanted.append(verdict)
    wrong = disagreements(cases, wanted)
    assert not wrong, "\n".join(wrong)


@with_the_plugin
@about_uvm
def test_what_is_wrong_with_ours() -> None:
    """Our own key is named with its value, wherever it stands and whatever is wrong with it."""
    bad = {
        "use_uvm:true": "use_uvm: 'true'",
        "use_uvm:": "use_uvm: ''",
        "use_uvm,max_split_size_mb:64": "use_uvm: ''",
        "use_uvm:True:True": "use_uvm: 'True:True'",
        "use_uvm:True;max_split_size_mb:64": "use_uvm: 'True;max_split_size_mb:64'",
        "max_split_size_mb:64,\n use_uvm:[True]": "use_uvm: '[True]'",
        "use_uvm:True,uvm_prefetch:\tno": "uvm_prefetch: 'no'",
    }
    found = verdicts("uvm", [{"variables": {CUDA: string}} for string in bad])
    for (string, words), verdict in zip(bad.items(), found):
        assert verdict[0] == "refused" and f"{CUDA}: {words} is not allowed" in verdict[2], (string, verdict)


@with_the_plugin
@about_uvm
def test_both_variables_choose_the_same() -> None:
    """Our keys count in both, the later variable's last; PyTorch's are as they would be without ours."""
    general = {GENERAL: "max_split_size_mb:64,garbage_collection_threshold:0.5"}
    cases: list[dict[str, Any]] = [
        {"variables": {CUDA: "use_uvm:True", **general}},
        {"variables": {CUDA: "use_uvm:False", GENERAL: "use_uvm:True"}},
        {"variables": {CUDA: "\tuse_uvm:True\n", GENERAL: "use_uvm:False"}},
    ]
    both, off, on = verdicts("uvm", cases)
    assert both[0] == off[0] == on[0] == "accepted"
    assert (both[2], off[2], on[2]) == ("uvm", "native", "uvm")
    if LATER["PYTORCH_ALLOC_CONF"]:
        assert both[1]["max_split_size"] == 64 << 20 and both[1]["garbage_collection_threshold"] == 0.5, both
