"""A plain pre-norm transformer, trained and decoded by the workloads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Size:
    """Dimensions of a transformer. `width / heads` is the size of a head."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    longest: int


class Cache:
    """Keys and values of one layer, at fixed addresses, for every position up to `longest`."""

    def __init__(self, size: Size, batch: int, dtype: torch.dtype) -> None:
        shape = (batch, size.heads, size.longest, size.width // size.heads)
        self.keys = torch.zeros(shape, device="cuda", dtype=dtype)
        self.values = torch.zeros(shape, device="cuda", dtype=dtype)

    def store(self, positions: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes at `positions` and returns all of both."""
        self.keys.index_copy_(2, positions, keys)
        self.values.index_copy_(2, positions, values)
        return self.keys, self.values


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind a norm and beside a residual."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.attention_norm = nn.LayerNorm(size.width)
        self.queries_keys_values = nn.Linear(size.width, 3 * size.width)
        self.attention_out = nn.Linear(size.width, size.width)
        self.forward_norm = nn.LayerNorm(size.width)
        self.up = nn.Linear(size.width, 4 * size.width)
        self.down = nn.Linear(4 * size.width, size.width)

    def forward(
        self,
        x: Tensor,
        cache: Optional[Cache] = None,
        positions: Optional[Tensor] = None,
        mask: Optional[Tensor] = None,
    ) -> Tensor:
        """Causal over `x`; with a cache, over what `mask` admits of the cache."""
        batch, length, width = x.shape
        packed = self.queries_keys_values(self.attention_norm(x))
        parts = packed.view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        queries, keys, values = parts.unbind(0)
        if cache is not None:
            keys, values = cache.store(positions, keys, values)
        seen = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=mask is None)
        x = x + self.attention_out(seen.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(functional.gelu(self.up(self.forward_norm(x))))


class Transformer(nn.Module):
    """Tokens to logits. The token embedding is fixed: its gradient has no deterministic sum for few tokens."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size.vocabulary, size.width)
        self.tokens.weight.requires_grad_(False)
        self.positions = nn.Parameter(torch.randn(size.longest, size.width) * 0.02)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of every position."""
        x = self.tokens(tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def decode(self, tokens: Tensor, positions: Tensor, caches: list[Cache]) -> Tensor:
        """Logits of the last of `tokens`, which stand at `positions`; earlier ones are in the caches."""
        x = self.tokens(tokens) + self.positions.index_select(0, positions)
        every = torch.arange(caches[0].keys.shape[2], device="cuda")
        mask = every[None, :] <= positions[:, None]
        for block, cache in zip(self.blocks, caches):
            x = block(x, cache, positions, mask)
        return self.head(self.norm(x[:, -1]))


def build(size: Size, seed: int, dtype: torch.dtype = torch.float32) -> Transformer:
    """A transformer on the GPU, the same for the same seed."""
    torch.manual_seed(seed)
    with torch.device("cuda"):
        return Transformer(size).to(dtype)


class Trainer:
    """A transformer with AdamW that is trained on seeded tokens under bf16 autocast."""

    def __init__(self, size: Size, seed: int) -> None:
        self.size = size
        self.model = build(size, seed)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=3e-4)
        self._random = torch.Generator("cuda").manual_seed(seed)

    def batch(self, sequences: int, length: int) -> Tensor:
        """Random tokens, one more than `length` a sequence: inputs and, shifted by one, targets."""
        shape = (sequences, length + 1)
        return torch.randint(0, self.size.vocabulary, shape, device="cuda", generator=self._random)

    def step(self, tokens: Tensor) -> Tensor:
        """One step; the loss, still on the GPU."""
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits = self.model(tokens[:, :-1])
            loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


class deterministic:
    """Within this, PyTorch takes deterministic algorithms only. CUBLAS_WORKSPACE_CONFIG must be set."""

    def __enter__(self) -> None:
        torch.use_deterministic_algorithms(True)

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(False)
