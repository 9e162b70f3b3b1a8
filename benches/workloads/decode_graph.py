"""Token-by-token decoding with a key-value cache, one step captured in a CUDA graph and replayed."""

from __future__ import annotations

from bench import Bench, Figure
from limits import GIB

TITLE = "decode with a CUDA graph"
FIGURES = {
    "token": Figure("a token", "ms"),
    "capture": Figure("capture", "ms", informative=True),
}
SEED = 3


def need(quick: bool) -> int:
    """Bytes at most."""
    return GIB // 2 if quick else 6 * GIB


def preload() -> None:
    """Before the process's turn."""
    import model  # noqa: F401


def run(bench: Bench) -> None:
    """A prompt without a graph, one warm-up step on a side stream, the capture, then replays up to the cache's end."""
    import model

    torch = bench.torch
    size = model.Size(2, 128, 2, 256, 64) if bench.quick else model.Size(6, 1024, 16, 8192, 1024)
    batch, prompt, blocks, replays = (2, 8, 1, 4) if bench.quick else (8, 128, 8, 100)
    with torch.no_grad():
        with bench.allocations():
            decoder = model.build(size, SEED, torch.bfloat16)
            caches = [model.Cache(size, batch, torch.bfloat16) for _ in range(size.layers)]
            random = torch.Generator("cuda").manual_seed(SEED)
            tokens = torch.randint(0, size.vocabulary, (batch, prompt), device="cuda", generator=random)
            logits = decoder.decode(tokens, torch.arange(prompt, device="cuda"), caches)
            token, position = logits.argmax(-1, keepdim=True), torch.full((1,), prompt, device="cuda")
            written = torch.zeros((batch, size.longest), device="cuda", dtype=torch.long)
            logits = torch.empty_like(logits)

        def step() -> None:
            """One token, in place: what is captured."""
            logits.copy_(decoder.decode(token, position, caches))
            token.copy_(logits.argmax(-1, keepdim=True))
            written.index_copy_(1, position, token)
            position.add_(1)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), bench.allocations():
            step()
        torch.cuda.current_stream().wait_stream(side)

        graph = torch.cuda.CUDAGraph()

        def capture() -> None:
            with torch.cuda.graph(graph, pool=bench.graph_pool):
                step()

        bench.sample("capture", bench.seconds(capture) * 1e3)
        bench.steady()
        for _ in range(blocks):

            def replay() -> None:
                for _ in range(replays):
                    graph.replay()

            bench.sample("token", bench.milliseconds(replay) / replays)
        bench.end_of_measurement()
        bench.check_values(lambda: int(position) == prompt + 1 + blocks * replays, "not every replay ran")
        bench.check_values(lambda: logits.isfinite().all(), "a logit is not finite")
        bench.digest("tokens", written)
        bench.digest("logits", logits)
