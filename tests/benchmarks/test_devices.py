"""The roofline against hand calculation, and the names of real GPUs."""

from __future__ import annotations

import pytest
import torch

from nm_sparsity.benchmarks import devices
from nm_sparsity.benchmarks.devices import DEVICES, Device, Product
from nm_sparsity.core import SparsityError

ROUND = Device("round", half_tflops=100.0, byte_tops=200.0, bandwidth=1.0, capability=(8, 0))


def test_a_big_product_is_compute_bound_and_gains_two() -> None:
    product = Product(4096, 4096, 4096)
    assert product.dense_seconds(ROUND) == pytest.approx(2 * 4096**3 / 100e12)
    assert product.bound(ROUND) == "compute"
    assert product.ceiling(ROUND) == 2.0


@pytest.mark.parametrize(("itemsize", "limit"), [(2, 16 / 9), (1, 1.6)])
def test_one_token_is_bound_by_the_weight_and_gains_its_compression(itemsize: int, limit: float) -> None:
    product = Product(1, 4096, 4096, itemsize)
    assert product.bound(ROUND) == "memory"
    dense = itemsize * (4096 * 4096 + 4096 + 4096) / 1e12
    assert product.dense_seconds(ROUND) == pytest.approx(dense)
    assert product.ceiling(ROUND) == pytest.approx(limit, rel=2e-3)


def test_a_convolution_reads_its_input_once() -> None:
    plain, conv = Product(10_000, 8, 576), Product(10_000, 8, 576, reuse=9)
    saved = 2 * 10_000 * (576 - 64) / 1e12
    assert plain.dense_seconds(ROUND) - conv.dense_seconds(ROUND) == pytest.approx(saved)


def test_ceilings_stay_between_one_and_two_and_need_sparse_tensor_cores() -> None:
    for device in DEVICES.values():
        for tokens in (1, 100, 10_000):
            for itemsize in (1, 2):
                product = Product(tokens, 1024, 1024, itemsize)
                if device.byte_tops is None and itemsize == 1:
                    with pytest.raises(SparsityError, match="v100 has no tensor cores for 8-bit operands"):
                        product.ceiling(device)
                else:
                    limit = 2.0 if device.sparse_tensor_cores else 1.0
                    assert 1.0 <= product.ceiling(device) <= limit


@pytest.mark.parametrize(
    ("marketing", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("NVIDIA GeForce RTX 3090", "rtx3090"),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 5090", "rtx5090"),
        ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_gpus_are_recognised(monkeypatch: pytest.MonkeyPatch, marketing: str, name: str | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: marketing)
    found = devices.present(torch.device("cuda"))
    assert (found.name if found else None) == name
    assert devices.present(torch.device("cpu")) is None


def test_an_unknown_device_lists_the_known() -> None:
    assert devices.find("H100").name == "h100"
    with pytest.raises(SparsityError, match=r'unknown device "tpu"; known: v100, a10, .* rtx5090'):
        devices.find("tpu")


def test_a_device_says_why_it_has_no_tensor_cores_for_a_dtype() -> None:
    reasons = {name: devices.find(name).why_not("fp8") for name in ("v100", "a100", "l4", "h100")}
    assert reasons == {
        "v100": "v100 has no tensor cores for fp8: they came with compute capability 8.9",
        "a100": "a100 has no tensor cores for fp8: they came with compute capability 8.9",
        "l4": "",
        "h100": "",
    }
    assert devices.find("v100").why_not("int8") == "v100 has no tensor cores for 8-bit operands"
    assert not devices.find("a100").why_not("int8")
