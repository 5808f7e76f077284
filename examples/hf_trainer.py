"""Train a small 2:4 language model with Hugging Face's Trainer, and sample from it while it trains.

python examples/hf_trainer.py [OUT [STEPS]]            needs nm-sparsity[integrations]; a minute on a CPU
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from nm_sparsity import frozen, verify
from nm_sparsity.core.integrations.huggingface import NMSparsity

out, steps = sys.argv[1] if len(sys.argv) > 1 else "runs/llama", int(sys.argv[2]) if len(sys.argv) > 2 else 200

text = Path(argparse.__file__).read_bytes()  # some text to learn, byte by byte
data = [{"input_ids": (piece := torch.tensor(list(text[i : i + 64]))), "labels": piece} for i in range(0, 40_000, 64)]

torch.manual_seed(0)
shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=256, pad_token_id=0, bos_token_id=1, eos_token_id=2))


class Sample(TrainerCallback):  # type: ignore[misc]
    """Continues a prompt whenever the model is evaluated."""

    def on_evaluate(self, *_: Any, model: Any = None, **__: Any) -> None:
        prompt = torch.tensor([list(b"    def ")])
        with frozen(model):  # each masked weight is computed once, and not once a token; NMSparsity does so anyway
            tokens = model.generate(prompt, max_new_tokens=24, do_sample=False)
        print(repr(bytes(tokens[0].tolist()).decode(errors="replace")))


arguments = TrainingArguments(
    out,
    max_steps=steps,
    learning_rate=3e-3,
    lr_scheduler_type="cosine",
    eval_strategy="steps",
    eval_steps=max(1, steps // 2),
    save_steps=max(1, steps // 2),
    report_to=[],
    disable_tqdm=True,
)
sparsity = NMSparsity("2:4", method="sr-ste", decay=2e-4)  # lm_head stays dense, as the report says
trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data[:64], callbacks=[sparsity, Sample()])
print(sparsity.report)
trainer.train()  # resume_from_checkpoint=True goes on from the last checkpoint, bit for bit

trainer.save_model(f"{out}/final")  # finalized by now: plain weights with their zeros
print(verify(f"{out}/final", "2:4"))  # by the table in its config.json
