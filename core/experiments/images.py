"""Pictures of a user's: whatever is wrong with a file is one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nm_sparsity.core.errors import SparsityError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Of the files that count as pictures."""


def image_files(folder: Path) -> list[Path]:
    """The pictures in `folder` and the folders in it, by name."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)


def named_images(path: Path) -> list[Path]:
    """The file `path`, or the pictures in the folder `path`.

    Raises:
        SparsityError: if there is none.
    """
    if not path.exists():
        raise SparsityError(f"there is no picture {path}")
    if not path.is_dir():
        return [path]
    if not (files := image_files(path)):
        raise SparsityError(f"{path} holds no pictures ({', '.join(EXTENSIONS)})")
    return files


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The Pillow image in the file `path`, whose pixels are to be read within the block.

    Raises:
        SparsityError: if Pillow cannot read it there, for whatever reason: damaged, cut short, no picture, or one that
            claims more pixels than Pillow takes for honest.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:  # Pillow passes on what its decoders run into.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise SparsityError(f"{path} cannot be read as an image ({reason}); fetch it again or remove it") from None
