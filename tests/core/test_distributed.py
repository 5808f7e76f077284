"""DDP, ZeRO and FSDP2 on two gloo ranks equal one process; what cannot work says so."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    worker = Path(__file__).with_name("distributed_worker.py")
    run = subprocess.run(
        [*command, str(worker)], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULTS ")]
    assert lines, run.stderr[-3000:]
    parsed: dict[str, Any] = json.loads(lines[0].removeprefix("RESULTS "))
    return parsed


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize(
    ("method", "optimizer"),
    [*product(["sr-ste", "asp", "s-ste", "decaying"], ["sgd", "adamw"]), ("step", "adamw")],
)
def test_two_ranks_train_what_one_process_trains(
    results: dict[str, Any], engine: str, method: str, optimizer: str
) -> None:
    assert results[f"{engine} {method} {optimizer}"] < 1e-12
    assert results[f"moved {method} {optimizer}"] > 1e-2, "nothing was trained: the comparison would show nothing"
    assert (results[f"flips {method} {optimizer}"] > 0) == (method != "asp")


def test_zero_redundancy_optimizer_fires_twice_and_decays_once(results: dict[str, Any]) -> None:
    assert results["zero sr-ste adamw"] < 1e-12


def test_sharded_models_resume_and_gather_bit_for_bit(results: dict[str, Any]) -> None:
    assert results["fsdp2 resume"] == 0
    assert results["fsdp2 to one process"] == 0
    assert results["split is what finalize writes"] is True
    assert results["asp masks are whole"] is True
    assert results["asp resume sharded"] < 1e-12
    assert results["asp resume in one process"] < 1e-12
    assert results["asp resume through dcp"] == 0


def test_each_unit_of_fsdp2_is_one_launch(results: dict[str, Any]) -> None:
    assert results["fsdp2 launches"] == [2, 2, 2]


def test_what_an_optimizer_holds_under_fsdp2_is_looked_up_once(results: dict[str, Any]) -> None:
    assert results["fsdp2 batches"] == 1


def test_masks_are_tracked_on_local_rows(results: dict[str, Any]) -> None:
    flips, weights = results["fsdp2 tracker"]
    # The 6-input layer stays dense; the others are counted once over both ranks.
    assert weights == 16 * 6 + 8 * 3
    assert 0 < flips < weights


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("sparsify after fully_shard", "SparsityError: the model was sparsified before"),
        ("sparsify of a sharded dense model", "call sparsify first, then wrap"),
        ("finalize while sharded", "gather a full state dict first"),
        ("transposed convolution", "exclude transposed convolutions"),
        ("tensor parallel", "not tensor parallelism; exclude this layer"),
        ("column shards", "across its groups"),
    ],
)
def test_what_cannot_work_says_so(results: dict[str, Any], case: str, expected: str) -> None:
    assert expected in results[case]
