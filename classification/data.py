"""Images: three data sets, their splits, and batches whose content depends on the seed alone.

What a batch holds does not depend on how many processes share the work, on loader processes, or on where a run was
interrupted: the order of an epoch and the augmentation of each part of a batch are seeded by their position.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from nm_sparsity.classification import distributed
from nm_sparsity.classification.configs import ClassifierConfig, DataConfig
from nm_sparsity.core import SparsityError
from nm_sparsity.core.experiments import fashion_mnist
from nm_sparsity.core.experiments.command_line import leave_stops
from nm_sparsity.core.experiments.images import EXTENSIONS, image_files, opened

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Part:
    """Which images to take from a data set, and the seed of their augmentation (None: none)."""

    indices: list[int]
    seed: int | None = None


class Images(Dataset[Any]):
    """A data set that answers a whole `Part`: images (n, 3, height, width) float32 and labels (n,) int64."""

    def __len__(self) -> int:
        raise NotImplementedError

    def take(self, indices: list[int], augment: bool) -> tuple[Tensor, Tensor]:
        """The images and labels at `indices`, augmented from torch's global generator if `augment`."""
        raise NotImplementedError

    def __getitem__(self, part: Part) -> tuple[Tensor, Tensor] | SparsityError:
        """What `take` gives, or its error as a value: raised in a loader process, it would lose its shape."""
        try:
            if part.seed is None:
                return self.take(part.indices, augment=False)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(part.seed)
                return self.take(part.indices, augment=True)
        except SparsityError as error:
            return error


@dataclass(frozen=True)
class Splits:
    """Train on `train`, choose on `val`, report on `test` (the same as `val` where a data set has no third part)."""

    train: Images
    val: Images
    test: Images
    names: tuple[str, ...]
    """Of the classes, in the order of the labels."""

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return len(self.names)


def load_splits(config: DataConfig) -> Splits:
    """The data set that `config` names.

    Raises:
        SparsityError: if it is not there (with the commands that get it) or not as it should be.
    """
    return {"digits": _digits, "fashion-mnist": _fashion_mnist, "imagefolder": _image_folder}[config.name](config)


def _some(train: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], count: int | None) -> np.ndarray[Any, Any]:
    """`count` of the indices `train`, the same share of each class; all of them for ``None``.

    Raises:
        SparsityError: if there are fewer, or some class would have none on one side.
    """
    if count is None or count == len(train):
        return train
    classes = len(np.unique(labels[train]))
    if not classes <= count <= len(train) - classes:
        raise SparsityError(
            f"data.images is {count}, expected {classes} (one of each class) to {len(train) - classes}, or all "
            f"{len(train)} training images"
        )
    return train[stratified(labels[train], count)[0]]


