"""Write a finalized model as a packed file and as ONNX, and compress it for a GPU where there is one.

python examples/export.py OUT        needs nm-sparsity[export]
"""

import sys
from pathlib import Path

import torch
from torch import nn

from nm_sparsity import finalize, sparsify
from nm_sparsity.core.deploy.convert import to_semi_structured
from nm_sparsity.core.deploy.onnx import to_onnx
from nm_sparsity.core.files.packed import load_packed, save_packed

out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/export")
out.mkdir(parents=True, exist_ok=True)

model = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512)).eval()
sparsify(model, "2:4", method="asp")  # stands for a trained model
finalize(model)

packed = save_packed(out / "model.safetensors", model)
dense_bytes = sum(t.nbytes for t in model.state_dict().values())
print(f"packed: {packed.stat().st_size / dense_bytes:.3f} of {dense_bytes:,} bytes")
for name, tensor in load_packed(packed).items():
    assert torch.equal(tensor, model.state_dict()[name])

print(f"ONNX: {to_onnx(model, (torch.randn(8, 512),), out / 'model.onnx')}")

if torch.cuda.is_available():
    example = torch.randn(4096, 512, dtype=torch.bfloat16, device="cuda")
    print(to_semi_structured(model.bfloat16().cuda(), example))  # what gains
else:
    print("no GPU here: to_semi_structured(model.bfloat16().cuda(), example) would run it on sparse Tensor Cores")
