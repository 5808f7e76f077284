"""Score a trained detector as COCO does: ``python -m nm_sparsity.detection.evaluate RUN``.

Writes ``evaluation.json`` and ``predictions.png`` into the run folder and, for a sparse model, ``finalized.pt``: the
verified N:M model as any MMDetection loads it, which must score the same.
"""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from matplotlib.font_manager import findfont
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, save_image
from tqdm import tqdm

from nm_sparsity.core import SparsityError, frozen
from nm_sparsity.core.experiments.command_line import command_line
from nm_sparsity.core.experiments.finalize import finalize_and_check, save_finalized
from nm_sparsity.core.experiments.run import FINALIZED, environment, write_json
from nm_sparsity.core.files.checkpoint import restore
from nm_sparsity.core.files.metadata import find_parts
from nm_sparsity.core.table import format_table
from nm_sparsity.detection import PACKAGES
from nm_sparsity.detection import config as configs

NUMBERS = (
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large"),
)
"""COCO's twelve numbers, in the order of ``COCOeval.stats``."""

SHOWN_SCORE = 0.5
PICTURE_WIDTH = 384

Detections = list[dict[str, Any]]
"""COCO results: image_id, category_id, bbox (x, y, width, height), score and, from mask heads, segmentation."""


@dataclass(frozen=True)
class Score:
    """COCO's twelve numbers and AP per class, for boxes or masks; ``None`` where nothing of that kind is annotated."""

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
                detections += _as_coco(sample, categories)
    return detections


def _as_coco(sample: Any, categories: Sequence[int]) -> Detections:
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
        {name: None if value < 0 else float(value) for name, value in zip(NUMBERS, evaluation.stats, strict=True)},
        {name: float(p.mean()) if (p > -1).all() else None for name, p in zip(names, per_class, strict=True)},
    )


def evaluate(run: Path, checkpoint: Path | None = None, pictures: int = 6) -> dict[str, Any]:
    """Evaluate a run on its config's test data; returns what ``evaluation.json`` holds.

    Raises:
        SparsityError: for a folder that is no run, a pattern that does not hold, or a finalized model that scores
            differently.
    """
    import nm_sparsity.detection.plugin  # noqa: F401, I001  before mmdet, which binds mmcv's operators
    from mmdet.apis import init_detector
    from mmdet.registry import MODELS
    from mmengine.device import get_device
    from mmengine.registry import init_default_scope
    from mmengine.runner import Runner

    from nm_sparsity.detection.hooks import load_safely

    config, checkpoint = _config_of(run), checkpoint or _checkpoint_of(run)
    payload = load_safely(checkpoint)
    state_dict, metadata = find_parts(payload, checkpoint)
    init_default_scope(config.get("default_scope", "mmdet"))
    with redirect_stdout(io.StringIO()):
        loader = Runner.build_dataloader(config.test_dataloader, seed=0)
        truth = COCO(Path(loader.dataset.ann_file))
    dataset = loader.dataset

    model = MODELS.build(config.model).to(get_device())
    hook = _sparsity_of(config)
    is_sparse = metadata is not None and bool(metadata.layers)
    if is_sparse and hook is None:
        raise SparsityError(f"{checkpoint} is sparse, but the config in {run} has no NMSparseHook: is it of this run?")
    if is_sparse:
        hook.config.sparsify(model)
    restore(model, state_dict, metadata)
    kinds = {"box": "bbox", **({"mask": "segm"} if model.with_mask else {})}
    detections: Detections = []

    def scores(model: nn.Module) -> dict[str, Any]:
        detections[:] = predict(model, loader)
        found = {name: score(truth, detections, kind, dataset.cat_ids) for name, kind in kinds.items()}
        return {name: {**one.numbers, "classes": one.classes} for name, one in found.items()}

    def reload(end: nn.Module) -> nn.Module:
        save_finalized(end, run / FINALIZED, meta=payload["meta"])
        stock: nn.Module = init_detector(copy.deepcopy(config), str(run / FINALIZED), device=str(get_device()))
        return stock

    result: dict[str, Any] = {"checkpoint": str(checkpoint), "images": len(dataset)}
    if is_sparse:
        done = finalize_and_check(model, scores, gpu_tolerance=1e-3, reload=reload)
        weights = len(done.verification.checked)
        result |= {**done.score, "verified": f"{weights} weights are N:M; the finalized model scores the same"}
    else:
        result |= scores(model)
    result["detections"] = len(detections)
    result["environment"] = environment(config.get("randomness", {}).get("seed"), PACKAGES)
    write_json(run / "evaluation.json", result)
    shown = [dataset.get_data_info(index) for index in range(min(pictures, len(dataset)))]
    if shown:
        draw({info["img_id"]: Path(info["img_path"]) for info in shown}, truth, detections, run / "predictions.png")
    return result


