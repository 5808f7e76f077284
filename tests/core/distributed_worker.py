"""Two gloo ranks train what one process trains; prints one JSON line a scenario. Run by test_distributed.py."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from nm_sparsity.core import MaskTracker, SparsityError, SparsityState, finalize, sparsify
from nm_sparsity.core.files import checkpoint
from nm_sparsity.core.masks.batched import Batch
from nm_sparsity.core.training import hooks

STEPS = 5


def make() -> nn.Module:
    torch.manual_seed(0)
    # 6 rows on 2 ranks, then 3: even and uneven shards.
    return nn.Sequential(nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batch(step: int) -> Tensor:
    return torch.randn(8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rows: slice = slice(None)) -> None:
    for step in range(STEPS):
        optimizer.zero_grad()
        model(batch(step)[rows]).square().mean().backward()
        optimizer.step()


def whole(model: nn.Module) -> Tensor:
    parameters = (p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters())
    return torch.cat([p.detach().flatten() for p in parameters])


def message(action: Callable[[], Any]) -> str:
    try:
        action()
    except (SparsityError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mine = slice(4 * rank, 4 * rank + 4)
    results: dict[str, Any] = {}

    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.2, momentum=0.9)

    def adamw(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=0.02)

    variants: dict[str, dict[str, Any]] = {
        "sr-ste": {"method": "sr-ste", "decay": 0.5},
        "asp": {"method": "asp"},
        "s-ste": {"method": "s-ste"},
        "decaying": {"method": "decaying", "total_steps": STEPS},
        "step": {"method": "ste", "precondition": "auto", "total_steps": STEPS},
    }
    for method, options in variants.items():
        for name, optimizer in (("sgd", sgd), ("adamw", adamw))[method == "step" :]:
            single = make()
            sparsify(single, "2:4", **options)
            start, tracker = whole(single), MaskTracker(single)
            train(single, optimizer(single.parameters()))
            results[f"moved {method} {name}"] = float((whole(single) - start).abs().max())
            results[f"flips {method} {name}"] = tracker.update().total_sad

            parallel = DistributedDataParallel(make())
            sparsify(parallel, "2:4", **options)
            train(parallel, optimizer(parallel.parameters()), mine)
            results[f"ddp {method} {name}"] = float((whole(parallel) - whole(single)).abs().max())

            sharded = make()
            sparsify(sharded, "2:4", **options)
            for layer in (sharded[0], sharded[2]):
                fully_shard(layer)
            fully_shard(sharded)
            train(sharded, optimizer(sharded.parameters()), mine)
            results[f"fsdp2 {method} {name}"] = float((whole(sharded) - whole(single)).abs().max())

    single = make()
    sparsify(single, "2:4", decay=0.5)
    train(single, adamw(single.parameters()))
    from torch.distributed.optim import ZeroRedundancyOptimizer

    # Gradients that are views of one bucket share a version counter.
    zero = DistributedDataParallel(make(), gradient_as_bucket_view=True)
    sparsify(zero, "2:4", decay=0.5)
    train(zero, ZeroRedundancyOptimizer(zero.parameters(), torch.optim.AdamW, lr=0.02), mine)
    results["zero sr-ste adamw"] = float((whole(zero) - whole(single)).abs().max())

    # Sharded training is saved whole, sparse as it stands, and resumes bit for bit.
    sharded = make()
    sparsify(sharded, "2:4", decay=0.5)
    fully_shard(sharded)
    train(sharded, sgd(sharded.parameters()), mine)
    state, metadata = checkpoint.split(sharded)
    resumed = make()
    sparsify(resumed, "2:4", decay=0.5)
    plain = copy.deepcopy(resumed)
    fully_shard(resumed)
    checkpoint.restore(resumed, state, metadata)
    checkpoint.restore(plain, state, metadata)
    results["fsdp2 resume"] = float((whole(resumed) - whole(sharded)).abs().max())
    results["fsdp2 to one process"] = float((whole(plain) - whole(sharded)).abs().max())
    with warnings.catch_warnings(action="ignore"):
        finalize(plain)
    results["split is what finalize writes"] = all(torch.equal(state[k], v) for k, v in plain.state_dict().items())

    # ASP's masks are gathered too: one process goes on from them, and so does another sharding.
    fixed = make()
    sparsify(fixed, "2:4", method="asp")
    fully_shard(fixed)
    train(fixed, sgd(fixed.parameters()), mine)
    state, metadata = checkpoint.split(fixed)
    results["asp masks are whole"] = all(
        memory["state"]["mask"].shape == state[name].shape for name, memory in metadata["state"].items()
    )
    again, alone = make(), make()
    for net in (again, alone):
        sparsify(net, "2:4", method="asp")
    fully_shard(again[0])
    fully_shard(again)
    for net in (again, alone):
        checkpoint.restore(net, state, metadata)
    train(again, sgd(again.parameters()), mine)
    train(alone, sgd(alone.parameters()))
    train(fixed, sgd(fixed.parameters()), mine)
    results["asp resume sharded"] = float((whole(again) - whole(fixed)).abs().max())
    results["asp resume in one process"] = float((whole(alone) - whole(fixed)).abs().max())

    # The same through torch.distributed.checkpoint, with the state as an entry of its own, once with zeros among the
    # kept weights, which tell nothing of the mask.
    optimizer = sgd(fixed.parameters())
    train(fixed, optimizer, mine)
    folder = [tempfile.mkdtemp() if rank == 0 else ""]
    dist.broadcast_object_list(folder)

    def entries(net: nn.Module, its_optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        model_state, optimizer_state = get_state_dict(net, its_optimizer)
        return {"model": model_state, "optimizer": optimizer_state, "sparsity": SparsityState(net)}

    with torch.no_grad():
        fixed[0].get_parameter("weight").to_local()[:, -4:].zero_()
    dcp.save(entries(fixed, optimizer), checkpoint_id=folder[0])
    resumed = make()
    sparsify(resumed, "2:4", method="asp")
    fully_shard(resumed)
    its_optimizer = sgd(resumed.parameters())
    loaded = entries(resumed, its_optimizer)
    dcp.load(loaded, checkpoint_id=folder[0])
    set_state_dict(resumed, its_optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    for net, stepped in ((fixed, optimizer), (resumed, its_optimizer)):
        train(net, stepped, mine)
    results["asp resume through dcp"] = float((whole(resumed) - whole(fixed)).abs().max())
    if rank == 0:
        shutil.rmtree(folder[0])

    tracker = MaskTracker(sharded)
    train(sharded, sgd(sharded.parameters()), mine)
    flips = tracker.update()
    counts = torch.tensor([flips.total_sad, sum(flips.sizes.values())])
    dist.all_reduce(counts)
    results["fsdp2 tracker"] = counts.tolist()

    # Each unit is a launch of its own when it is gathered, and its values go with it.
    units = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(3)])
    sparsify(units, "2:4")
    for unit in units:
        fully_shard(unit)
    fully_shard(units)
    launches, original = [], Batch.keep_largest
    Batch.keep_largest = lambda self, dtype=None: (launches.append(len(self.weights)), original(self, dtype))[1]
    units(torch.ones(2, 8)).sum().backward()
    Batch.keep_largest = original
    results["fsdp2 launches"] = launches

    optimizer = torch.optim.SGD(units.parameters(), lr=0.1)
    batches = []
    for _ in range(3):
        units(torch.ones(2, 8)).sum().backward()
        optimizer.step()
        batches.append(hooks.batches(optimizer)[0])
    results["fsdp2 batches"] = len(set(map(id, batches)))

    results["sparsify after fully_shard"] = message(lambda: sparsify(sharded))
    unsparsified = make()
    fully_shard(unsparsified)
    results["sparsify of a sharded dense model"] = message(lambda: sparsify(unsparsified))
    results["finalize while sharded"] = message(lambda: finalize(sharded))
    transposed = nn.Sequential(nn.ConvTranspose2d(8, 8, 1))
    sparsify(transposed)
    fully_shard(transposed)

    def step_transposed() -> None:
        transposed(torch.ones(1, 8, 2, 2)).sum().backward()
        torch.optim.SGD(transposed.parameters(), lr=0.1).step()

    results["transposed convolution"] = message(step_transposed)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    parallel_linear = nn.Sequential(nn.Linear(8, 8))
    sparsify(parallel_linear)
    weight = distribute_tensor(parallel_linear[0]._parameters["weight"].detach(), mesh, [Shard(1)])
    parallel_linear[0]._parameters["weight"] = nn.Parameter(weight)
    results["tensor parallel"] = message(lambda: parallel_linear(torch.zeros(1, 8)))
    columns = nn.Linear(8, 8)
    sparsify(columns)
    columns._parameters["weight"] = nn.Parameter(distribute_tensor(torch.randn(8, 8), mesh, [Shard(1)]))
    columns._parameters["weight"].grad = distribute_tensor(torch.zeros(8, 8), mesh, [Shard(1)])
    results["column shards"] = message(torch.optim.SGD(columns.parameters(), lr=0.1).step)

    if rank == 0:
        print("RESULTS " + json.dumps(results), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
