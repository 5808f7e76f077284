"""What a device can do at best, and the speed-up that a 2:4 matrix product can have on it at most.

The roofline (Williams et al., CACM 2009): a product takes at least its FLOPs over the peak, and its bytes over the
memory bandwidth. 2:4 doubles the peak and shrinks the weight's bytes; it shrinks neither input nor output.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from nm_sparsity.core import SparsityError

DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
"""The operand types of the products."""


@dataclass(frozen=True)
class Device:
    """Data-sheet figures without sparsity: dense tensor-core TFLOP/s at 16 and 8 bits, memory in TB/s."""

    name: str
    half_tflops: float
    byte_tops: float | None
    bandwidth: float
    capability: tuple[int, int]

    def __str__(self) -> str:
        peak = f"{self.half_tflops:g} TFLOP/s dense at 16 bits"
        peak += f" ({2 * self.half_tflops:g} at 2:4)" if self.sparse_tensor_cores else ""
        return f"{self.name}: {peak}, {self.bandwidth:g} TB/s, as published"

    @property
    def sparse_tensor_cores(self) -> bool:
        """Whether the hardware has a 2:4 path: from Ampere on."""
        return self.capability >= (8, 0)

    def check(self, dtype: str) -> None:
        """Check that the device has tensor cores for `dtype`, one of `DTYPES`.

        Raises:
            SparsityError: if the type is unknown, or the device has no tensor cores for it.
        """
        if dtype not in DTYPES:
            raise SparsityError(f'unknown dtype "{dtype}"; known: {", ".join(DTYPES)}')
        if dtype == "fp8" and self.capability < FP8_CAPABILITY:
            raise SparsityError(f"{self.name} has no tensor cores for fp8: they came with compute capability 8.9")
        self.peak(DTYPES[dtype].itemsize)

    def why_not(self, dtype: str) -> str:
        """What `check` says against `dtype`; empty if nothing."""
        try:
            self.check(dtype)
        except SparsityError as error:
            return str(error)
        return ""

    def peak(self, itemsize: int) -> float:
        """Dense FLOP/s for operands of `itemsize` bytes."""
        tflops = self.half_tflops if itemsize == 2 else self.byte_tops
        if tflops is None:
            raise SparsityError(f"{self.name} has no tensor cores for {8 * itemsize}-bit operands")
        return tflops * 1e12


FP8_CAPABILITY = (8, 9)

# As NVIDIA publishes them in data sheets and architecture papers, the figure "without sparsity" (with it, twice that);
# SXM parts unless the name says otherwise. GeForce: with 32-bit accumulation, as torch multiplies; at 8 bits, int8.
DEVICES = {
    device.name: device
    for device in (
        Device("v100", 125.0, None, 0.9, (7, 0)),
        Device("a10", 125.0, 250.0, 0.6, (8, 6)),
        Device("rtx3090", 71.0, 284.0, 0.936, (8, 6)),
        Device("a6000", 154.8, 309.7, 0.768, (8, 6)),
        Device("a30", 165.0, 330.0, 0.933, (8, 0)),
        Device("a100-40gb", 312.0, 624.0, 1.555, (8, 0)),
        Device("a100", 312.0, 624.0, 2.039, (8, 0)),
        Device("rtx4090", 165.2, 660.6, 1.008, (8, 9)),
        Device("l4", 121.0, 242.5, 0.3, (8, 9)),
        Device("l40s", 362.0, 733.0, 0.864, (8, 9)),
        Device("h100-pcie", 756.0, 1513.0, 2.0, (9, 0)),
        Device("h100-nvl", 835.5, 1671.0, 3.9, (9, 0)),
        Device("h100", 989.4, 1978.9, 3.35, (9, 0)),
        Device("gh200", 989.4, 1978.9, 4.0, (9, 0)),
        Device("h200", 989.4, 1978.9, 4.8, (9, 0)),
        Device("b200", 2250.0, 4500.0, 8.0, (10, 0)),
        Device("rtx5090", 209.5, 838.0, 1.792, (12, 0)),
    )
}

_NAMES = (  # (in torch.cuda.get_device_name, our name); the first match counts
    (r"V100", "v100"),
    (r"A100.*40GB", "a100-40gb"),
    (r"A100", "a100"),
    (r"A10\b", "a10"),
    (r"A30\b", "a30"),
    (r"RTX 3090$", "rtx3090"),
    (r"RTX 4090$", "rtx4090"),
    (r"RTX 5090$", "rtx5090"),
    (r"RTX A6000", "a6000"),
    (r"L40S", "l40s"),
    (r"L4\b", "l4"),
    (r"H100.*PCIe", "h100-pcie"),
    (r"H100 NVL", "h100-nvl"),
    (r"GH200", "gh200"),
    (r"H100", "h100"),
    (r"H200", "h200"),
    (r"B200", "b200"),
)

COMPRESSED = {2: 9 / 16, 1: 5 / 8}
"""Bytes of a compressed 2:4 weight over the dense one's, by bytes per entry: half the values, and 2 bits for each."""


def find(name: str) -> Device:
    """The device called `name`.

    Raises:
        SparsityError: listing the known ones.
    """
    if name.lower() not in DEVICES:
        raise SparsityError(f'unknown device "{name}"; known: {", ".join(DEVICES)}')
    return DEVICES[name.lower()]


def present(device: torch.device) -> Device | None:
    """The data sheet of a device of this machine, if it is a GPU that `DEVICES` knows."""
    return recognise(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def recognise(marketing_name: str) -> Device | None:
    """The device with this name of torch's, such as "NVIDIA H100 PCIe", if `DEVICES` knows it."""
    return next((DEVICES[name] for regex, name in _NAMES if re.search(regex, marketing_name)), None)


@dataclass(frozen=True)
class Product:
    """``Y[tokens, rows] = X[tokens, columns] @ W[rows, columns].T``, W the sparse operand.

    `reuse` is how often an input entry enters the product, of a convolution as an implicit GEMM: (kernel / stride)^2,
    over the number of conv groups.
    """

    tokens: int
    rows: int
    columns: int
    itemsize: int = 2
    reuse: float = 1.0

    @property
    def flops(self) -> int:
        """FLOPs of the dense product."""
        return 2 * self.tokens * self.rows * self.columns

    @property
    def weight_bytes(self) -> int:
        """Bytes of the dense weight."""
        return self.itemsize * self.rows * self.columns

    def _seconds(self, device: Device, flops: float, weight_bytes: float) -> float:
        other = self.itemsize * self.tokens * (self.columns / self.reuse + self.rows)
        return max(flops / device.peak(self.itemsize), (other + weight_bytes) / (device.bandwidth * 1e12))

    def dense_seconds(self, device: Device) -> float:
        """The least time the dense product can take."""
        return self._seconds(device, self.flops, self.weight_bytes)

    def sparse_seconds(self, device: Device) -> float:
        """The least time the 2:4 product can take; the dense one's where the hardware has no 2:4 path."""
        if not device.sparse_tensor_cores:
            return self.dense_seconds(device)
        return self._seconds(device, self.flops / 2, self.weight_bytes * COMPRESSED[self.itemsize])

    def ceiling(self, device: Device) -> float:
        """The most that 2:4 can speed the product up."""
        return self.dense_seconds(device) / self.sparse_seconds(device)

    def bound(self, device: Device) -> str:
        """What limits the dense product: "compute" or "memory"."""
        return "compute" if self.flops / device.peak(self.itemsize) >= self.dense_seconds(device) else "memory"
