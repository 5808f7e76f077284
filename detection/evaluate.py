"""Score a trained detector as COCO does, in percent: ``python -m nm_sparsity.detection.evaluate RUN``.

Writes ``evaluation.json`` and ``predictions.png`` into the run folder and, for a sparse model, ``finalized.pt``: the
verified N:M model as any MMDetection loads it, which must score the same. What is no run as it stands (a file, another
checkpoint of a run) is scored alike and written where ``--out`` says, or only printed.
"""

from __future__ import annotations

import copy
import io
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from tqdm import tqdm

from nm_sparsity.core import frozen
from nm_sparsity.core.experiments.command_line import command_line
from nm_sparsity.core.experiments.finalize import finalize_and_check, save_finalized
from nm_sparsity.core.experiments.folders import results_folder, what_was_written
from nm_sparsity.core.experiments.run import EVALUATION, FINALIZED, environment, write_json
from nm_sparsity.core.table import format_table
from nm_sparsity.detection import PACKAGES
from nm_sparsity.detection.checkpoints import Trained
from nm_sparsity.detection.pictures import WIDTH, draw, grid

NUMBERS = (
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large"),
)
"""COCO's twelve numbers, in the order of ``COCOeval.stats``."""

SHOWN_SCORE = 0.5

PREDICTIONS = "predictions.png"
"""What an evaluation writes beside `EVALUATION` and `FINALIZED`."""

Detections = list[dict[str, Any]]
"""COCO results: image_id, category_id, bbox (x, y, width, height), score and, from mask heads, segmentation."""


@dataclass(frozen=True)
class Score:
    """COCO's twelve numbers and AP per class in percent, for boxes or masks; ``None`` where nothing of that kind is
    annotated."""

    numbers: dict[str, float | None]
    classes: dict[str, float | None]


def predict(model: nn.Module, loader: Any) -> Detections:
    """All detections of `model`, which computes each masked weight once, on the images of `loader`."""
    model.eval()
    categories = loader.dataset.cat_ids
    detections = []
    with torch.no_grad(), frozen(model):
        for batch in tqdm(loader, desc="predicting", disable=not sys.stderr.isatty()):
            for sample in model.test_step(batch):  # type: ignore[operator]
                detections += as_coco(sample, categories)
    return detections


def as_coco(sample: Any, categories: Sequence[int]) -> Detections:
    """What MMDetection found in an image; `categories` are the ids of its labels."""
    found = sample.pred_instances.cpu().numpy()
    corners = found.bboxes
    boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).tolist()
    detections: Detections = [
        {"image_id": sample.img_id, "category_id": categories[label], "bbox": box, "score": float(score)}
        for box, label, score in zip(boxes, found.labels, found.scores, strict=True)
    ]
    if "masks" in found:
        for detection, mask in zip(detections, found.masks, strict=True):
            detection["segmentation"] = rle.encode(np.asfortranarray(mask, np.uint8))
    return detections


