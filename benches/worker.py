#!/usr/bin/env python3
"""The process of one measurement or check; run.py and correctness.py start it.

    worker.py workload|check NAME BACKEND RESULT.json [--quick] [--turns READ,WRITE]

It imports PyTorch, waits for a line (or the end) of its standard input, which is its turn on the GPU, and writes its
result as JSON. `{"skipped": reason}` is a result too; anything that goes wrong is an exit status. With `--turns`, whose
numbers are file descriptors, it also asks before each measurement (processes.Turns).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path


def main() -> None:
    """Does what the module's first lines say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("workload", "check"))
    parser.add_argument("name")
    parser.add_argument("backend")
    parser.add_argument("result", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--turns", default="")
    arguments = parser.parse_args()

    import torch

    import backends
    import limits
    import processes
    from bench import Bench, Skipped

    if arguments.kind == "workload":
        import workloads

        work = workloads.WORKLOADS[arguments.name]
    else:
        import checks

        work = checks.CHECKS[arguments.name]
    work.preload()
    sys.stdin.readline()

    backend = backends.BACKENDS[arguments.backend]
    try:
        prepared = backends.prepare(torch, backend, work.need(arguments.quick))
        # cuDNN's attention has no deterministic backward pass, and the simulated device has no cuDNN.
        torch.backends.cuda.enable_cudnn_sdp(False)
        turn = processes.Turns(arguments.turns).turn if arguments.turns else nullcontext
        simulated = "TORCH_UVM_SIM_DEVICE" in os.environ
        bench = Bench(torch, backend, prepared, quick=arguments.quick, simulated=simulated, turn=turn)
        work.run(bench)
        torch.cuda.synchronize()
        result = bench.result()
    except (Skipped, limits.TooMuch) as reason:
        result = {"skipped": str(reason)}
    arguments.result.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
