"""The paper's way from one task to the other at its defaults: a sparse ImageNet backbone, then a detector from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mmdet")

from nm_sparsity.classification import train as classification
from nm_sparsity.classification.configs import RECIPES
from nm_sparsity.core.files.io import load
from nm_sparsity.detection import config as configs


def test_every_packaged_config_starts_from_what_a_recipe_writes() -> None:
    written = {str(RECIPES.get(name).folder / "finalized.pt") for name in RECIPES}
    names = [name for name in configs.names() if not name.startswith("tiny")]
    assert len(names) == 8
    for name in names:
        assert configs.read(name).model.backbone.init_cfg.checkpoint in written


@pytest.mark.slow
def test_a_detector_gets_the_backbone_that_classification_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for part, count in (("train", 2), ("val", 1)):
        for label in ("n01", "n02"):
            folder = tmp_path / "data" / "imagenet" / part / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng(i).integers(0, 256, (40, 40, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.JPEG")
    tiny = ["--data.image-size=32", "--data.workers=0", "--batch-size=4", "--epochs=1", "--optimizer.warmup-epochs=0"]
    with pytest.warns(UserWarning, match=r"lambda \* sum\(lr\)"):  # of one step
        assert classification.main(["resnet50_2to4", "--device=cpu", *tiny]) == 0

    from mmdet.registry import MODELS

    model = MODELS.build({**configs.read("faster_rcnn_r50_fpn_1x_coco_2to4").model, "_scope_": "mmdet"})
    model.init_weights()
    trained = load(tmp_path / "runs" / "resnet50_2to4" / "finalized.pt")["state_dict"]
    found = model.backbone.state_dict()
    assert len(found) > 300
    assert all(bool((value == trained[name]).all()) for name, value in found.items())
    weight = found["layer3.0.conv2.weight"].unflatten(1, (-1, 4))
    assert int((weight != 0).sum(dim=2).max()) == 2
