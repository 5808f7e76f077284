"""COCO's annotation format: check a data set before hours are spent on it, and write one."""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle

from nm_sparsity.core.errors import SparsityError
from nm_sparsity.core.experiments.images import opened

SHOWN = 10
"""Problems listed in an error message; the rest is counted."""

ROUNDING = 1.0
"""Pixels by which a box may leave its image: COCO's own boxes do, by rounding."""

MOST_PIXELS, LONGEST_SIDE = 2**30, 2**20
"""Of an image: what OpenCV reads, which MMDetection uses."""

_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = 60


def _shown(value: Any) -> str:
    """`value` for a message: short, on one line, whatever a file holds."""
    if isinstance(value, str) and value.isprintable() and 0 < len(value) <= 60:
        return value
    text = _brief.repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


class DataError(SparsityError):
    """A data set that is missing, damaged, or not in the format it should be in."""


@dataclass(frozen=True)
class Summary:
    """What an annotation file holds. `skipped` boxes have no area; MMDetection leaves them out (COCO has a few). Of
    the others, `maskless` ones have a box only."""

    images: int
    annotations: int
    categories: tuple[str, ...]
    crowds: int
    skipped: int
    maskless: int

    def __str__(self) -> str:
        text = (
            f"{self.images} images, {self.annotations} annotations in {len(self.categories)} categories "
            f"({self.crowds} crowd regions; {self.skipped} without area, skipped by MMDetection)"
        )
        boxes = f"; {self.maskless} have no mask: for detectors of boxes (Faster R-CNN), not of masks (Mask R-CNN)"
        return text + boxes if self.maskless else text


def check(annotations: Path, images: Path, decode: bool = False, masks: bool = False) -> Summary:
    """Check a COCO annotation file and the image folder it belongs to.

    Args:
        annotations: the ``instances_*.json`` file.
        images: the folder of its ``file_name``s.
        decode: decode every image too, which finds damaged files and takes minutes on all of COCO.
        masks: whether every annotation must have a mask.

    Raises:
        DataError: one line for each problem: unreadable JSON, missing or malformed entries, nothing to learn from,
            missing or damaged images, wrong image sizes, unknown image or category ids, repeated ids or names, boxes
            outside the image, broken masks.
    """
    document = _read(annotations)
    # The other checks rely on entries of the right types.
    problems = list(_malformed(document)) or [
        *_repeated(document),
        *_annotation_problems(document, masks),
        *_image_problems(document, images, decode),
    ]
    if problems:
        more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise DataError("\n  ".join([f"{annotations}:", *problems[:SHOWN], *more]))
    return Summary(
        images=len(document["images"]),
        annotations=len(document["annotations"]),
        categories=tuple(category["name"] for category in document["categories"]),
        crowds=sum(bool(a["iscrowd"]) for a in document["annotations"]),
        skipped=sum(map(_is_skipped, document["annotations"])),
        maskless=sum(map(_is_maskless, document["annotations"])),
    )


def class_names(annotations: Path) -> tuple[str, ...]:
    """The names of the categories of an annotation file, in its order; whether it is sound, `check` says.

    Raises:
        DataError: if it cannot be read as a COCO file.
    """
    return tuple(str(entry.get("name")) for entry in _read(annotations)["categories"] if isinstance(entry, dict))


def _read(path: Path) -> dict[str, list[dict[str, Any]]]:
    try:
        document = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such annotation file") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:  # also of text that is not UTF-8, and of numbers with thousands of digits
        raise DataError(f"{path} is not JSON: {error}") from None
    except RecursionError:
        raise DataError(f"{path} is not a COCO file: its values are nested too deeply") from None
    if not isinstance(document, dict) or not all(isinstance(document.get(key), list) for key in _FIELDS):
        raise DataError(f"{path} is not a COCO file: it needs lists of {', '.join(_FIELDS)}")
    return document


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 2**53


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(map(_is_number, values))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_id(value: Any) -> bool:
    return isinstance(value, str) or (_is_whole(value) and abs(value) < 2**63)


def _is_box(value: Any) -> bool:
    return _are_numbers(value) and len(value) == 4 and min(value[2:]) >= 0