def _config_of(run: Path) -> Any:
    files = sorted(run.glob("*.py"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise SparsityError(f"{run} is not a run folder of nm_sparsity.detection.train: it holds no config")
    return configs.read(str(files[-1]))


def _checkpoint_of(run: Path) -> Path:
    last = run / "last_checkpoint"
    if not last.is_file():
        raise SparsityError(f"{run} holds no checkpoint yet")
    return run / Path(last.read_text().strip()).name


def _sparsity_of(config: Any) -> Any:
    from nm_sparsity.detection.hooks import NMSparseHook

    found = configs.hooks_of(config)
    return NMSparseHook(**{k: v for k, v in found[0].items() if k not in ("type", "_scope_")}) if found else None


def draw(images: Mapping[int, Path], truth: COCO, detections: Detections, path: Path) -> None:
    """One PNG: ground truth in the upper row, detections scored above 0.5 in the lower one."""
    rows: list[list[Tensor]] = [[], []]
    for number, file in images.items():
        annotated = [{**a, "score": 1.0} for a in truth.imgToAnns[number] if not a.get("iscrowd")]
        for annotation in annotated:
            annotation["segmentation"] = truth.annToRLE(annotation) if annotation.get("segmentation") else None
        found = [d for d in detections if d["image_id"] == number and d["score"] >= SHOWN_SCORE]
        for row, objects in zip(rows, (annotated, found), strict=True):
            row.append(_picture(file, objects, truth))
    height = max(picture.shape[1] for row in rows for picture in row)
    grid = [
        torch.cat([nn.functional.pad(p, (2, 2, 2, 2 + height - p.shape[1]), value=1.0) for p in row], 2) for row in rows
    ]
    save_image(torch.cat(grid, 1), path)


def _picture(file: Path, objects: Sequence[Mapping[str, Any]], truth: COCO) -> Tensor:
    """(3, height, PICTURE_WIDTH) in 0..1, with boxes, names and masks."""
    image = Image.open(file).convert("RGB")
    scale = PICTURE_WIDTH / image.width
    size = PICTURE_WIDTH, round(image.height * scale)
    picture = torch.from_numpy(np.array(image.resize(size))).permute(2, 0, 1)
    if objects:
        order = {category: index for index, category in enumerate(sorted(truth.cats))}
        hues = [255 * order[o["category_id"]] // len(order) for o in objects]
        colours = [Image.new("HSV", (1, 1), (hue, 255, 255)).convert("RGB").getpixel((0, 0)) for hue in hues]
        masks = [o.get("segmentation") for o in objects]
        if all(mask is not None for mask in masks):
            resized = [np.asarray(Image.fromarray(rle.decode(mask)).resize(size)) for mask in masks]
            picture = draw_segmentation_masks(picture, torch.from_numpy(np.stack(resized)).bool(), 0.5, colours)
        boxes = torch.tensor([o["bbox"] for o in objects], dtype=torch.float) * scale
        boxes[:, 2:] += boxes[:, :2]
        names = [f"{truth.cats[o['category_id']]['name']} {o['score']:.2f}" for o in objects]
        font = findfont("DejaVu Sans")
        picture = draw_bounding_boxes(picture, boxes, names, colours, width=2, font=font, font_size=18)
    return picture / 255


def table(result: Mapping[str, Any]) -> str:
    """The twelve numbers and AP per class of one evaluation, as text."""
    kinds = [kind for kind in ("box", "mask") if kind in result]
    numbers = [[name, *(result[kind][name] for kind in kinds)] for name in NUMBERS]
    classes = [[f"AP {name}", *(result[kind]["classes"][name] for kind in kinds)] for name in result["box"]["classes"]]
    return format_table(["", *kinds], numbers + classes)


def main_evaluate(run: tyro.conf.Positional[Path], checkpoint: Path | None = None, pictures: int = 6) -> None:
    """Score a trained detector as COCO does, verify its pattern, finalize it.

    Args:
        run: a run folder of nm_sparsity.detection.train.
        checkpoint: another file than the last one in it.
        pictures: images to draw into predictions.png; 0 for none.
    """
    result = evaluate(run, checkpoint, pictures)
    print(table(result))
    print(result.get("verified", "dense model: no pattern to verify"))


@command_line
def main(arguments: list[str] | None = None) -> None:
    """Evaluate as the arguments say, and print the numbers."""
    tyro.cli(main_evaluate, args=arguments, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
