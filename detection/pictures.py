"""Pictures with objects drawn on them, each under a line that says whether they are the truth or a prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as rle

from nm_sparsity.core.experiments.images import opened

Objects = Sequence[Mapping[str, Any]]
"""COCO's results or annotations; a mask is run lengths."""

Colour = tuple[int, int, int]

WIDTH = 384
"""Pixels of a picture in a grid."""
LINE = 26
"""Height of the line above a picture."""


def draw(file: Path, objects: Objects, names: Mapping[int, str], title: str, width: int | None = None) -> Image.Image:
    """The picture in `file`, under `title`, with the boxes, masks, names and scores of `objects`.

    Args:
        names: those of the categories, by id.
        width: in pixels; by default that of the picture, at least `WIDTH`.

    Raises:
        SparsityError: if the file cannot be read as a picture.
    """
    with opened(file) as image:
        picture: Image.Image = image.convert("RGB")
    scale = (width or max(picture.width, WIDTH)) / picture.width
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)))
    font = ImageFont.truetype(findfont("DejaVu Sans"), 14)
    colours = [_colour(list(names).index(one["category_id"]), len(names)) for one in objects]
    for one, colour in zip(objects, colours, strict=True):
        if one.get("segmentation"):
            inside = Image.fromarray(255 * rle.decode(one["segmentation"])).resize(picture.size)
            mixed = Image.blend(picture, Image.new("RGB", picture.size, colour), 0.4)
            picture.paste(mixed, mask=inside)
    pen = ImageDraw.Draw(picture)
    for one, colour in zip(objects, colours, strict=True):
        x, y, box_width, box_height = (scale * number for number in one["bbox"])
        corners = (x, y, x + box_width, y + box_height)
        pen.rectangle(corners, outline="black", width=4)  # seen on any ground, and the colour on it
        pen.rectangle(corners, outline=colour, width=2)
        score = f" {one['score']:.2f}" if "score" in one else ""
        text = f"{names[one['category_id']]}{score}"
        place = (max(0.0, x), max(0.0, y - 17))
        pen.rectangle(pen.textbbox(place, text, font), fill="black")
        pen.text(place, text, colour, font)
    return _under(title, picture, font)


def grid(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Pictures in rows, on white."""
    gap = 4
    heights = [max(picture.height for picture in row) + gap for row in rows]
    width = max(sum(picture.width + gap for picture in row) for row in rows)
    whole = Image.new("RGB", (width, sum(heights)), "white")
    y = 0
    for row, height in zip(rows, heights, strict=True):
        x = 0
        for picture in row:
            whole.paste(picture, (x, y))
            x += picture.width + gap
        y += height
    return whole


def _under(title: str, picture: Image.Image, font: ImageFont.FreeTypeFont) -> Image.Image:
    whole = Image.new("RGB", (picture.width, picture.height + LINE), "white")
    ImageDraw.Draw(whole).text((4, 4), title, "black", font)
    whole.paste(picture, (0, LINE))
    return whole


def _colour(number: int, of: int) -> Colour:
    """One of `of` colours as far apart as can be."""
    pixel = Image.new("HSV", (1, 1), (255 * number // of, 200, 255)).convert("RGB").getpixel((0, 0))
    red, green, blue = np.array(pixel).tolist()
    return red, green, blue
