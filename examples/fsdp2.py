"""Train a 2:4 sparse model under FSDP2 and gather a checkpoint that is sparse as it stands.

torchrun --nproc-per-node 2 examples/fsdp2.py        on GPUs, or on CPU cores by gloo
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from nm_sparsity import sparsify, verify
from nm_sparsity.core.files.checkpoint import split


def build() -> nn.Sequential:
    """A small feed-forward block."""
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))


gpu = torch.cuda.is_available()
dist.init_process_group("nccl" if gpu else "gloo")
rank, world = dist.get_rank(), dist.get_world_size()
device = torch.device("cuda", rank % torch.cuda.device_count()) if gpu else torch.device("cpu")

torch.manual_seed(0)  # the same weights on every rank
model = build().to(device)
sparsify(model, "2:4", decay=0.5)  # first sparsify, then shard: rows are sharded, and groups lie within rows
for layer in model:
    if isinstance(layer, nn.Linear):
        fully_shard(layer)
fully_shard(model)

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
torch.manual_seed(rank)  # other data on every rank
for step in range(20):
    optimizer.zero_grad()
    x = torch.randn(8, 64, device=device)
    loss = (model(x) - x).square().mean()
    loss.backward()
    optimizer.step()
    if rank == 0 and step % 5 == 0:
        print(f"step {step}: loss {loss.item():.3f} on rank 0 of {world}")

weights, metadata = split(model)  # on every rank, since it gathers; the weights carry dense names
if rank == 0:
    whole = build()
    whole.load_state_dict(weights)
    print(verify(whole, "2:4"))
dist.destroy_process_group()
