"""PASCAL VOC XML to COCO's format."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from nm_sparsity.core.errors import SparsityError
from nm_sparsity.core.experiments.images import opened
from nm_sparsity.detection import coco


@dataclass(frozen=True)
class Box:
    """An object: pixel edges (x1, y1, x2, y2), and whether VOC calls it difficult (not counted in evaluation)."""

    name: str
    edges: tuple[float, float, float, float]
    difficult: bool


def read(path: Path) -> tuple[str, list[Box]]:
    """The image's file name and its boxes. VOC counts pixels from 1 and includes the last.

    Raises:
        DataError: for XML that is broken or lacks a field, with the file's name.
    """
    try:
        root = ElementTree.parse(path).getroot()
        boxes = []
        for entry in root.iter("object"):
            x1, y1, x2, y2 = corners = [float(_text(entry, f"bndbox/{key}")) for key in _CORNERS]
            if not all(map(math.isfinite, corners)) or x2 < x1 or y2 < y1:
                raise ValueError(f"a <bndbox> is {', '.join(map(str, corners))}; expected {', '.join(_CORNERS)}")
            edges = (x1 - 1, y1 - 1, x2, y2)
            boxes.append(Box(_text(entry, "name"), edges, entry.findtext("difficult", "0").strip() == "1"))
        return _text(root, "filename"), boxes
    except (ElementTree.ParseError, OSError, ValueError) as error:
        raise coco.DataError(f"{path} is not a VOC annotation: {error}") from None


_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def _text(element: ElementTree.Element, key: str) -> str:
    text = element.findtext(key)
    if text is None:
        raise ValueError(f"<{element.tag}> has no <{key}>")
    return text.strip()


def convert(source: Path, out: Path, val_share: float = 0.2, seed: int = 0) -> None:
    """A VOC folder (``Annotations/*.xml``, ``JPEGImages/``) to COCO's format in `out`, ``train`` and ``val``.

    ``ImageSets/Main/train.txt`` and ``val.txt`` give the split where they are; else `val_share` of the images, drawn
    by `seed`. Difficult objects become crowd regions: evaluation ignores them, as VOC's does.
    """
    files = {path.stem: path for path in sorted((source / "Annotations").glob("*.xml"))}
    if not files:
        raise coco.DataError(
            f"{source / 'Annotations'} holds no XML files; expected a VOC folder (Annotations, JPEGImages)"
        )
    read_files = {stem: read(path) for stem, path in files.items()}
    classes = sorted({box.name for _, boxes in read_files.values() for box in boxes})
    used: dict[str, Path] = {}
    for split, stems in _voc_split(source, list(files), val_share, seed).items():
        images, annotations = [], []
        (out / split).mkdir(parents=True, exist_ok=True)
        for number, stem in enumerate(stems, 1):
            if stem not in read_files:
                raise coco.DataError(f"{source}/ImageSets/Main/{split}.txt names {stem}, which has no annotation file")
            name, boxes = read_files[stem]
            name = Path(name).name  # some tools write the path on the annotator's machine
            picture = source / "JPEGImages" / name
            if (other := used.setdefault(name, files[stem])) != files[stem]:
                raise coco.DataError(f"{files[stem]} and {other} are of the same picture, {name}")
            try:
                with opened(picture) as image:
                    width, height = image.size
            except SparsityError as error:
                raise coco.DataError(f"the picture of {files[stem]} is missing or damaged: {error}") from None
            shutil.copyfile(picture, out / split / name)
            images.append({"id": number, "file_name": name, "width": width, "height": height})
            for box in boxes:
                x1, y1, x2, y2 = np.clip(box.edges, 0, [width, height, width, height]).tolist()
                entry = coco.box(number, classes.index(box.name) + 1, x1, y1, x2 - x1, y2 - y1)
                annotations.append({**entry, "iscrowd": int(box.difficult)})
        coco.write(out / "annotations" / f"instances_{split}.json", images, annotations, classes)


def _voc_split(source: Path, stems: Sequence[str], val_share: float, seed: int) -> Mapping[str, Sequence[str]]:
    lists = {split: source / "ImageSets" / "Main" / f"{split}.txt" for split in ("train", "val")}
    if all(path.is_file() for path in lists.values()):
        splits = {
            split: [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
            for split, path in lists.items()
        }
        if both := sorted(set(splits["train"]) & set(splits["val"])):
            raise coco.DataError(f"{both[0]} ({len(both)} in all) is in both {lists['train']} and {lists['val']}")
        return splits
    shuffled = np.random.default_rng(seed).permutation(stems).tolist()
    held_out = round(val_share * len(stems))
    return {"train": sorted(shuffled[held_out:]), "val": sorted(shuffled[:held_out])}
