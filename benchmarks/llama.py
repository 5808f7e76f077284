"""Layers of Llama 3 (arXiv 2407.21783), reading a prompt or writing the next token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LlamaAttention(nn.Module):
    """Grouped-query attention with rotary positions; with a `cache`, of new tokens over that many before them."""

    def __init__(self, width: int, heads: int, groups: int, cache: int) -> None:
        super().__init__()
        self.size = width // heads
        self.query, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.key, self.value = (nn.Linear(width, groups * self.size, bias=False) for _ in range(2))
        past = torch.randn(2, 1, groups, cache, self.size) if cache else None
        self.register_buffer("past", past)  # all sequences share one prompt's keys and values

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width)."""
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        past = self.past if isinstance(self.past, Tensor) else None
        before = 0 if past is None else past.shape[3]
        q, k = _rotated(q, before), _rotated(k, before)
        if past is not None:
            keys, values = past.expand(-1, len(x), -1, -1, -1)
            k, v = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=past is None, enable_gqa=True)
        result: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return result


def _rotated(x: Tensor, start: int) -> Tensor:
    """(batch, heads, tokens, size) with rotary positions from `start` on (Su et al., arXiv 2104.09864)."""
    tokens, half = x.shape[-2], x.shape[-1] // 2
    frequencies = 500_000.0 ** (-torch.arange(half, device=x.device) / half)
    angles = torch.arange(start, start + tokens, device=x.device)[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class LlamaBlock(nn.Module):
    """A layer: RMS norms, grouped-query attention, SwiGLU."""

    def __init__(self, width: int, heads: int, groups: int, hidden: int, cache: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = LlamaAttention(width, heads, groups, cache)
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width)."""
        x = x + self.attention(self.norm1(x))
        h = self.norm2(x)
        result: Tensor = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return result


class Llama(nn.Module):
    """Some layers of Llama-3-8B: a prompt's tokens, or with a `cache` the next ones after so many."""

    def __init__(
        self, layers: int = 4, width: int = 4096, heads: int = 32, groups: int = 8, hidden: int = 14336, cache: int = 0
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32_000, width)
        self.layers = nn.ModuleList(LlamaBlock(width, heads, groups, hidden, cache) for _ in range(layers))
        self.norm = nn.RMSNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, tokens) -> (batch, tokens, width)."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.norm(x)
        return result
