from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torchvision.models import WeightsEnum, get_model

from nm_sparsity.classification.models import build, load_pretrained
from nm_sparsity.core import CheckpointError, SparsityError, sparsify


@pytest.mark.parametrize(
    "name", ["resnet8_small", "resnet20_small", "resnet18_small", "resnet18", "googlenet", "mobilenet_v3_small"]
)
def test_models_classify_small_images_in_training_too(name: str) -> None:
    torch.manual_seed(0)
    logits = build(name, 7).train()(torch.randn(2, 3, 33, 33))
    assert logits.shape == (2, 7)


def test_small_resnets_are_the_published_ones() -> None:
    # 0.27 M parameters in He et al., table 6, with identity shortcuts: the two projections here add 2,560 weights
    # and 192 batch-norm parameters to 269,722.
    assert sum(p.numel() for p in build("resnet20_small", 10).parameters()) == 269_722 + 2_560 + 192
    features = build("resnet20_small", 10)[:-3](torch.randn(1, 3, 32, 32))
    assert features.shape == (1, 64, 8, 8)


def test_all_but_stem_and_classifier_of_a_small_resnet_fit_every_recipes_pattern() -> None:
    for pattern in ("2:4", "4:8", "1:8", "1:16"):
        report = sparsify(build("resnet8_small", 10), pattern, exclude=["fc"])
        assert [w.name for w in report.weights if not w.sparse] == ["conv1.weight", "fc.weight"]


def test_an_unknown_model_lists_the_known_ones() -> None:
    with pytest.raises(SparsityError, match=r'unknown model "resnet51"; known models: resnet8_small.*, resnet50, '):
        build("resnet51", 10)


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "model", "module."])
def test_pretrained_files_load_with_any_number_of_classes(tmp_path: Path, wrap: str) -> None:
    torch.manual_seed(0)
    state = build("resnet8_small", 10).state_dict()
    if wrap == "module.":
        content: object = {"state_dict": {f"module.{key}": value for key, value in state.items()}}
    else:
        content = state if wrap == "plain" else {wrap: state}
    torch.save(content, tmp_path / "weights.pt")

    same = build("resnet8_small", 10)
    assert load_pretrained(same, "resnet8_small", str(tmp_path / "weights.pt")) == []
    assert all(torch.equal(value, state[key]) for key, value in same.state_dict().items())

    other = build("resnet8_small", 4)
    head = other.fc.weight.clone()
    assert load_pretrained(other, "resnet8_small", str(tmp_path / "weights.pt")) == ["fc.weight", "fc.bias"]
    assert torch.equal(other.fc.weight, head)
    assert torch.equal(other.layer1[0].conv1.weight, state["layer1.0.conv1.weight"])


def test_pretrained_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    torch.save(build("resnet20_small", 10).state_dict(), tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"layer1\.1\.conv1\.weight"):
        load_pretrained(build("resnet8_small", 10), "resnet8_small", str(tmp_path / "other.pt"))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(SparsityError, match=r"list\.pt holds no state"):
        load_pretrained(build("resnet8_small", 10), "resnet8_small", str(tmp_path / "list.pt"))
    with pytest.raises(SparsityError, match="is not a file, and torchvision has no trained resnet8_small"):
        load_pretrained(build("resnet8_small", 10), "resnet8_small", "DEFAULT")
    with pytest.raises(SparsityError, match="weights of torchvision for resnet18: DEFAULT, IMAGENET1K_V1"):
        load_pretrained(build("resnet18", 10), "resnet18", "IMAGENET22K")
    with pytest.raises(SparsityError, match=r'"typo\.pt" is not a file, and torchvision has no trained mine:build'):
        load_pretrained(build("resnet8_small", 10), "mine:build", "typo.pt")


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_torchvisions_weights_compute_what_they_do_in_torchvision(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """These two scale their inputs in a way that is in no state dict."""
    torch.manual_seed(0)
    state = get_model(name, aux_logits=True, init_weights=False).state_dict()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: dict(state))  # in the place of a download
    with warnings.catch_warnings(action="ignore"):
        theirs = get_model(name, weights="DEFAULT").eval()
    ours = build(name, 1000).eval()
    assert load_pretrained(ours, name, "DEFAULT") == []
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))