def train_batches(
    images: Images, config: ClassifierConfig, epoch: int, first_step: int
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """This process's share of each optimizer step of `epoch` from `first_step` on, as `config.accumulation` parts.

    The last, incomplete batch of an epoch is left out.

    Raises:
        SparsityError: if a batch cannot be shared equally, or an image cannot be read.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_seed(config.seed, epoch)))
    size = part_size(config)
    shares = distributed.world() * config.accumulation
    mine = range(distributed.rank(), shares, distributed.world())
    parts = []
    for step in range(first_step, steps_per_epoch(images, config)):
        for k in (step * shares + share for share in mine):
            parts.append(Part(order[k * size : (k + 1) * size].tolist(), _seed(config.seed, epoch, k)))
    loaded = _load(images, parts, config)
    return ([next(loaded) for _ in mine] for _ in range(first_step, steps_per_epoch(images, config)))


def eval_batches(images: Images, config: ClassifierConfig, size: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of `images`, each exactly once over all processes.

    Args:
        size: images at once. By default as many as in training; where those are few four times as many, up to 256,
            since without gradients they take less memory.
    """
    mine = list(range(len(images)))[distributed.rank() :: distributed.world()]
    part = max(config.batch_size // (distributed.world() * config.accumulation), 1)
    size = size or max(part, min(4 * part, 256))
    return _load(images, [Part(mine[i : i + size]) for i in range(0, len(mine), size)], config)


def steps_per_epoch(images: Images, config: ClassifierConfig) -> int:
    """Optimizer steps in one pass over `images`.

    Raises:
        SparsityError: if there are fewer images than one batch.
    """
    if len(images) < config.batch_size:
        raise SparsityError(f"batch_size {config.batch_size} is more than the {len(images)} training images")
    return len(images) // config.batch_size


def part_size(config: ClassifierConfig) -> int:
    """Images that a process holds at once in training."""
    shares = distributed.world() * config.accumulation
    if config.batch_size % shares:
        raise SparsityError(
            f"batch_size {config.batch_size} cannot be shared equally by {distributed.world()} processes "
            f"x accumulation {config.accumulation}; make it a multiple of {shares}"
        )
    return config.batch_size // shares


def _load(images: Images, parts: Sequence[Part], config: ClassifierConfig) -> Iterator[tuple[Tensor, Tensor]]:
    loader: Iterable[Any] = DataLoader(
        images,
        sampler=parts,
        batch_size=None,
        generator=torch.Generator(),  # its own, so that making a loader leaves the global one alone
        num_workers=min(config.data.workers, len(parts), len(os.sched_getaffinity(0))),
        pin_memory=torch.cuda.is_available() and config.device != "cpu",
        worker_init_fn=leave_stops,
    )
    for batch in loader:
        if isinstance(batch, SparsityError):
            raise batch
        yield batch[0], batch[1]


def _seed(*position: int) -> int:
    return int(np.random.SeedSequence(position).generate_state(1)[0])


@dataclass(frozen=True)
class Small:
    """A kind of small greyscale images: their side, how they are augmented, and how their pixels are distributed."""

    size: int
    shift: int
    """Up to how many pixels an image is moved."""
    flip: bool
    mean: float
    """Of pixels in [0, 1]."""
    std: float
    classes: tuple[str, ...]

    def normalize(self, images: Tensor) -> Tensor:
        """(n, height, width) uint8 as a model takes it: (n, 3, height, width) float32."""
        normal = (images.float() / 255 - self.mean) / self.std
        return normal.unsqueeze(1).repeat(1, 3, 1, 1)


SMALL = {
    "digits": Small(8, 1, False, 0.305, 0.376, tuple("0123456789")),
    "fashion-mnist": Small(28, 2, True, 0.286, 0.353, tuple(fashion_mnist.CLASSES)),
}


class SmallImages(Images):
    """Greyscale images in memory, (n, height, width) uint8; augmented by shifts, and flips if their kind has them."""

    def __init__(self, images: Tensor, labels: Tensor, kind: Small) -> None:
        self.images, self.labels, self.kind = images, labels, kind

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: list[int], augment: bool) -> tuple[Tensor, Tensor]:
        at = torch.tensor(indices)
        images = self.images[at]
        if augment:
            images = self._augment(images)
        return self.kind.normalize(images), self.labels[at]

    def _augment(self, images: Tensor) -> Tensor:
        n, height, width = images.shape
        shift = self.kind.shift
        top, left = torch.randint(2 * shift + 1, (2, n, 1))
        rows, columns = top + torch.arange(height), left + torch.arange(width)
        padded = F.pad(images, [shift] * 4)
        shifted = padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
        if self.kind.flip:
            shifted = torch.where(torch.rand(n, 1, 1) < 0.5, shifted.flip(2), shifted)
        return shifted


def _digits(config: DataConfig) -> Splits:
    """scikit-learn's embedded digits: 1,797 of 8x8 pixels, 60% to train, 20% to choose on, 20% to report on."""
    from sklearn.datasets import load_digits

    pixels, target = load_digits(return_X_y=True)
    images = torch.from_numpy(np.asarray(pixels * 255 / 16, dtype=np.uint8).reshape(-1, 8, 8))
    labels = torch.from_numpy(np.asarray(target, dtype=np.int64))
    test, rest = stratified(labels.numpy(), 0.2)
    val_of_rest, train_of_rest = stratified(labels.numpy()[rest], 0.25)
    train, val = _some(rest[train_of_rest], labels.numpy(), config.images), rest[val_of_rest]

    def part(at: np.ndarray[Any, Any]) -> SmallImages:
        return SmallImages(images[at], labels[at], SMALL["digits"])

    return Splits(part(train), part(val), part(test), SMALL["digits"].classes)


def _fashion_mnist(config: DataConfig) -> Splits:
    """Fashion-MNIST: 54,000 to train on and 6,000 to choose on from its train part, 10,000 to report on."""
    pictures, held_out = fashion_mnist.read(config.root)
    val, train = stratified(pictures.labels, 0.1)
    train = _some(train, pictures.labels, config.images)

    def part(of: fashion_mnist.Pictures, at: Any = slice(None)) -> SmallImages:
        images, labels = torch.from_numpy(of.images[at]), torch.from_numpy(of.labels[at])
        return SmallImages(images, labels, SMALL["fashion-mnist"])

    return Splits(part(pictures, train), part(pictures, val), part(held_out), SMALL["fashion-mnist"].classes)


def stratified(labels: np.ndarray[Any, Any], share: float | int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Two sets of indices, the first with `share` of each class, the second with the rest; always the same ones.

    A whole number is how many indices the first one has.
    """
    from sklearn.model_selection import train_test_split

    rest, held_out = train_test_split(np.arange(len(labels)), test_size=share, stratify=labels, random_state=0)
    return np.sort(held_out), np.sort(rest)


class ImageFolder(Images):
    """Files in one folder a class, numbered as in `classes`."""

    def __init__(
        self, root: Path, classes: Sequence[str], train: Callable[..., Any], plain: Callable[..., Any]
    ) -> None:
        self.train, self.plain = train, plain
        self.files: list[tuple[Path, int]] = []
        for label, name in enumerate(classes):
            files = image_files(root / name)
            if not files:
                raise SparsityError(f"{root / name} holds no images ({', '.join(EXTENSIONS)}); add some or remove it")
            self.files += [(path, label) for path in files]

    def __len__(self) -> int:
        return len(self.files)

    def take(self, indices: list[int], augment: bool) -> tuple[Tensor, Tensor]:
        transform = self.train if augment else self.plain
        images = [transform(read_image(self.files[i][0])) for i in indices]
        return torch.stack(images), torch.tensor([self.files[i][1] for i in indices])


def _image_folder(config: DataConfig) -> Splits:
    """ImageNet's layout and the paper's recipe. Its val part is what papers report on; others may have a test part."""
    third = config.root / "test"  # ImageNet's own has no labels, and so no folders
    parts = (
        ("train", "val", "test") if third.is_dir() and any(p.is_dir() for p in third.iterdir()) else ("train", "val")
    )
    folders = {part: config.root / part for part in parts}
    for folder in folders.values():
        if not folder.is_dir():
            raise SparsityError(
                f"{folder} is not there; imagefolder wants ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg.\n"
                "For ImageNet: accept the terms at https://image-net.org/download-images, fetch ILSVRC2012's "
                f"img_train.tar, img_val.tar and devkit_t12.tar.gz into {config.root}, and unpack them with\n"
                f"  python -c \"from torchvision.datasets import ImageNet as I; [I('{config.root}', s) for s in "
                "('train', 'val')]\""
            )
    classes = {part: _class_folders(folder) for part, folder in folders.items()}
    if not classes["train"]:
        raise SparsityError(f"{folders['train']} holds no class folders; imagefolder wants ROOT/train/CLASS/*.jpg")
    for part in parts[1:]:
        if classes["train"] != classes[part]:
            only = {
                "train": sorted(set(classes["train"]) - set(classes[part])),
                part: sorted(set(classes[part]) - set(classes["train"])),
            }
            found = "; ".join(f"only in {part}: {', '.join(names[:5])}" for part, names in only.items() if names)
            raise SparsityError(
                f"the classes of {folders['train']} and {folders[part]} differ ({found}); give both the same"
            )
    train = v2.Compose(
        [v2.RandomResizedCrop(config.image_size), v2.RandomHorizontalFlip(), *_TO_TENSOR, pca_jitter, _NORMALIZE]
    )
    plain = plain_transform(config)
    sets = {part: ImageFolder(folder, classes[part], train, plain) for part, folder in folders.items()}
    return Splits(sets["train"], sets["val"], sets.get("test", sets["val"]), tuple(classes["train"]))


def _class_folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def class_names(config: DataConfig) -> tuple[str, ...] | None:
    """The names of the data's classes, in the order of their labels; ``None`` where the data is not there to ask."""
    if config.name in SMALL:
        return SMALL[config.name].classes
    train = config.root / "train"
    return tuple(_class_folders(train)) if train.is_dir() else None


_TO_TENSOR = (v2.ToImage(), v2.ToDtype(torch.float32, scale=True))
_NORMALIZE = v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)


def plain_transform(config: DataConfig) -> Callable[[Image.Image], Tensor]:
    """How a picture becomes what a model of this data takes when it is evaluated: (3, height, width) float32."""
    if config.name in SMALL:
        kind = SMALL[config.name]

        def transform(picture: Image.Image) -> Tensor:
            pixels = np.array(picture.convert("L").resize((kind.size, kind.size), Image.Resampling.BOX))
            return kind.normalize(torch.from_numpy(pixels)[None])[0]

        return transform
    size = config.image_size
    return v2.Compose([v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size), *_TO_TENSOR, _NORMALIZE])


def read_image(path: Path) -> Image.Image:
    """The picture in a file, in colour.

    Raises:
        SparsityError: if it cannot be read.
    """
    with opened(path) as image:
        return cast(Image.Image, image.convert("RGB"))


# Eigenvalues and eigenvectors (columns) of the RGB covariance of ImageNet's pixels in [0, 1], as published with
# Krizhevsky et al.'s colour augmentation (NeurIPS 2012, section 4.1).
PCA_VALUES = torch.tensor([0.2175, 0.0188, 0.0045])
PCA_VECTORS = torch.tensor(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]],
)


def pca_jitter(image: Tensor) -> Tensor:
    """Krizhevsky et al.'s colour jitter: ``image + P (alpha * lambda)`` with alpha ~ N(0, 0.1), one shift an image.

    `image` is (3, height, width) with values in [0, 1]; values are not clamped.
    """
    alpha = torch.randn(3) * 0.1
    return image + (PCA_VECTORS @ (alpha * PCA_VALUES)).view(3, 1, 1)
