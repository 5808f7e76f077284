"""The benchmark models have the sizes that their names promise."""

from __future__ import annotations

import math

import pytest
import torch

from nm_sparsity.benchmarks import models
from nm_sparsity.benchmarks.llama import Llama, _rotated
from nm_sparsity.core import SparsityError


@pytest.mark.parametrize(
    ("name", "millions", "output"),
    [
        ("bert-large", 334, (2, 384, 1024)),
        ("vit-l", 304, (2, 1000)),
        ("resnet50", 25.6, (2, 1000)),
        ("resnet18-cifar", 11.7, (2, 1000)),
        ("transformer-base", 61, (2, 64, 32_000)),
        ("language-model", 27, (2, 512, 8192)),
        ("llama-prefill", 1003, (2, 4096, 4096)),
        ("llama-decode", 1003, (2, 1, 4096)),
    ],
)
def test_sizes(name: str, millions: float, output: tuple[int, ...]) -> None:
    setup = models.workload(name)
    with torch.device("meta"):
        model = setup.build()
        result = model(setup.inputs(2, "meta"))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)
    assert tuple(result.shape) == output


def test_attention_is_causal_where_it_should_be() -> None:
    model = models.TextEncoder(1, 16, 2, 32, 10, head=True).eval()
    tokens = torch.randint(10, (1, 6))
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 10
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])


def test_llama_reads_a_prompt_and_goes_on_from_its_cache() -> None:
    """The last token of a prompt: in one pass, and from what the attention keeps of the tokens before."""
    torch.manual_seed(0)
    prefill = Llama(1, 32, 4, 2, 64)
    decode = Llama(1, 32, 4, 2, 64, cache=5)
    decode.load_state_dict(prefill.state_dict(), strict=False)
    tokens = torch.randint(100, (1, 6))
    block = prefill.layers[0]
    with torch.no_grad():
        h = block.norm1(prefill.embedding(tokens[:, :5]))
        k, v = (
            layer(h).unflatten(-1, (-1, 8)).transpose(1, 2) for layer in (block.attention.key, block.attention.value)
        )
        decode.layers[0].attention.past = torch.stack([_rotated(k, 0), v])
        torch.testing.assert_close(decode(tokens[:, 5:]), prefill(tokens)[:, 5:])


def test_layer_sets() -> None:
    sizes = {name: sum(math.prod(s) for s in models.layer_set(name)) for name in ("resnet50", "bert-large")}
    assert sizes["resnet50"] == 23_445_504  # ResNet-50's convolutions without the 3-channel stem
    assert sizes["bert-large"] == 24 * 12 * 1024**2


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(SparsityError, match='unknown model "alexnot"; known: bert-large, vit-l'):
        models.workload("alexnot")
    with pytest.raises(SparsityError, match='unknown layer set "x"'):
        models.layer_set("x")
