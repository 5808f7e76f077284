"""The annotation checks: each broken data set is named with its file, its annotation, and what is wrong."""

from __future__ import annotations

import copy
import io
import json
import math
import struct
import zlib
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from nm_sparsity.detection import coco

Document = dict[str, list[dict[str, Any]]]


@pytest.fixture
def document() -> Document:
    return example()


def example() -> Document:
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
    assert check(document) == coco.Summary(
        images=2, annotations=4, categories=("thing",), crowds=1, skipped=1, maskless=0
    )


def test_masks_and_their_boxes_agree_with_pycocotools(document: Document) -> None:
    assert document["annotations"][1]["bbox"] == [10, 5, 10, 10]
    assert document["annotations"][1]["area"] == 100


def compressed(*counts: int) -> str:
    """The text that pycocotools makes of run lengths."""
    mask = {"size": [sum(counts), 1], "counts": list(counts)}
    return str(rle.frPyObjects(mask, *mask["size"])["counts"].decode())


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
            r"\[0\] \(id 1, 1\.jpg\): bbox is \[5, 5, -2, 4\], expected \[x, y, width, height\], .* not negative",
        ),
        ("annotations", 1, {"bbox": [0, math.inf, 2, 4]}, r"\(id 2, 2\.jpg\): bbox is \[0, inf, 2, 4\], expected \[x"),
        ("annotations", 1, {"bbox": [0, 1, 2]}, r"\(id 2, 2\.jpg\): bbox is \[0, 1, 2\], expected \[x, y, width, h"),
        ("annotations", 1, {"bbox": [-9, 1, 2, 3]}, r"annotation 2 \(2\.jpg\): box \[-9, 1, 2, 3\] leaves its 40x30 "),
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
        *(
            ("annotations", 1, {"segmentation": {"size": [30, 40], "counts": counts}}, message)
            for counts, message in (
                (compressed(1000, 201), r"of 1201 pixels in an image of 1200"),
                ([1000, 201], r"of 1201 pixels in an image of 1200"),
                ([1300, -100], r"counts cannot be decoded"),
                ([1100.5, 99.5], r"counts cannot be decoded"),
                ("h", r"counts cannot be decoded"),
                ("ÿ", r"counts cannot be decoded"),
                ("", r"counts cannot be decoded"),
                ("o" * 40 + "0", r"counts cannot be decoded"),
            )
        ),
        ("annotations", 0, {"segmentation": [[1, 2, 1e12, 2, 11, 10]]}, r"leaves its 40x30 image by more than"),
        ("annotations", 1, {"id": 1}, r"annotations: id 1 is used 2 times"),
        ("images", 1, {"file_name": "1.jpg"}, r"images: file_name 1\.jpg is used 2 times"),
        ("images", 0, {"file_name": "x" * 5000}, r"image 'x{20,}\.\.\.x+' is missing: File name too long"),
        ("images", 0, {"file_name": "a\nb.jpg"}, r"image .*'a\\nb\.jpg' is missing"),
        ("images", 0, {"file_name": "a\0b.jpg"}, r"image .*'a\\x00b\.jpg' is missing"),
        ("images", 0, {"width": 2**20, "height": 2**20}, r"image 1\.jpg: 1048576x1048576 is more than OpenCV reads"),
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
        ("annotations", [None, "80", 10**400, True], "area"),
        ("annotations", [None, 2, "no"], "iscrowd"),
        ("annotations", [None, [1], {}, 10**400, 1.5, "1", 0], "id"),
        ("annotations", [[1]], "image_id"),
        ("annotations", [{}], "category_id"),
        ("images", ["40", None, 0, 40.5, True, 10**400], "width"),
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
    assert "; 1 have no mask: for detectors of boxes" in str(check(document))
    with pytest.raises(coco.DataError, match=r"1 of 4 annotations have no mask, which this config needs; train a det"):
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
    with pytest.raises(coco.DataError, match=r"image .*/2\.jpg cannot be read as an image .*truncated"):
        check(document)


def test_a_picture_that_claims_30000_pixels_a_side_is_named(
    document: Document, check: Callable[..., coco.Summary], tmp_path: Path
) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
    png = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    (tmp_path / "1.jpg").write_bytes(png)
    with pytest.raises(coco.DataError, match=r"1\.jpg cannot be read as an image .*900000000 pixels.* exceeds limit"):
        check(document)


@given(st.lists(st.integers(0, 2**24 - 1), min_size=1, max_size=30))
def test_compressed_run_lengths_are_read_as_pycocotools_writes_them(counts: list[int]) -> None:
    """Of five characters each at most: pycocotools has room for six and writes beyond that without a look."""
    assert coco._run_lengths(rle.frPyObjects({"size": [1, 1], "counts": counts}, 1, 1)["counts"].decode()) == counts


ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-50, 50)
    | st.sampled_from([2**31, 2**53, 2**63, 10**400, -(10**400), 1e300, -1e300, 5e-324, math.inf, math.nan])
    | st.floats(-50, 50)
    | st.text(max_size=6)
    | st.sampled_from(["", "\0", "\n", "..", "/", "\ud800", "x" * 3000, "1.jpg", "2.jpg", "52203"]),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.sampled_from(["size", "counts", "id"]), inner),
    max_leaves=12,
)
"""Any JSON value, those above all that break readers."""


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value inside of `value`."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in entries for place in places(inner, (*path, key)))]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_document_is_refused_in_short_lines_or_read_by_pycocotools(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """One to three values, entries or lists of a good file are replaced, removed or repeated."""
    folder = tmp_path_factory.getbasetemp()
    document = example()
    for image in document["images"]:
        Image.new("RGB", (40, 30)).save(folder / image["file_name"])
    for _ in range(data.draw(st.integers(1, 3))):
        *path, last = data.draw(st.sampled_from(places(document)[1:]))
        owner: Any = document
        for key in path:
            owner = owner[key]
        how = data.draw(st.sampled_from(["replace", "replace", "remove", "repeat"]))
        if how == "replace":
            owner[last] = data.draw(ANY)
        elif how == "remove":
            del owner[last]
        elif isinstance(owner, list):
            owner.append(owner[last])
    (folder / "fuzzed.json").write_text(json.dumps(document))
    try:
        coco.check(folder / "fuzzed.json", folder, decode=True)
    except coco.DataError as error:
        lines = str(error).splitlines()
        assert len(lines) <= coco.SHOWN + 2
        assert all(len(line) < 300 + len(str(folder)) for line in lines)
        return
    with redirect_stdout(io.StringIO()):
        truth = COCO(folder / "fuzzed.json")
    for annotation in truth.dataset["annotations"]:
        if annotation.get("segmentation"):
            assert truth.annToMask(annotation).shape == (30, 40)
    found = [{**annotation, "score": 0.5} for annotation in truth.dataset["annotations"]]
    with redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(found)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()


def test_long_lists_are_cut(document: Document, check: Callable[..., coco.Summary]) -> None:
    document["images"] += [{"id": i, "file_name": f"{i}.jpg", "width": 40, "height": 30} for i in range(3, 33)]
    with pytest.raises(coco.DataError, match=r"is missing\n  \.\.\. and 20 more$"):
        check(document)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "not a COCO file"),
        ("[" * 200_000, "nested too deeply"),
        ("9" * 5000, "is not JSON: Exceeds the limit"),
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
