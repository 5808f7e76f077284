"""The annotation checks: each broken data set is named with its file, its annotation, and what is wrong."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nm_sparsity.detection import coco

Document = dict[str, list[dict[str, Any]]]


@pytest.fixture
def document() -> Document:
    """Two images of 40 x 30 pixels with a polygon, a run-length mask, and a crowd region."""
    mask = np.zeros((30, 40), bool)
    mask[5:15, 10:20] = True
    polygon = {"bbox": [1, 2, 10, 8], "area": 80.0, "iscrowd": 0, "segmentation": [[1, 2, 11, 2, 11, 10, 1, 10]]}
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 40, "height": 30} for i in (1, 2)],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, **polygon},
            {"id": 2, **coco.instance(2, 1, mask)},
            {"id": 3, **coco.instance(2, 1, mask), "iscrowd": 1},
        ],
        "categories": [{"id": 1, "name": "thing"}],
    }


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., coco.Summary]:
    for i in (1, 2):
        Image.new("RGB", (40, 30)).save(tmp_path / f"{i}.jpg")

    def check(document: Document, decode: bool = True) -> coco.Summary:
        (tmp_path / "instances.json").write_text(json.dumps(document))
        return coco.check(tmp_path / "instances.json", tmp_path, decode)

    return check


def test_a_good_file_is_summarised(document: Document, check: Callable[..., coco.Summary]) -> None:
    document["annotations"].append({"id": 4, **coco.box(1, 1, 5.0, 5.0, 0.0, 3.0)})
    assert check(document) == coco.Summary(images=2, annotations=4, categories=("thing",), crowds=1, skipped=1)


def test_masks_and_their_boxes_agree_with_pycocotools(document: Document) -> None:
    assert document["annotations"][1]["bbox"] == [10, 5, 10, 10]
    assert document["annotations"][1]["area"] == 100


def broken(document: Document, key: str, index: int, **changes: Any) -> Document:
    document = copy.deepcopy(document)
    document[key][index].update(changes)
    return document


@pytest.mark.parametrize(
    ("key", "index", "changes", "message"),
    [
        ("images", 0, {"file_name": "gone.jpg"}, r"image .*/gone\.jpg is missing"),
        ("annotations", 0, {"category_id": 9}, r"annotation 1 \(1\.jpg\): category id 9 is unknown; known: \[1\]"),
        ("annotations", 0, {"image_id": 7}, r"annotation 1: image id 7 is not among the images"),
        (
            "annotations",
            0,
            {"bbox": [5, 5, -2, 4]},
            r"annotations\[0\] \(id 1\): bbox is \[5, 5, -2, 4\], expected \[x, y, width, height\]",
        ),
        ("annotations", 0, {"bbox": [30, 5, 20, 4]}, r"box \[30, 5, 20, 4\] leaves its 40x30 image"),
        ("annotations", 0, {"segmentation": [[1, 2, 11, 2]]}, r"a polygon of 4 numbers; it needs at least 3 points"),
        ("annotations", 0, {"iscrowd": 1}, r"a crowd region needs a run-length mask"),
        ("annotations", 1, {"segmentation": {"size": [40, 30], "counts": "x"}}, r"mask of size \[40, 30\] in an image"),
        ("annotations", 0, {"segmentation": [1, 2, 11, 2, 11, 10]}, r"a polygon must be a list of numbers .* found 1"),
        ("annotations", 0, {"segmentation": [[1, 2, 3, 4, 5, "6"]]}, r"a polygon must be a list of numbers"),
        ("annotations", 0, {"segmentation": [[1, 2, 3, 4, 5, float("nan")]]}, r"a polygon must be a list of numbers"),
        ("annotations", 0, {"segmentation": [[50, 2, 60, 2, 60, 9]]}, r"a polygon outside its 40x30 image"),
        ("annotations", 0, {"segmentation": "x"}, r"a mask of type str"),
        ("annotations", 1, {"segmentation": {"size": None, "counts": "x"}}, r"mask of size None in an image"),
        ("annotations", 1, {"segmentation": {"size": [30, 40], "counts": "@@@@"}}, r"counts cannot be decoded"),
        ("annotations", 1, {"segmentation": {"size": [30, 40], "counts": None}}, r"counts cannot be decoded"),
        ("annotations", 1, {"segmentation": {"size": [30, 40], "counts": [9]}}, r"of 9 pixels in an image of 1200"),
        ("annotations", 1, {"id": 1}, r"annotations: id 1 is used 2 times"),
        ("images", 1, {"width": 41}, r"2\.jpg is \(40, 30\), the file says \(41, 30\)"),
    ],
)
def test_each_problem_is_named(
    document: Document, check: Callable[..., coco.Summary], key: str, index: int, changes: Any, message: str
) -> None:
    with pytest.raises(coco.DataError, match=message):
        check(broken(document, key, index, **changes))


@pytest.mark.parametrize(
    ("key", "values", "field"),
    [
        ("annotations", [None, 5, "1234", [[1, 2, 3, 4]], [1, 2, 3, None], [1, 2, 3], [1, 2, 3, float("inf")]], "bbox"),
        ("annotations", [None, "80"], "area"),
        ("annotations", [None, 2, "no"], "iscrowd"),
        ("annotations", [None, [1], {}], "id"),
        ("annotations", [[1]], "image_id"),
        ("annotations", [{}], "category_id"),
        ("images", ["40", None, 0], "width"),
        ("images", [None, 5, ""], "file_name"),
        ("categories", [None, 3], "name"),
    ],
)
def test_entries_of_the_wrong_type_are_named(
    document: Document, check: Callable[..., coco.Summary], key: str, values: list[Any], field: str
) -> None:
    for value in values:
        with pytest.raises(coco.DataError, match=rf"{key}\[0\] \(id .*\): {field} is .*, expected"):
            check(broken(document, key, 0, **{field: value}))
    del document[key][0][field]
    with pytest.raises(coco.DataError, match=rf"{key}\[0\] has no {field}"):
        check(document)


def test_entries_that_are_no_objects_are_named(document: Document, check: Callable[..., coco.Summary]) -> None:
    with pytest.raises(coco.DataError, match=r"annotations\[0\] is 5, expected an object with id, image_id"):
        check({**document, "annotations": [5]})


def test_repeated_category_names_are_refused(document: Document, check: Callable[..., coco.Summary]) -> None:
    document["categories"].append({"id": 2, "name": "thing"})
    with pytest.raises(coco.DataError, match="categories: name thing is used 2 times"):
        check(document)


def test_masks_can_be_required(document: Document, check: Callable[..., coco.Summary], tmp_path: Path) -> None:
    document["annotations"].append({"id": 4, **coco.box(1, 1, 5.0, 5.0, 5.0, 3.0)})
    check(document)
    with pytest.raises(coco.DataError, match=r"annotation 4 \(1\.jpg\) has no mask, which this config needs"):
        coco.check(tmp_path / "instances.json", tmp_path, masks=True)


def test_data_without_anything_to_learn_from_are_refused(
    document: Document, check: Callable[..., coco.Summary]
) -> None:
    crowd, empty = document["annotations"][2], {"id": 4, **coco.box(1, 1, 5.0, 5.0, 0.0, 3.0)}
    with pytest.raises(coco.DataError, match="only crowd regions and boxes without area"):
        check({**document, "annotations": [crowd, empty]})


def test_zero_annotations_are_refused(document: Document, check: Callable[..., coco.Summary]) -> None:
    with pytest.raises(coco.DataError, match="no annotations at all"):
        check({**document, "annotations": []})


def test_a_corrupt_jpeg_is_named(document: Document, check: Callable[..., coco.Summary], tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "2.jpg")
    (tmp_path / "2.jpg").write_bytes((tmp_path / "2.jpg").read_bytes()[:900])
    check(document, decode=False)
    with pytest.raises(coco.DataError, match=r"image .*/2\.jpg is damaged: .*truncated"):
        check(document)


def test_long_lists_are_cut(document: Document, check: Callable[..., coco.Summary]) -> None:
    document["images"] += [{"id": i, "file_name": f"{i}.jpg", "width": 40, "height": 30} for i in range(3, 33)]
    with pytest.raises(coco.DataError, match=r"is missing\n  \.\.\. and 20 more$"):
        check(document)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "not a COCO file"),
        ('{"images": [{}], "annotations": [], "categories": []}', "has no id, file_name, width, height"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(coco.DataError, match=message):
        coco.check(tmp_path / "x.json", tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(coco.DataError, match="no such annotation file"):
        coco.check(tmp_path / "x.json", tmp_path)
    with pytest.raises(coco.DataError, match=r"cannot read .*: Is a directory"):
        coco.check(tmp_path, tmp_path)
