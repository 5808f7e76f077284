"""The models and layer shapes of the benchmarks, by name."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nm_sparsity.benchmarks.llama import Llama, LlamaBlock
from nm_sparsity.core import SparsityError
from nm_sparsity.core.experiments import user_model


class Attention(nn.Module):
    """Multi-head attention with fused input projections, through torch's scaled_dot_product_attention."""

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """(batch, tokens, width), attending to `memory`."""
        heads = (self.heads, x.shape[-1] // self.heads)
        q = self.query(x).unflatten(-1, heads).transpose(1, 2)
        k, v = self.key_value(memory).chunk(2, dim=-1)
        k, v = (t.unflatten(-1, heads).transpose(1, 2) for t in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        result: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return result


class Block(nn.Module):
    """A pre-norm Transformer layer; with `cross`, one of a decoder."""

    def __init__(self, width: int, heads: int, hidden: int, causal: bool = False, cross: bool = False) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads, causal)
        self.norm_cross = nn.LayerNorm(width) if cross else None
        self.cross = Attention(width, heads) if cross else None
        self.norm2 = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """(batch, tokens, width)."""
        h = self.norm1(x)
        x = x + self.attention(h, h)
        if self.cross is not None and self.norm_cross is not None and memory is not None:
            x = x + self.cross(self.norm_cross(x), memory)
        result: Tensor = x + self.feed_forward(self.norm2(x))
        return result


class TextEncoder(nn.Module):
    """Token ids -> hidden states, or logits over `vocabulary` with a language-model head."""

    def __init__(self, layers: int, width: int, heads: int, hidden: int, vocabulary: int, head: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width, heads, hidden, causal=head) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary) if head else nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, tokens) -> (batch, tokens, width or vocabulary)."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.head(self.norm(x))
        return result


class Translation(nn.Module):
    """A Transformer of base size (Vaswani et al. 2017) with teacher forcing; 32k shared subwords."""

    def __init__(self, width: int = 512, heads: int = 8, hidden: int = 2048, layers: int = 6) -> None:
        super().__init__()
        self.encoder = TextEncoder(layers, width, heads, hidden, 32_000)
        self.decoder = nn.ModuleList(Block(width, heads, hidden, causal=True, cross=True) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, tokens) -> (batch, tokens, 32,000); the source serves as the target too."""
        memory = self.encoder(tokens)
        x = self.encoder.embedding(tokens)
        for layer in self.decoder:
            x = layer(x, memory)
        return F.linear(self.norm(x), self.encoder.embedding.weight)


class VisionTransformer(nn.Module):
    """ViT-L/16 (Dosovitskiy et al. 2021) on 224 x 224, mean-pooled."""

    def __init__(self, layers: int = 24, width: int = 1024, heads: int = 16, hidden: int = 4096) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, stride=16)
        self.position = nn.Parameter(torch.zeros(1, 196, width))
        self.layers = nn.ModuleList(Block(width, heads, hidden) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, images: Tensor) -> Tensor:
        """(batch, 3, 224, 224) -> (batch, 1000)."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.position
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.head(self.norm(x).mean(1))
        return result


