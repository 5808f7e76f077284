"""LoRA adapters of PEFT over a sparse base model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainingArguments
from transformers_models import gpt2, llama, words

from nm_sparsity.core import SparsityError, finalize, nm_mask, sparsify, verify
from nm_sparsity.core.integrations.huggingface import NMSparsity, heads

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

TARGETS = {"llama": (llama, ["q_proj", "down_proj"], 1), "gpt2": (gpt2, ["c_attn"], 0)}
"""Model, adapted layers, reduction dimension of their weights."""


def adapted(build: Any, targets: list[str], method: str = "sr-ste") -> tuple[Any, Any]:
    """A sparse base model, and adapters over it."""
    torch.manual_seed(0)
    base = build()
    sparsify(base, "2:4", method=method, exclude=heads(base))
    config = LoraConfig(r=4, target_modules=targets, fan_in_fan_out=build is gpt2)
    return base, get_peft_model(base, config)


def train(model: Any, batch: dict[str, Tensor], steps: int = 20) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("family", TARGETS)
def test_an_adapter_trains_merges_into_the_shadow_weight_and_is_masked_again(family: str) -> None:
    build, targets, dim = TARGETS[family]
    base, model = adapted(build, targets)
    before = {name: w.clone() for name, w in base.state_dict().items() if "lora" not in name}
    batch = {key: value[None] for key, value in words(0).items()}
    losses = train(model, batch)
    assert losses[-1] < losses[0] - 0.1
    for name, w in base.state_dict().items():
        assert "lora" in name or torch.equal(w, before[name]), f"the base changed at {name}"

    expected = {}
    for name, module in base.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        delta = module.scaling["default"] * module.lora_B["default"].weight @ module.lora_A["default"].weight
        expected[f"{name}.weight"] = before[f"{name}.base_layer.weight"] + (delta if dim else delta.T)
    merged = model.merge_and_unload()
    assert len(expected) == 2 * len(targets)
    for name, w in expected.items():
        torch.testing.assert_close(merged.state_dict()[name], w.detach(), msg=name)

    shadow = copy.deepcopy(merged.state_dict())
    finalize(merged)
    verify(merged, "2:4")
    for name in expected:
        mask = nm_mask(shadow[name].movedim(dim, 1), "2:4").movedim(1, dim)
        assert torch.equal(merged.state_dict()[name], shadow[name] * mask)
    assert merged(**batch).loss.item() < losses[0]


def test_merging_can_be_undone() -> None:
    _, model = adapted(llama, ["q_proj"])
    batch = {key: value[None] for key, value in words(0).items()}
    train(model, batch, 3)
    before = model(**batch).loss
    model.merge_adapter()
    assert not torch.equal(model(**batch).loss, before)  # masked again
    model.unmerge_adapter()
    torch.testing.assert_close(model(**batch).loss, before)
    with model.disable_adapter():
        expected = model(**batch).loss
    torch.testing.assert_close(model.unload()(**batch).loss, expected)


def test_the_trainer_trains_adapters_without_the_callback(tmp_path: Path) -> None:
    _, model = adapted(llama, ["q_proj"])
    arguments = TrainingArguments(str(tmp_path), max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True)
    data = [words(i) for i in range(8)]
    Trainer(model=model, args=arguments, train_dataset=data).train()
    merged = model.merge_and_unload()
    finalize(merged)
    verify(merged, "2:4")
    _, model = adapted(llama, ["q_proj"])
    with pytest.raises(SparsityError, match="has adapters"):
        Trainer(model=model, args=arguments, train_dataset=data, callbacks=[NMSparsity()])
