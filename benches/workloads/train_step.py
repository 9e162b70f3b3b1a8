"""A training step of a six-layer transformer: bf16 autocast, AdamW."""

from __future__ import annotations

from bench import Bench, Figure
from limits import GIB

TITLE = "training step"
FIGURES = {"step": Figure("a step", "ms")}
SEED = 1


def need(quick: bool) -> int:
    """Bytes at most."""
    return GIB // 2 if quick else 8 * GIB


def preload() -> None:
    """Before the process's turn."""
    import model  # noqa: F401


def run(bench: Bench) -> None:
    """Times blocks of steps; then trains a fresh model deterministically, for the digest of its losses."""
    import model

    size = model.Size(2, 128, 2, 256, 64) if bench.quick else model.Size(6, 1024, 16, 8192, 512)
    sequences = 2 if bench.quick else 16
    warm, blocks, steps = (1, 1, 2) if bench.quick else (10, 12, 10)
    with bench.allocations():
        trainer = model.Trainer(size, SEED)
        tokens = trainer.batch(sequences, size.longest)

        def several(count: int) -> None:
            for _ in range(count):
                trainer.step(tokens)

        several(warm)
        bench.steady()
        for _ in range(blocks):
            bench.sample("step", bench.milliseconds(lambda: several(steps)) / steps)
        bench.end_of_measurement()
        del trainer, tokens

        with model.deterministic():
            trainer = model.Trainer(size, SEED)
            losses = [trainer.step(trainer.batch(sequences, size.longest)) for _ in range(2 if bench.quick else 5)]
        bench.check_values(lambda: all(loss.isfinite() for loss in losses), "a loss is not finite")
        bench.digest("losses", *losses)
        # The first weights that the backward pass reaches last: few bytes that all others have a part in.
        bench.digest("weights", trainer.model.positions)
