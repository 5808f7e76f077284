"""COCO's annotation format: check a data set before hours are spent on it, and write one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as rle

from nm_sparsity.core.errors import SparsityError

SHOWN = 10
"""Problems listed in an error message; the rest is counted."""

ROUNDING = 1.0
"""Pixels by which a box may leave its image: COCO's own boxes do, by rounding."""


class DataError(SparsityError):
    """A data set that is missing, damaged, or not in the format it should be in."""


@dataclass(frozen=True)
class Summary:
    """What an annotation file holds. `skipped` boxes have no area; MMDetection leaves them out (COCO has a few)."""

    images: int
    annotations: int
    categories: tuple[str, ...]
    crowds: int
    skipped: int

    def __str__(self) -> str:
        return (
            f"{self.images} images, {self.annotations} annotations in {len(self.categories)} categories "
            f"({self.crowds} crowd regions; {self.skipped} without area, skipped by MMDetection)"
        )


def check(annotations: Path, images: Path, decode: bool = False) -> Summary:
    """Check a COCO annotation file and the image folder it belongs to.

    Args:
        annotations: the ``instances_*.json`` file.
        images: the folder of its ``file_name``s.
        decode: decode every image too, which finds damaged files and takes minutes on all of COCO.

    Raises:
        DataError: one line for each problem: unreadable JSON, no annotations, missing or damaged images, wrong image
            sizes, unknown image or category ids, repeated ids, boxes outside the image, broken masks.
    """
    document = _read(annotations)
    problems = [
        *_repeated(document),
        *_annotation_problems(document),
        *_image_problems(document, images, decode),
    ]
    if not document["annotations"]:
        problems.insert(0, "it has no annotations at all")
    if problems:
        more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise DataError("\n  ".join([f"{annotations}:", *problems[:SHOWN], *more]))
    return Summary(
        images=len(document["images"]),
        annotations=len(document["annotations"]),
        categories=tuple(category["name"] for category in document["categories"]),
        crowds=sum(bool(a.get("iscrowd")) for a in document["annotations"]),
        skipped=sum(min(a["bbox"][2:]) < 1 for a in document["annotations"]),
    )


def _read(path: Path) -> dict[str, list[dict[str, Any]]]:
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(f"{path}: no such annotation file") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    required = {"images": {"id", "file_name"}, "annotations": {"id", "image_id", "category_id", "bbox"}}
    required["categories"] = {"id", "name"}
    if not isinstance(document, dict) or not all(isinstance(document.get(key), list) for key in required):
        raise DataError(f"{path} is not a COCO file: it needs lists of images, annotations and categories")
    for key, fields in required.items():
        for index, entry in enumerate(document[key]):
            if missing := fields - set(entry):
                raise DataError(f"{path}: {key}[{index}] has no {', '.join(sorted(missing))}")
    return document


def _repeated(document: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    for key, entries in document.items():
        if key in ("images", "annotations", "categories"):
            for value, count in Counter(entry["id"] for entry in entries).items():
                if count > 1:
                    yield f"{key}: id {value} is used {count} times"


def _annotation_problems(document: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    sizes = {image["id"]: (image.get("width"), image.get("height")) for image in document["images"]}
    names = {image["id"]: image["file_name"] for image in document["images"]}
    categories = {category["id"] for category in document["categories"]}
    for annotation in document["annotations"]:
        image = annotation["image_id"]
        what = f"annotation {annotation['id']} ({names.get(image, f'image {image}')})"
        if image not in sizes:
            yield f"{what}: image id {image} is not among the images"
            continue
        if annotation["category_id"] not in categories:
            yield f"{what}: category id {annotation['category_id']} is unknown; known: {sorted(categories)}"
        width, height = sizes[image]
        if width is None or height is None:
            yield f"image {names[image]} has no width and height"
            continue
        yield from (f"{what}: {problem}" for problem in _shape_problems(annotation, width, height))


def _shape_problems(annotation: Mapping[str, Any], width: int, height: int) -> Iterator[str]:
    box = annotation["bbox"]
    if len(box) != 4 or not np.isfinite(box).all() or min(box[2:]) < 0:
        yield f"box {box} is not [x, y, width, height]"
    elif min(box[0], box[1], width - box[0] - box[2], height - box[1] - box[3]) < -ROUNDING:
        yield f"box {box} leaves its {width}x{height} image"
    mask, crowd = annotation.get("segmentation"), annotation.get("iscrowd", 0)
    if isinstance(mask, list):
        if crowd and mask:
            yield "a crowd region needs a run-length mask, not polygons"
        for polygon in mask:
            if len(polygon) < 6 or len(polygon) % 2:
                yield f"a polygon of {len(polygon)} numbers; it needs at least 3 points, x and y each"
    elif isinstance(mask, dict):
        if list(mask.get("size", ())) != [height, width] or "counts" not in mask:
            yield f"a run-length mask of size {mask.get('size')} in an image of height {height}, width {width}"
    elif mask is not None:
        yield f"a mask of type {type(mask).__name__}; expected polygons or run lengths"


def _image_problems(document: Mapping[str, Sequence[Mapping[str, Any]]], folder: Path, decode: bool) -> Iterator[str]:
    if not folder.is_dir():
        yield f"the image folder {folder} does not exist"
        return

    def problem(entry: Mapping[str, Any]) -> str | None:
        path = folder / entry["file_name"]
        if not path.is_file():
            return f"image {path} is missing"
        if not decode:
            return None
        try:
            with Image.open(path) as image:
                image.load()
        except (OSError, SyntaxError) as error:
            return f"image {path} is damaged: {error}"
        expected = (entry.get("width"), entry.get("height"))
        return None if image.size == expected else f"image {path} is {image.size}, the file says {expected}"

    with ThreadPoolExecutor() as pool:
        yield from filter(None, pool.map(problem, document["images"]))


def instance(image_id: int, category_id: int, mask: NDArray[np.bool_]) -> dict[str, Any]:
    """An annotation from a boolean mask (height, width); its box is the mask's."""
    encoded = rle.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [float(x) for x in rle.toBbox(encoded)],
        "area": float(rle.area(encoded)),
        "segmentation": {"size": list(encoded["size"]), "counts": encoded["counts"].decode()},
        "iscrowd": 0,
    }


def box(image_id: int, category_id: int, x: float, y: float, width: float, height: float) -> dict[str, Any]:
    """An annotation without a mask."""
    size = {"bbox": [x, y, width, height], "area": width * height}
    return {"image_id": image_id, "category_id": category_id, **size, "iscrowd": 0}


def write(
    path: Path,
    images: Sequence[Mapping[str, Any]],
    annotations: Iterable[Mapping[str, Any]],
    classes: Sequence[str],
) -> None:
    """Write an annotation file; category ids count from 1 in the order of `classes`, annotation ids are given here."""
    path.parent.mkdir(parents=True, exist_ok=True)
    numbered = [{"id": number, **annotation} for number, annotation in enumerate(annotations, 1)]
    categories = [{"id": number, "name": name} for number, name in enumerate(classes, 1)]
    path.write_text(json.dumps({"images": list(images), "annotations": numbered, "categories": categories}))
