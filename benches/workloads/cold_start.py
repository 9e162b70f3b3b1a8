"""What a fresh process pays: Python's start, `import torch`, the first allocation and its synchronisation.

Run by itself, this file is that process: `cold_start.py RESULT.json`.
"""

import time

START = time.perf_counter()

if __name__ != "__main__":
    from pathlib import Path

    from bench import Figure

    TITLE = "cold start"
    FIGURES = {
        "process": Figure("the whole process", "s"),
        "import": Figure("import torch", "s"),
        "first_use": Figure("first allocation and synchronise", "s"),
    }
    #: A start is what is measured here, so nothing runs beside it.
    ALONE = True
    PROGRAM = Path(__file__).resolve()
    #: The others' starts say nothing about an allocator: they load a library of the bench's first.
    BACKENDS = ("native", "expandable", "uvm", "uvm_device")
    PROCESSES = 2
else:
    import torch

    IMPORTED = time.perf_counter()
    free, total = torch.cuda.mem_get_info()
    if free < 64 << 20:
        raise SystemExit(f"the card has {free} bytes free: too little for this")
    kept = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    USED = time.perf_counter()

    import json
    import sys

    backend = torch.cuda.get_allocator_backend()
    figures = {"import": [IMPORTED - START], "first_use": [USED - IMPORTED]}
    with open(sys.argv[1], "w") as result:
        json.dump({"figures": figures, "backend": backend}, result)