_ID = (_is_id, "a whole number or text")
_SIZE = (lambda value: _is_whole(value) and 0 < value <= LONGEST_SIDE, f"a whole number from 1 to {LONGEST_SIDE}")
_FIELDS: Mapping[str, Mapping[str, tuple[Callable[[Any], bool], str]]] = {
    "images": {"id": _ID, "file_name": (_is_text, "text"), "width": _SIZE, "height": _SIZE},
    "annotations": {
        "id": (lambda value: _is_whole(value) and 0 < value < 2**53, "a whole number above 0"),
        **dict.fromkeys(("image_id", "category_id"), _ID),
        "bbox": (_is_box, "[x, y, width, height], numbers of pixels, the last two not negative"),
        "area": (_is_number, "a number"),
        "iscrowd": (lambda value: value in (0, 1), "0 or 1"),
    },
    "categories": {"id": _ID, "name": (_is_text, "text")},
}
"""What MMDetection and pycocotools read of each entry: a test of the value, and what it should be in words. For
pycocotools, the annotation 0 is none: finding it would count as a mistake."""


def _malformed(document: Mapping[str, Sequence[Any]]) -> Iterator[str]:
    images = {
        entry["id"]: entry.get("file_name")
        for entry in document["images"]
        if isinstance(entry, dict) and _is_id(entry.get("id"))
    }
    for key, fields in _FIELDS.items():
        for index, entry in enumerate(document[key]):
            if not isinstance(entry, dict):
                yield f"{key}[{index}] is {_shown(entry)}, expected an object with {', '.join(fields)}"
                continue
            if missing := [field for field in fields if field not in entry]:
                yield f"{key}[{index}] has no {', '.join(missing)}"
            for field, (is_valid, expected) in fields.items():
                if field in entry and not is_valid(entry[field]):
                    image = images.get(entry.get("image_id")) if _is_id(entry.get("image_id")) else None
                    where = f"id {_shown(entry.get('id'))}" + (f", {_shown(image)}" if image else "")
                    yield f"{key}[{index}] ({where}): {field} is {_shown(entry[field])}, expected {expected}"


