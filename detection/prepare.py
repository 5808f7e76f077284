"""Make a data set: ``python -m nm_sparsity.detection.prepare {composed,fashion,voc} --out DIR``; ``coco`` checks one.

They write ``DIR/train``, ``DIR/val`` (most also ``DIR/test``) and ``DIR/annotations/instances_*.json``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

from nm_sparsity.core.experiments import fashion_mnist
from nm_sparsity.core.experiments.command_line import command_line, present_names
from nm_sparsity.core.experiments.folders import make_folder
from nm_sparsity.detection import coco, compose, voc

COCO_PARTS = {
    "train2017": "http://images.cocodataset.org/zips/train2017.zip",
    "val2017": "http://images.cocodataset.org/zips/val2017.zip",
    "annotations/instances_train2017.json": "http://images.cocodataset.org/annotations/annotations_trainval2017.zip",
    "annotations/instances_val2017.json": "http://images.cocodataset.org/annotations/annotations_trainval2017.zip",
}


def prepare_coco(data: Path, decode: bool = False) -> None:
    """Check a COCO 2017 folder (nothing is downloaded or written).

    Args:
        data: the folder that holds train2017, val2017 and annotations.
        decode: decode every image too (minutes).
    """
    missing = [f"{data / part}  (from {url})" for part, url in COCO_PARTS.items() if not (data / part).exists()]
    if missing:
        raise coco.DataError("\n  ".join([f"{data} is not a COCO 2017 folder; missing:", *missing]))
    for split in ("train2017", "val2017"):
        _report(data / "annotations" / f"instances_{split}.json", data / split, decode)


def composed(out: Path, train: int = 400, val: int = 100, size: int = 128, seed: int = 0) -> None:
    """Handwritten digits on photographs with exact masks, from what scikit-learn brings along.

    Args:
        out: the folder to write.
        train: pictures for training.
        val: pictures for validation, and as many for test.
        size: their width and height in pixels.
        seed: of the drawing.
    """
    _compose(compose.digits(), [str(digit) for digit in range(10)], out, train, val, size, seed)


def fashion(
    out: Path, source: Path | None = None, train: int = 2000, val: int = 500, size: int = 160, seed: int = 0
) -> None:
    """Fashion-MNIST items on photographs with exact masks.

    Args:
        out: the folder to write.
        source: a folder that holds Fashion-MNIST's four IDX files; without it, Debian's package is used or fetched.
        train: pictures for training.
        val: pictures for validation, and as many for test.
        size: their width and height in pixels.
        seed: of the drawing.
    """
    pictures = fashion_mnist.read(source) if source else fashion_mnist.fetched()
    _compose(compose.fashion(*pictures), fashion_mnist.CLASSES, out, train, val, size, seed)


def prepare_voc(source: Path, out: Path, val_share: float = 0.2, seed: int = 0) -> None:
    """Any folder in PASCAL VOC's format, as COCO.

    Args:
        source: the folder that holds Annotations and JPEGImages.
        out: the folder to write.
        val_share: share of the images for validation where ImageSets/Main does not say.
        seed: of that split.
    """
    make_folder(out)
    voc.convert(source, out, val_share, seed)
    for split in ("train", "val"):
        _report(out / "annotations" / f"instances_{split}.json", out / split, decode=True)


def _compose(
    items: dict[str, compose.Items], classes: Sequence[str], out: Path, train: int, val: int, size: int, seed: int
) -> None:
    make_folder(out)
    if seed < 0:
        raise coco.DataError(f"--seed {seed}: expected 0 or more")
    left, right = compose.photographs()
    smallest = min(min(picture.shape[:2]) for picture in [*left, *right])
    if not 32 <= size <= smallest:
        raise coco.DataError(f"--size {size}: pictures are cut from photographs, 32 to {smallest} pixels")
    for split, of_split in items.items():
        backgrounds, count = (left, train) if split == "train" else (right, val)
        compose.write_split(out, split, of_split, backgrounds, classes, count, size, seed)
        _report(out / "annotations" / f"instances_{split}.json", out / split, decode=True)


def _report(annotations: Path, images: Path, decode: bool) -> None:
    print(f"{annotations}: {coco.check(annotations, images, decode)}")


@command_line
def main(arguments: list[str] | None = None) -> None:
    """Make or check the data set that the arguments name."""
    names: dict[str, Callable[..., Any]] = {
        "coco": prepare_coco,
        "composed": composed,
        "fashion": fashion,
        "voc": prepare_voc,
    }
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["coco"]:
        given = present_names(given, {"--out": "--data"})
    program = "python -m nm_sparsity.detection.prepare"
    tyro.extras.subcommand_cli_from_dict(names, args=given, prog=program, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
