"""Tiny models of Transformers with random weights, by family, each with a batch for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

WIDTH = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {"vocab_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def llama(**changes: Any) -> Any:
    return LlamaForCausalLM(LlamaConfig(**WIDTH, **TEXT, **changes))


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, **TEXT))


def bert() -> Any:
    return BertForSequenceClassification(BertConfig(**WIDTH, **TEXT, max_position_embeddings=32))


def t5() -> Any:
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    text = {"vocab_size": 48, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(**shape, **text, tie_word_embeddings=False))


def vit() -> Any:
    return ViTForImageClassification(ViTConfig(**WIDTH, image_size=16, patch_size=8))


def words(i: int) -> dict[str, Any]:
    tokens = torch.randint(3, 48, (8,), generator=torch.Generator().manual_seed(i))
    return {"input_ids": tokens, "labels": tokens}


def classes(i: int) -> dict[str, Any]:
    return {"input_ids": words(i)["input_ids"], "labels": torch.tensor(i % 2)}


def images(i: int) -> dict[str, Any]:
    pixels = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(i))
    return {"pixel_values": pixels, "labels": torch.tensor(i % 2)}


FAMILIES: dict[str, tuple[Callable[[], Any], Callable[[int], dict[str, Any]], int, str]] = {
    # family: (model, sample, weights that become sparse, what stays dense as a head)
    "llama": (llama, words, 2 * 7, "lm_head"),
    "gpt2": (gpt2, words, 2 * 4, "lm_head"),
    "bert": (bert, classes, 2 * 6 + 1, "classifier"),
    "t5": (t5, words, 6 + 10, "lm_head"),
    "vit": (vit, images, 2 * 6, "classifier"),
}
