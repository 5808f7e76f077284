"""Fine-tune a 2:4 language model with a LoRA adapter, merge it, and get a 2:4 model back.

python examples/lora.py [OUT]                          needs nm-sparsity[integrations]; seconds on a CPU
"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from nm_sparsity import finalize, sparsify, verify

out = sys.argv[1] if len(sys.argv) > 1 else "runs/lora"

torch.manual_seed(0)
shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=256))  # or .from_pretrained(a folder of 2:4 weights)
tokens = torch.randint(256, (8, 32))

# Sparse first, adapters after: sparsify would take the adapters' matrices for layers of the model.
sparsify(model, "2:4", method="ste", exclude=["lm_head"])
adapted = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"]))
optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)


def loss() -> torch.Tensor:
    return adapted(input_ids=tokens, labels=tokens).loss


print(f"loss before:               {loss():.3f}")
for _ in range(40):
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()
print(f"with the adapter:          {loss():.3f}")

# The adapter is dense: merged and masked again, the weight keeps the largest entries of their sum. What that costs can
# be trained back, with the adapter gone.
adapted = adapted.merge_and_unload()
print(f"merged and masked again:   {loss():.3f}")
adapted.requires_grad_(True)
optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-3)
for _ in range(10):
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()
print(f"after ten steps of all:    {loss():.3f}")

finalize(adapted)
print(verify(adapted, "2:4"))
adapted.save_pretrained(out)
