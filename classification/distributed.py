"""One process or many under torchrun: the few calls the loop needs, each of which does nothing in a single process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nm_sparsity.core import SparsityError


def rank() -> int:
    """This process's number, 0 when there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def processes(device: str) -> Iterator[torch.device]:
    """A block that joins torchrun's processes, if there are any; yields the device this process works on.

    Raises:
        SparsityError: for a device that is not there, or for more processes than GPUs.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise SparsityError(f'device must be auto, cpu or cuda, found "{device}"')
    if device == "cuda" and not torch.cuda.is_available():
        raise SparsityError("device is cuda, but torch sees no CUDA device; leave --device out to train on the CPU")
    cuda = device != "cpu" and torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda and local >= (there := torch.cuda.device_count()):
        raise SparsityError(
            f"process {local} of this machine finds no GPU: torch sees {there}; start as many, with torchrun's "
            f"--nproc-per-node {there}, or compute on the CPU with --device cpu"
        )
    here = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(here)
        torch.backends.cudnn.benchmark = True  # batches keep their shape
    joined = "TORCHELASTIC_RUN_ID" in os.environ and not dist.is_initialized()
    if joined:
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield here
    finally:
        if joined:
            dist.destroy_process_group()


def total(values: Tensor) -> Tensor:
    """The sum of `values` over all processes, in place."""
    if world() > 1:
        dist.all_reduce(values)
    return values


def average_buffers(model: nn.Module) -> None:
    """Give every process the mean of the floating-point buffers: batch norm last saw its own images only."""
    if world() > 1:
        for buffer in model.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= world()


def gather(value: Any) -> list[Any]:
    """`value` of every process, by rank."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values
