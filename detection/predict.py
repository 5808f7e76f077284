"""Find the objects in pictures: ``python -m nm_sparsity.detection.predict RUN PICTURE_OR_FOLDER ...``.

Each picture is drawn with the boxes, masks, names and scores of what was found in it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from nm_sparsity.core import SparsityError, frozen
from nm_sparsity.core.experiments.command_line import command_line
from nm_sparsity.core.experiments.folders import make_folder
from nm_sparsity.core.experiments.images import named_classes, named_images, opened
from nm_sparsity.detection import config as configs
from nm_sparsity.detection.checkpoints import Trained
from nm_sparsity.detection.evaluate import Detections, as_coco
from nm_sparsity.detection.hooks import kind_of
from nm_sparsity.detection.pictures import draw


@dataclass(frozen=True)
class Arguments:
    """Find the objects in pictures."""

    path: tyro.conf.Positional[Path]
    """A run folder, a checkpoint or a finalized file in one, or any state_dict file (with --config)."""
    pictures: tyro.conf.Positional[tuple[Path, ...]]
    """Files, and folders of files."""
    out: Path = Path("runs/predictions")
    """The folder for the pictures with what was found drawn on them."""
    score: float = 0.5
    """The least score, from 0 to 1, of what is drawn and told."""
    classes: Path | None = None
    """Names of the classes, one a line, where neither the checkpoint nor the config tells them."""
    config: str | None = None
    """What a file outside of a run folder belongs to: a packaged config, a config file or a run folder."""
    json: bool = False
    """Print a line of JSON for each picture: COCO's results, masks included."""


def predict(arguments: Arguments) -> Iterator[tuple[Path, Detections, tuple[str, ...]]]:
    """Of each picture, what was found in it, the surest first, and the names of the categories.

    Raises:
        SparsityError: if the checkpoint or a picture cannot be read; what came before was given.
    """
    if not 0 <= arguments.score <= 1:
        raise SparsityError(f"--score {arguments.score}: expected a number from 0 to 1")
    files = [file for path in arguments.pictures for file in named_images(path)]
    trained = Trained.open(arguments.path, arguments.config)
    from mmcv.transforms import Compose
    from mmdet.apis import inference_detector

    model: Any = trained.model().eval()
    model.cfg = trained.config
    names = class_names(trained, arguments.classes)
    steps = trained.config.test_dataloader.dataset.pipeline
    pipeline = Compose([step for step in steps if kind_of(step) != "LoadAnnotations"])
    with frozen(model):
        for file in files:
            with opened(file) as image:
                image.load()
            found = as_coco(inference_detector(model, str(file), pipeline), range(len(names)))
            yield file, sorted((d for d in found if d["score"] >= arguments.score), key=lambda d: -d["score"]), names


def class_names(trained: Trained, file: Path | None = None) -> tuple[str, ...]:
    """The names of the classes, in the order of the labels; those in `file`, if there is one, see `named_classes`."""
    from mmdet.datasets import CocoDataset

    told = trained.config.test_dataloader.dataset.get("metainfo") or {}
    meta = trained.payload.get("meta") or {}
    found = told.get("classes") or (meta.get("dataset_meta") or {}).get("classes") or CocoDataset.METAINFO["classes"]
    count = next((head["num_classes"] for head in configs.heads(trained.config.model)), len(found))
    return named_classes(file, tuple(map(str, found)), count, trained.path)


@command_line
def main(arguments: list[str] | None = None) -> None:
    """Find the objects in the pictures that `arguments`, by default the command line's, name."""
    parsed = tyro.cli(Arguments, args=arguments, prog="python -m nm_sparsity.detection.predict", description=__doc__)
    made: set[Path] = set()
    with torch.no_grad():
        for file, found, names in predict(parsed):
            drawn = make_folder(parsed.out) / f"{file.stem}.png"
            if drawn in made:
                raise SparsityError(f"two pictures are called {file.stem}: draw them into different folders with --out")
            made.add(drawn)
            title = f"prediction: scores of {parsed.score:g} and more" if found else "prediction: nothing found"
            draw(file, found, dict(enumerate(names)), title).save(drawn)
            if parsed.json:
                objects = [_plain(one, names) for one in found]
                print(json.dumps({"picture": str(file), "drawn": str(drawn), "found": objects}), flush=True)
            else:
                told = ", ".join(f"{names[one['category_id']]} {one['score']:.0%}" for one in found)
                print(f"{file}: {told or f'nothing with a score of {parsed.score:g}'}; see {drawn}", flush=True)


def _plain(found: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """`found` as JSON types, with its class by name."""
    plain = {"class": names[found["category_id"]], "score": found["score"], "bbox": found["bbox"]}
    if mask := found.get("segmentation"):
        plain["segmentation"] = {**mask, "counts": mask["counts"].decode()}
    return plain


if __name__ == "__main__":
    sys.exit(main())
