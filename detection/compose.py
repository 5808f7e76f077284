"""Composed detection data: small items painted onto photographs, with exact masks, in COCO's format.

No item is in two splits, and no part of a photograph is in both train and the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nm_sparsity.core.experiments import fashion_mnist
from nm_sparsity.detection import coco

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

TRAIN_SHARE = 0.7
"""The left part of every photograph and the first part of the digits are for training."""

TRIES = 20
MOST_HIDDEN = 0.5


@dataclass(frozen=True)
class Items:
    """Pictures to paint: brightness and opacity (n, height, width) in 0..1, labels (n,)."""

    brightness: Floats
    opacity: Floats
    labels: NDArray[np.int64]

    def __getitem__(self, index: slice) -> Items:
        return Items(self.brightness[index], self.opacity[index], self.labels[index])


def digits() -> dict[str, Items]:
    """scikit-learn's 1,797 handwritten 8x8 digits by split: 70% train, 15% val, 15% test."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    opacity = (bunch.images / 16).astype(np.float32)
    items = Items(np.ones_like(opacity), opacity, bunch.target.astype(np.int64))
    split, middle = (int(share * len(opacity)) for share in (TRAIN_SHARE, (1 + TRAIN_SHARE) / 2))
    return {"train": items[:split], "val": items[split:middle], "test": items[middle:]}


def fashion(train: fashion_mnist.Pictures, held_out: fashion_mnist.Pictures) -> dict[str, Items]:
    """Fashion-MNIST's items by split: its training part for train, its test part halved into val and test."""

    def items(pictures: fashion_mnist.Pictures) -> Items:
        brightness = (pictures.images / 255).astype(np.float32)
        return Items(brightness, (pictures.images > 20).astype(np.float32), pictures.labels)

    val_and_test = items(held_out)
    half = len(held_out.labels) // 2
    return {"train": items(train), "val": val_and_test[:half], "test": val_and_test[half:]}


def photographs() -> tuple[list[Bytes], list[Bytes]]:
    """The left parts of scikit-learn's two photographs, for train, and the right parts; each (h, w, 3)."""
    from sklearn.datasets import load_sample_images

    pictures = load_sample_images().images
    splits = [int(TRAIN_SHARE * picture.shape[1]) for picture in pictures]
    left = [picture[:, :split] for picture, split in zip(pictures, splits, strict=True)]
    right = [picture[:, split:] for picture, split in zip(pictures, splits, strict=True)]
    return left, right


def compose(
    rng: np.random.Generator, items: Items, backgrounds: Sequence[Bytes], size: int
) -> tuple[Bytes, list[tuple[int, NDArray[np.bool_]]]]:
    """One picture (size, size, 3) with two to six items, and each item's label and visible mask (size, size).

    An item never hides more than half of another, so every item that can be seen is annotated.
    """
    canvas = _crop(rng, backgrounds[int(rng.integers(len(backgrounds)))], size).astype(np.float32)
    masks: list[NDArray[np.bool_]] = []
    whole: list[int] = []
    labels: list[int] = []
    for _ in range(rng.integers(2, 7)):
        index = rng.integers(len(items.labels))
        side = int(rng.integers(size // 6, size // 2 - size // 16))
        opacity = _resize(items.opacity[index], side)
        for _ in range(TRIES):
            y, x = rng.integers(0, size - side + 1, 2)
            mask = np.zeros((size, size), bool)
            mask[y : y + side, x : x + side] = opacity > 0.5
            if all((m & ~mask).sum() >= (1 - MOST_HIDDEN) * n for m, n in zip(masks, whole, strict=True)):
                break
        else:
            continue
        colour = np.where(rng.random(3) < 0.5, rng.uniform(0, 80, 3), rng.uniform(175, 255, 3)).astype(np.float32)
        ink = _resize(items.brightness[index], side)[..., None] * colour
        window = canvas[y : y + side, x : x + side]
        window += opacity[..., None] * (ink - window)
        masks = [m & ~mask for m in masks] + [mask]
        whole.append(int(mask.sum()))
        labels.append(int(items.labels[index]))
    return canvas.round().astype(np.uint8), list(zip(labels, masks, strict=True))


def _crop(rng: np.random.Generator, picture: Bytes, size: int) -> Bytes:
    """A random square of the picture, at least `size` wide where it can be, mirrored at random, resized to `size`."""
    largest = min(picture.shape[:2])
    side = int(rng.integers(min(size, largest), largest + 1))
    y, x = (int(rng.integers(0, n - side + 1)) for n in picture.shape[:2])
    square = picture[y : y + side, x : x + side]
    if rng.random() < 0.5:
        square = square[:, ::-1]
    return np.asarray(Image.fromarray(np.ascontiguousarray(square)).resize((size, size), Image.Resampling.BILINEAR))


def _resize(picture: Floats, side: int) -> Floats:
    return np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BILINEAR))


def write_split(
    out: Path,
    split: str,
    items: Items,
    backgrounds: Sequence[Bytes],
    classes: Sequence[str],
    count: int,
    size: int,
    seed: int,
) -> None:
    """Write ``out/split/*.jpg`` and ``out/annotations/instances_split.json``; the same arguments give the same data."""
    rng = np.random.default_rng([seed, *split.encode()])
    (out / split).mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for number in range(1, count + 1):
        picture, objects = compose(rng, items, backgrounds, size)
        name = f"{number:06d}.jpg"
        Image.fromarray(picture).save(out / split / name, quality=95)
        images.append({"id": number, "file_name": name, "width": size, "height": size})
        annotations += [coco.instance(number, label + 1, mask) for label, mask in objects]
    coco.write(out / "annotations" / f"instances_{split}.json", images, annotations, classes)