def _resnet(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision.models import get_model

        model: nn.Module = get_model(name, weights=None)
        return model

    return build


def _resnet18_cifar() -> nn.Module:
    """ResNet-18 with the stem for small images: 3 x 3, no stride, no pooling."""
    model: Any = _resnet("resnet18")()
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return cast(nn.Module, model)


class TinyLayers(nn.Sequential):
    """120 linear layers of 32 x 32: a step takes as long as the host needs for each layer.

    Initialized so that gradients keep their size. With PyTorch's default they vanish over so many layers, a sparse
    model's first, and arithmetic with subnormal numbers is slow: what a variant costs would depend on its numbers.
    """

    def __init__(self) -> None:
        layers = [nn.Linear(32, 32) for _ in range(120)]
        for layer in layers:
            nn.init.xavier_normal_(layer.weight)
        super().__init__(*layers)


def compile_layers(model: nn.Module, **options: Any) -> None:
    """Compile `model` in place: a Transformer layer by layer, since layers that are alike are compiled once.

    Args:
        options: those of `torch.compile`.
    """
    blocks: list[nn.Module] = [module for module in model.modules() if isinstance(module, Block | LlamaBlock)]
    for module in blocks or [model]:
        module.compile(**options)


def random_inputs(
    shape: tuple[int, ...],
    vocabulary: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A random input of `shape`: numbers of `dtype`, or token ids below `vocabulary`.

    Raises:
        SparsityError: for a vocabulary below 1, or a shape beyond the memory.
    """
    if vocabulary is not None and vocabulary < 1:
        raise SparsityError("--vocabulary must be at least 1")
    try:
        if vocabulary is not None:
            return torch.randint(vocabulary, shape, device=device)
        return torch.randn(shape, device=device, dtype=dtype)
    except RuntimeError as error:
        raise SparsityError(f"cannot make an input of {'x'.join(map(str, shape))}: {error}") from error


@dataclass(frozen=True)
class Workload:
    """A model, the shape of one example (an image, features, or text with `vocabulary`), and what stays dense in it."""

    build: Callable[[], nn.Module]
    example: tuple[int, ...]
    vocabulary: int | None = None
    exclude: tuple[str, ...] = ()

    def inputs(self, batch: int, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Tensor:
        """A random batch; `dtype` is that of images, which are channels-last."""
        examples = random_inputs((batch, *self.example), self.vocabulary, device, dtype)
        return examples.to(memory_format=torch.channels_last) if examples.dim() == 4 else examples


WORKLOADS = {
    "bert-large": Workload(lambda: TextEncoder(24, 1024, 16, 4096, 30_522), (384,), 30_522),
    "vit-l": Workload(VisionTransformer, (3, 224, 224), exclude=("head",)),
    "resnet50": Workload(_resnet("resnet50"), (3, 224, 224), exclude=("fc",)),
    "resnet18-cifar": Workload(_resnet18_cifar, (3, 32, 32), exclude=("fc",)),
    "transformer-base": Workload(Translation, (64,), 32_000),
    "language-model": Workload(lambda: TextEncoder(6, 512, 8, 2048, 8192, head=True), (512,), 8192, exclude=("head",)),
    "tiny-layers": Workload(TinyLayers, (32,)),
    "llama-prefill": Workload(Llama, (4096,), 32_000),
    "llama-decode": Workload(lambda: Llama(cache=1024), (1,), 32_000),
}


def workload(name: str) -> Workload:
    """The workload called `name`, any torchvision classification model included.

    Raises:
        SparsityError: listing the known ones.
    """
    if name in WORKLOADS:
        return WORKLOADS[name]
    try:
        from torchvision.models import list_models

        if name in list_models():
            return Workload(_resnet(name), (3, 224, 224))
    except ImportError:
        pass
    raise SparsityError(f'unknown model "{name}"; known: {", ".join(WORKLOADS)}, and torchvision\'s by name')


LINEAR_SHAPES = {  # (rows, columns) of the weight
    "bert-base": {"attention": (768, 768), "ffn-up": (3072, 768), "ffn-down": (768, 3072)},
    "bert-large": {"attention": (1024, 1024), "ffn-up": (4096, 1024), "ffn-down": (1024, 4096)},
    "vit-l": {"qkv": (3072, 1024), "ffn-up": (4096, 1024), "ffn-down": (1024, 4096)},
    "llama-7b": {"attention": (4096, 4096), "ffn-up": (11008, 4096), "ffn-down": (4096, 11008)},
    "llama-3-8b": {"q, o": (4096, 4096), "k, v": (1024, 4096), "ffn-up": (14336, 4096), "ffn-down": (4096, 14336)},
    "qwen2.5-7b": {"q, o": (3584, 3584), "k, v": (512, 3584), "ffn-up": (18944, 3584), "ffn-down": (3584, 18944)},
    "llama-70b": {"attention": (8192, 8192), "ffn-up": (28672, 8192), "ffn-down": (8192, 28672)},
    "resnet50-1x1": {"64->256": (256, 64), "1024->256": (256, 1024), "2048->512": (512, 2048)},
}
"""The matrix products of the inference sweep."""


def layer_set(name: str) -> list[tuple[int, ...]]:
    """The shapes of the sparse weights of "resnet50", "bert-large" or one layer of "llama-7b-ffn"."""
    if name == "resnet50":
        with torch.device("meta"):
            model = WORKLOADS["resnet50"].build()
        return [tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Conv2d) and m.in_channels > 3]
    if name == "bert-large":
        return [*[(1024, 1024)] * 24 * 4, *[(4096, 1024), (1024, 4096)] * 24]
    if name == "llama-7b-ffn":
        return [(11008, 4096), (11008, 4096), (4096, 11008)]
    raise SparsityError(f'unknown layer set "{name}"; known: resnet50, bert-large, llama-7b-ffn')


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments by which a command takes one of `WORKLOADS`, a model of torchvision's, or the user's own."""
    parser.add_argument(
        "model", help=f"{', '.join(WORKLOADS)}, a torchvision model, or your own as package.module:function"
    )
    parser.add_argument("--args", default="[]", help="that function's arguments as a JSON list or object")


def build_named(name: str, arguments: str) -> tuple[nn.Module, Workload | None]:
    """The model that `add_model_arguments` take; the workload, where it is one.

    Raises:
        SparsityError: if there is no such model, it cannot be built, or arguments are given for a workload.
    """
    given = user_model.parse_arguments(arguments)
    if ":" in name:
        return user_model.build(name, given), None
    setup = workload(name)
    if given:
        raise SparsityError(f'--args are those of your own package.module:function; "{name}" takes none')
    return setup.build(), setup