def score(truth: COCO, detections: Detections, kind: str, category_ids: Sequence[int]) -> Score:
    """pycocotools' verdict on `detections`; `kind` is ``"bbox"`` or ``"segm"``."""
    names = [truth.cats[category]["name"] for category in category_ids]
    if not detections:
        return Score(dict.fromkeys(NUMBERS, 0.0), dict.fromkeys(names, 0.0))
    if kind == "segm":  # with a box in the result, pycocotools would size objects by it
        detections = [{key: value for key, value in d.items() if key != "bbox"} for d in detections]
    with redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(detections)), kind)
        evaluation.params.catIds = list(category_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # IoU x recall x class, any size, 100 detections
    per_class = [precision[:, :, index] for index in range(len(names))]
    return Score(
        {
            name: None if value < 0 else 100 * float(value)
            for name, value in zip(NUMBERS, evaluation.stats, strict=True)
        },
        {name: 100 * float(p.mean()) if (p > -1).all() else None for name, p in zip(names, per_class, strict=True)},
    )


def evaluate(
    path: Path, checkpoint: Path | None = None, pictures: int = 6, out: Path | None = None, config: str | None = None
) -> dict[str, Any]:
    """Evaluate a run or a file on its config's test data; returns what ``evaluation.json`` holds.

    Args:
        path: a run folder, a checkpoint, a finalized file, or a state dict.
        checkpoint: another file than the last checkpoint of the run folder `path`.
        pictures: how many images to draw.
        out: the folder to write into; by default the run's own for `path` alone, else none, see `results_folder`.
        config: see `Trained.open`.

    Raises:
        SparsityError: for a folder that is no run, a pattern that does not hold, or a finalized model that scores
            differently.
    """
    trained = Trained.open(checkpoint or path, config or (str(path) if checkpoint else None))
    folder = results_folder(_run(path, checkpoint, config), out, (EVALUATION, PREDICTIONS, FINALIZED))
    from mmdet.apis import init_detector
    from mmengine.device import get_device
    from mmengine.registry import init_default_scope
    from mmengine.runner import Runner

    init_default_scope(trained.config.get("default_scope", "mmdet"))
    with redirect_stdout(io.StringIO()):
        loader = Runner.build_dataloader(trained.config.test_dataloader, seed=0)
        truth = COCO(Path(loader.dataset.ann_file))
    dataset = loader.dataset
    model: Any = trained.model()
    kinds = {"box": "bbox", **({"mask": "segm"} if model.with_mask else {})}
    detections: Detections = []

    def scores(model: nn.Module) -> dict[str, Any]:
        detections[:] = predict(model, loader)
        found = {name: score(truth, detections, kind, dataset.cat_ids) for name, kind in kinds.items()}
        return {name: {**one.numbers, "classes": one.classes} for name, one in found.items()}

    def reload(end: nn.Module) -> nn.Module:
        meta = trained.payload.get("meta") or {"dataset_meta": dataset.metainfo}
        with tempfile.TemporaryDirectory() as somewhere, redirect_stdout(io.StringIO()):
            file = (folder or Path(somewhere)) / FINALIZED
            save_finalized(end, file, meta=meta)
            stock: nn.Module = init_detector(copy.deepcopy(trained.config), str(file), device=str(get_device()))
        return stock

    result: dict[str, Any] = {"checkpoint": str(trained.path), "images": len(dataset)}
    if trained.is_sparse:
        done = finalize_and_check(model, scores, gpu_tolerance=0.1, reload=reload)
        weights = len(done.verification.checked)
        result |= {**done.score, "verified": f"{weights} weights are N:M; the finalized model scores the same"}
    else:
        result |= scores(model)
        if folder is not None and trained.path != folder / FINALIZED:
            (folder / FINALIZED).unlink(missing_ok=True)  # of another model than the numbers beside it
    result["detections"] = len(detections)
    result["environment"] = environment(trained.config.get("randomness", {}).get("seed"), PACKAGES)
    if folder is None:
        return result
    write_json(folder / EVALUATION, result)
    shown = [dataset.get_data_info(index) for index in range(min(pictures, len(dataset)))]
    if shown:
        files = {info["img_id"]: Path(info["img_path"]) for info in shown}
        compare(files, truth, detections).save(folder / PREDICTIONS)
    return result


def _run(path: Path, checkpoint: Path | None, config: str | None) -> Path | None:
    """The run folder that is evaluated as it stands, if one is."""
    return path if path.is_dir() and checkpoint is None and config is None else None


def compare(images: Mapping[int, Path], truth: COCO, detections: Detections) -> Image.Image:
    """The images in two rows: above as they are annotated, below what was detected in them."""
    names = {category: truth.cats[category]["name"] for category in sorted(truth.cats)}
    rows: list[list[Image.Image]] = [[], []]
    for number, file in images.items():
        annotated = [dict(a) for a in truth.imgToAnns[number] if not a.get("iscrowd")]
        for annotation in annotated:
            annotation["segmentation"] = truth.annToRLE(annotation) if annotation.get("segmentation") else None
        found = [d for d in detections if d["image_id"] == number and d["score"] >= SHOWN_SCORE]
        rows[0].append(draw(file, annotated, names, "truth", WIDTH))
        rows[1].append(draw(file, found, names, f"prediction: scores of {SHOWN_SCORE:g} and more", WIDTH))
    return grid(rows)


def table(result: Mapping[str, Any]) -> str:
    """The twelve numbers and AP per class of one evaluation, as text."""
    kinds = [kind for kind in ("box", "mask") if kind in result]
    cells = [(name, [result[kind][name] for kind in kinds]) for name in NUMBERS]
    cells += [(f"AP {name}", [result[kind]["classes"][name] for kind in kinds]) for name in result["box"]["classes"]]
    rows = [[name, *(None if value is None else f"{value:.2f}" for value in values)] for name, values in cells]
    return format_table(["percent", *kinds], rows)


def main_evaluate(
    path: tyro.conf.Positional[Path],
    checkpoint: Path | None = None,
    pictures: int = 6,
    out: Path | None = None,
    config: str | None = None,
) -> None:
    """Score a trained detector as COCO does, verify its pattern, finalize it.

    Args:
        path: a run folder of nm_sparsity.detection.train, a checkpoint or a finalized file in one, or any state_dict
            file (with --config).
        checkpoint: another file than the last one in that run folder.
        pictures: images to draw into predictions.png; 0 for none.
        out: the folder to write into; by default that of a run which is named alone, else nothing is written.
        config: what a file outside of a run folder belongs to: a packaged config, a config file or a run folder.
    """
    result = evaluate(path, checkpoint, pictures, out, config)
    print(table(result))
    print(result.get("verified", "dense model: no pattern to verify"))
    names = [EVALUATION, *([PREDICTIONS] if pictures else []), *([FINALIZED] if "verified" in result else [])]
    folder = out or _run(path, checkpoint, config)
    print(f"{result['images']} images, {result['checkpoint']}; {what_was_written(names, folder)}")


@command_line
def main(arguments: list[str] | None = None) -> None:
    """Evaluate as the arguments say, and print the numbers."""
    tyro.cli(main_evaluate, args=arguments, prog="python -m nm_sparsity.detection.evaluate", description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
