"""`NMSparsity` in Lightning's Trainer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nm_sparsity.core import CheckpointError, SparsityError, sparsity_state, verify
from nm_sparsity.core.files.io import load
from nm_sparsity.core.files.metadata import METADATA, Metadata
from nm_sparsity.core.integrations.lightning import NMSparsity

WARNINGS = [
    r"ignore:.*does not have many workers",
    r"ignore:The number of training batches",
    r"ignore:GPU available but not used",
    r"ignore:.*isinstance.treespec, LeafSpec",
    r"ignore:The dirpath has changed",
]
pytestmark = [pytest.mark.filterwarnings(warning) for warning in WARNINGS]


class Classifier(L.LightningModule):  # type: ignore[misc]
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 4))

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return self.net(batch).square().mean()

    def validation_step(self, batch: Tensor, _: int) -> None:
        self.log("score", self.net(batch).square().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class BuiltLate(Classifier):
    def __init__(self) -> None:
        super().__init__()
        del self.net

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def sparsity(**options: Any) -> NMSparsity:
    return NMSparsity("2:4", **{"decay": 5.0, "exclude": ["net.2"], "interval": 1, **options})


def data() -> DataLoader[Tensor]:
    return DataLoader(torch.randn(32, 16, generator=torch.Generator().manual_seed(0)), batch_size=8)  # type: ignore[arg-type]


def fit(
    model: L.LightningModule, folder: Path, *callbacks: L.Callback, resume: Path | None = None, **options: Any
) -> Any:
    """Two epochs of four steps, with a checkpoint after each."""
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, **options.pop("keep", {}))
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_epochs=2, callbacks=[*callbacks, keep], **{**quiet, **options})
    trainer.fit(model, data(), data(), ckpt_path=resume)
    return trainer


def seeded(build: Any = Classifier) -> Any:
    torch.manual_seed(0)
    return build()


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    for (name, a), (_, b) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def is_2to4(w: Tensor) -> bool:
    return bool((w.reshape(-1, 4).count_nonzero(dim=1) <= 2).all())


@pytest.mark.parametrize("keep", [{}, {"save_weights_only": True}], ids=["whole", "weights only"])
def test_checkpoints_are_sparse_and_load_anywhere(keep: dict[str, Any], tmp_path: Path) -> None:
    model, callback = seeded(), sparsity()
    log = CSVLogger(tmp_path, name="log")
    trainer = fit(model, tmp_path / "saved", callback, keep=keep, logger=log, log_every_n_steps=1)
    assert callback.report is not None
    assert [w.name for w in callback.report.sparse] == ["net.0.weight"]
    verify(model, "2:4")
    assert is_2to4(model.net[0].weight)
    for path in (tmp_path / "saved" / "epoch=0.ckpt", tmp_path / "saved" / "epoch=1.ckpt"):
        assert is_2to4(load(path)["state_dict"]["net.0.weight"])
        assert str(verify(path, "2:4")).endswith("1 weights checked, 0 violate their pattern")
    assert_equal(Classifier.load_from_checkpoint(tmp_path / "saved" / "epoch=1.ckpt"), model)
    logged = (tmp_path / "log" / "version_0" / "metrics.csv").read_text()
    assert {"sad", "flip_rate", "decay_strength"} <= set(logged.splitlines()[0].split(","))
    # A dense module scores with the file what the sparse one scored.
    score = trainer.callback_metrics["score"]
    (again,) = trainer.validate(Classifier(), data(), ckpt_path=tmp_path / "saved" / "epoch=1.ckpt", verbose=False)
    assert again["score"] == pytest.approx(float(score), rel=1e-6)


@pytest.mark.parametrize("method", ["sr-ste", "asp", "s-ste", "decaying"])
@pytest.mark.parametrize("build", [Classifier, BuiltLate])
def test_a_resumed_run_ends_with_the_same_bits(method: str, build: Any, tmp_path: Path) -> None:
    options = {"method": method, "decay": "linear(0, 5)" if method == "sr-ste" else None}
    straight, resumed = seeded(build), build()
    fit(straight, tmp_path / "once", sparsity(**options))
    fit(resumed, tmp_path / "twice", sparsity(**options), resume=tmp_path / "once" / "epoch=0.ckpt")
    assert_equal(straight, resumed)


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_weight_averaging(first: bool, tmp_path: Path) -> None:
    def callbacks() -> list[L.Callback]:
        both = [sparsity(), EMAWeightAveraging(decay=0.5)]
        return both if first else both[::-1]

    straight, resumed = seeded(), Classifier()
    fit(straight, tmp_path / "once", *callbacks())
    verify(straight, "2:4")
    assert is_2to4(load(tmp_path / "once" / "epoch=0.ckpt")["state_dict"]["net.0.weight"])
    fit(resumed, tmp_path / "twice", *callbacks(), resume=tmp_path / "once" / "epoch=0.ckpt")
    assert_equal(straight, resumed)


def test_schedules_know_the_length_of_the_run(tmp_path: Path) -> None:
    fit(seeded(), tmp_path, sparsity(method="decaying", decay=None), accumulate_grad_batches=2)
    assert load(tmp_path / "epoch=0.ckpt")[METADATA]["hyperparameters"]["total_steps"] == 4
    fading = Metadata.from_dict(load(tmp_path / "epoch=0.ckpt")[METADATA])
    assert fading.state["net.0.weight"]["steps"] == 2


def test_accumulation_counts_optimizer_steps(tmp_path: Path) -> None:
    model, callback = seeded(), sparsity(interval=2)
    trainer = fit(model, tmp_path / "saved", callback, accumulate_grad_batches=2, logger=CSVLogger(tmp_path))
    assert trainer.global_step == 4
    assert float(trainer.callback_metrics["decay_strength"]) == pytest.approx(5.0 * 4 * 1e-2)


def test_bf16(tmp_path: Path) -> None:
    model = seeded()
    fit(model, tmp_path, sparsity(), precision="bf16-mixed")
    verify(model, "2:4")


class Interrupted(L.Callback):  # type: ignore[misc]
    def on_train_batch_end(self, *_: Any) -> None:
        raise InterruptedError


def test_the_dense_baseline_trains_by_the_same_callback(tmp_path: Path) -> None:
    model, other, callback = seeded(), seeded(), NMSparsity(method="dense")
    with pytest.raises(InterruptedError):
        fit(model, tmp_path / "cut", callback, Interrupted())
    model.load_state_dict(seeded().state_dict())
    fit(model, tmp_path / "ours", callback)
    fit(other, tmp_path / "plain")
    assert_equal(model, other)


def test_a_damaged_checkpoint_leaves_the_module_as_it_was(tmp_path: Path) -> None:
    model, callback = seeded(), sparsity()
    fit(model, tmp_path / "run", callback)
    path = tmp_path / "run" / "epoch=0.ckpt"
    checkpoint = torch.load(path, weights_only=False)
    checkpoint[METADATA]["dropped"]["net.0.weight"] = torch.zeros(3)
    torch.save(checkpoint, path)
    fresh = seeded()
    with pytest.raises(CheckpointError, match=r"net\.0\.weight has .* dropped weights, the file 3"):
        fit(fresh, tmp_path / "again", sparsity(), resume=path)
    assert {memory["lr_sum"] for memory in sparsity_state(fresh).values()} == {0.0}


def test_training_goes_on_with_a_finalized_module(tmp_path: Path) -> None:
    model = seeded()
    callback = sparsity()
    fit(model, tmp_path / "one", callback)
    fit(model, tmp_path / "two", callback)
    verify(model, "2:4")


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    with pytest.raises(SparsityError, match='no hyperparameter "patern"'):
        NMSparsity(patern="2:4")
    with pytest.raises(SparsityError, match="nothing of Classifier is sparse at 2:64"):
        fit(seeded(), tmp_path, NMSparsity("2:64"))
    sharded = SimpleNamespace(strategy=FSDPStrategy())
    with pytest.raises(SparsityError, match="FSDPStrategy keeps the weights in pieces"):
        NMSparsity().setup(sharded, seeded(), "fit")