def _repeated(document: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    unique = {"images": ("id", "file_name"), "annotations": ("id",), "categories": ("id", "name")}
    for key, fields in unique.items():
        for field in fields:
            for value, count in Counter(entry[field] for entry in document[key]).items():
                if count > 1:
                    yield f"{key}: {field} {_shown(value)} is used {count} times"
        if len({type(entry["id"]) for entry in document[key]}) > 1:
            yield f"{key}: some ids are numbers and some are text; pycocotools cannot sort them"


def _is_skipped(annotation: Mapping[str, Any]) -> bool:
    return annotation["area"] <= 0 or min(annotation["bbox"][2:]) < 1


def _is_maskless(annotation: Mapping[str, Any]) -> bool:
    return not annotation.get("segmentation") and not _is_skipped(annotation)


def _annotation_problems(document: Mapping[str, Sequence[Mapping[str, Any]]], masks: bool) -> Iterator[str]:
    annotations = document["annotations"]
    if all(annotation["iscrowd"] or _is_skipped(annotation) for annotation in annotations):
        what = "only crowd regions and boxes without area" if annotations else "no annotations at all"
        yield f"it has {what}: there is nothing to learn from"
    if masks and (maskless := sum(map(_is_maskless, annotations))):
        yield (
            f"{maskless} of {len(annotations)} annotations have no mask, which this config needs; train a detector of "
            "boxes, e.g. tiny_faster_rcnn"
        )
    images = {image["id"]: image for image in document["images"]}
    for large in images.values():
        if large["width"] * large["height"] > MOST_PIXELS:
            yield f"image {_shown(large['file_name'])}: {large['width']}x{large['height']} is more than OpenCV reads"
    categories = {category["id"]: None for category in document["categories"]}
    for annotation in annotations:
        image = images.get(annotation["image_id"])
        if image is None:
            where = f"image id {_shown(annotation['image_id'])}"
            yield f"annotation {_shown(annotation['id'])}: {where} is not among the images"
            continue
        what = f"annotation {_shown(annotation['id'])} ({_shown(image['file_name'])})"
        if annotation["category_id"] not in categories:
            unknown, known = _shown(annotation["category_id"]), _shown(list(categories))
            yield f"{what}: category id {unknown} is unknown; known: {known}"
        width, height = image["width"], image["height"]
        x, y, box_width, box_height = annotation["bbox"]
        if min(x, y, width - x - box_width, height - y - box_height) < -ROUNDING:
            yield f"{what}: box {annotation['bbox']} leaves its {width}x{height} image"
        if problem := _mask_problem(annotation, width, height):
            yield f"{what}: {problem}"


def _mask_problem(annotation: Mapping[str, Any], width: int, height: int) -> str | None:
    mask: Any = annotation.get("segmentation")
    if isinstance(mask, dict):
        if mask.get("size") != [height, width]:
            found = _shown(mask.get("size"))
            return f"a run-length mask of size {found} in an image of height {height}, width {width}"
        counts = _run_lengths(mask.get("counts"))
        if counts is None:
            return "a run-length mask whose counts cannot be decoded"
        if sum(counts) != height * width:  # pycocotools would not notice
            return f"a run-length mask of {sum(counts)} pixels in an image of {height * width}"
        return None
    if mask is not None and not isinstance(mask, list):
        return f"a mask of type {type(mask).__name__}; expected polygons or run lengths"
    if mask and annotation["iscrowd"]:
        return "a crowd region needs a run-length mask, not polygons"
    for polygon in mask or []:
        if not _are_numbers(polygon):
            return f"a polygon must be a list of numbers x, y, x, y, ...; found {_shown(polygon)}"
        if len(polygon) < 6 or len(polygon) % 2:
            return f"a polygon of {len(polygon)} numbers; it needs at least 3 points, x and y each"
        xs, ys = polygon[::2], polygon[1::2]
        if min(xs) >= width or min(ys) >= height or max(xs) <= 0 or max(ys) <= 0:
            return f"a polygon outside its {width}x{height} image"
        if min(xs) < -width or min(ys) < -height or max(xs) > 2 * width or max(ys) > 2 * height:
            return f"a polygon that leaves its {width}x{height} image by more than the image's own size"
    return None


def _run_lengths(counts: Any) -> list[int] | None:
    """The run lengths of a mask, from a list of them or from COCO's compressed text; ``None`` if they are none.

    The text holds 5 bits of a number and a bit for "more follows" in each character, the lowest first and signed; from
    the fourth number on, a number is the difference to the run before the last.
    """
    if isinstance(counts, list):
        return counts if all(_is_whole(run) and run >= 0 for run in counts) else None
    if not isinstance(counts, str) or not counts or not counts.isascii():
        return None
    letters = np.frombuffer(counts.encode(), np.uint8).astype(np.int64) - ord("0")
    ends = np.flatnonzero(letters & 32 == 0)
    if letters.min() < 0 or letters.max() > 63 or not len(ends) or ends[-1] != len(letters) - 1:
        return None
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 7:  # more than 35 bits: no image is that large
        return None
    shifts = 5 * (np.arange(len(letters)) - np.repeat(starts, lengths))
    runs = np.add.reduceat((letters & 31) << shifts, starts)
    runs -= (letters[ends] & 16 > 0) * (np.int64(1) << 5 * lengths)
    runs[1::2], runs[2::2] = runs[1::2].cumsum(), runs[2::2].cumsum()
    return runs.tolist() if runs.min() >= 0 else None


def _image_problems(document: Mapping[str, Sequence[Mapping[str, Any]]], folder: Path, decode: bool) -> Iterator[str]:
    if not folder.is_dir():
        yield f"the image folder {folder} does not exist"
        return

    def problem(entry: Mapping[str, Any]) -> str | None:
        name = entry["file_name"]
        path = folder / name
        try:
            if not path.is_file():
                return f"image {folder / _shown(name)} is missing"
        except OSError as error:  # a name that no file can have
            return f"image {_shown(name)} is missing: {error.strerror}"
        if not decode:
            return None
        try:
            with opened(path) as image:
                image.load()
                size = image.size
        except SparsityError as error:
            return f"image {error}"
        expected = (entry["width"], entry["height"])
        return None if size == expected else f"image {path} is {size}, the file says {expected}"

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
