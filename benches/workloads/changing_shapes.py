"""Eight training steps whose batches have other shapes each: what fragments a caching allocator."""

from __future__ import annotations

from bench import Bench, Figure
from limits import GIB

TITLE = "changing shapes"
FIGURES = {
    "steady": Figure("8 steps, steady", "ms"),
    "cold": Figure("8 steps after empty_cache", "ms"),
}
SEED = 2
#: (sequences, length): about 8192 tokens each.
SHAPES = ((16, 512), (8, 1000), (24, 320), (4, 1900), (32, 256), (12, 640), (20, 416), (6, 1344))


def need(quick: bool) -> int:
    """Bytes at most."""
    return GIB // 2 if quick else 8 * GIB


def preload() -> None:
    """Before the process's turn."""
    import model  # noqa: F401


def run(bench: Bench) -> None:
    """The first pass loads kernels and is not timed; cold passes begin with an empty cache; then steady ones."""
    import model

    size = model.Size(2, 128, 2, 256, 64) if bench.quick else model.Size(6, 1024, 16, 8192, 2048)
    shapes = tuple((count, length // 32) for count, length in SHAPES) if bench.quick else SHAPES
    cold, steady = (1, 1) if bench.quick else (3, 16)
    with bench.allocations():
        trainer = model.Trainer(size, SEED)
        batches = [trainer.batch(*shape) for shape in shapes]

        def eight() -> None:
            for tokens in batches:
                trainer.step(tokens)

        eight()
        for _ in range(cold):
            bench.torch.cuda.synchronize()
            bench.torch.cuda.empty_cache()
            bench.sample("cold", bench.milliseconds(eight))
        bench.steady()
        for _ in range(steady):
            bench.sample("steady", bench.milliseconds(eight))
        bench.end_of_measurement()
        del trainer, batches

        with model.deterministic():
            trainer = model.Trainer(size, SEED)
            losses = [trainer.step(trainer.batch(*shape)) for shape in shapes]
        bench.check_values(lambda: all(loss.isfinite() for loss in losses), "a loss is not finite")
        bench.digest("losses", *losses)
        # The first weights that the backward pass reaches last: few bytes that all others have a part in.
        bench.digest("weights", trainer.model.positions)
