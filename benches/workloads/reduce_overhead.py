"""`torch.compile(mode="reduce-overhead")`: Inductor's kernels, replayed by CUDA graph trees."""

from __future__ import annotations

from typing import Any, Callable

from bench import Bench, Figure
from limits import GIB

TITLE = "torch.compile, reduce-overhead"
FIGURES = {
    "forward": Figure("forward", "ms"),
    "training": Figure("forward and backward", "ms"),
    "compile": Figure("compile and warm-up", "s", informative=True),
}
SEED = 4


def need(quick: bool) -> int:
    """Bytes at most."""
    return GIB // 2 if quick else 4 * GIB


def preload() -> None:
    """Before the process's turn."""
    import torch._dynamo  # noqa: F401


def run(bench: Bench) -> None:
    """Times inference and training of four compiled feed-forward layers. The compiler's caches serve all backends."""
    import torch
    from torch import nn
    from torch._dynamo.utils import counters

    width, rows, layers = (64, 32, 1) if bench.quick else (1024, 512, 4)
    blocks, iterations = (1, 3) if bench.quick else (24, 100)
    torch.manual_seed(SEED)
    with bench.allocations(), torch.device("cuda"):
        parts = [
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(layers)
        ]
        stack = nn.ModuleList(parts).to(torch.bfloat16)
        x = torch.randn(rows, width, dtype=torch.bfloat16)

    def through(x: torch.Tensor) -> torch.Tensor:
        for part in stack:
            x = x + part(x)
        return x

    def loss_of(x: torch.Tensor) -> torch.Tensor:
        return through(x).float().square().mean()

    infer, compute_loss = bench.reduce_overhead(through), bench.reduce_overhead(loss_of)

    def forward() -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            return infer(x)

    def training() -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        stack.zero_grad(set_to_none=True)
        loss = compute_loss(x)
        loss.backward()
        return loss

    def several(work: Callable[[], Any], count: int) -> None:
        for _ in range(count):
            work()

    # A call that compiles, one that warms the graph's pool up, one that records, and one replay.
    bench.sample("compile", bench.seconds(lambda: (several(forward, 4), several(training, 4))))
    bench.check(counters["inductor"]["cudagraph_skips"] == 0, "a compiled function runs without CUDA graphs")
    output = forward().clone()
    loss = training().detach().clone()
    bench.check_values(lambda: output.isfinite().all() and loss.isfinite(), "a result is not finite")
    bench.digest("output", output)
    bench.digest("gradients", loss, *(parameter.grad for parameter in stack.parameters()))
    del output, loss
    bench.steady()
    for _ in range(blocks):
        bench.sample("forward", bench.milliseconds(lambda: several(forward, iterations)) / iterations)
        bench.sample("training", bench.milliseconds(lambda: several(training, iterations)) / iterations)
    bench.end_of_measurement()
