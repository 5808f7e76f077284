"""Pictures of a user's: whatever is wrong with a file is one line."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
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


def named_classes(file: Path | None, known: Sequence[str] | None, count: int, path: Path) -> tuple[str, ...]:
    """The names of a model's `count` classes: the lines of `file`, or those that are `known`, or else their numbers.

    Whoever asked is told of the last on stderr.

    Raises:
        SparsityError: if `file` cannot be read, or does not name `count` classes of the model in `path`.
    """
    if file is None:
        if known is not None and len(known) == count:
            return tuple(known)
        print(f"{path} does not name its classes: they are numbered (--classes FILE: a name a line)", file=sys.stderr)
        return tuple(map(str, range(count)))
    try:
        names = tuple(file.read_text(encoding="utf-8").splitlines())
    except OSError as error:
        raise SparsityError(f"cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SparsityError(f"{file} is not UTF-8 text; expected the name of a class a line") from None
    if len(names) != count:
        raise SparsityError(f"{file} names {len(names)} classes, {path} tells {count} apart; expected a name a line")
    return names


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
