"""The data sets that `prepare` makes."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from nm_sparsity.core import SparsityError
from nm_sparsity.core.experiments import fashion_mnist
from nm_sparsity.detection import coco, compose, prepare, voc


def test_composed_masks_are_exact(data: Path) -> None:
    """Boxes and areas follow from the masks, masks do not overlap, and every picture has its objects."""
    truth = COCO(str(data / "annotations" / "instances_train.json"))
    assert len(truth.imgs) == 8
    for number in truth.imgs:
        annotations = truth.imgToAnns[number]
        masks = np.stack([truth.annToMask(a) for a in annotations])
        assert masks.sum(0).max() == 1
        for annotation, mask in zip(annotations, masks, strict=True):
            rows, columns = np.nonzero(mask)
            x, y, width, height = annotation["bbox"]
            assert (x, y, x + width, y + height) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert annotation["area"] == mask.sum() > 0


def test_a_mask_is_where_the_item_was_painted() -> None:
    """On a background that no ink has, the visible masks are the pixels that changed, but for blended edges."""
    ones = np.ones((1, 8, 8), np.float32)
    items = compose.Items(ones, ones, np.array([3]))
    background = np.full((200, 200, 3), 127, np.uint8)
    picture, objects = compose.compose(np.random.default_rng(0), items, [background], 96)
    changed = (picture != 127).any(-1)
    assert len(objects) >= 2
    assert {label for label, _ in objects} == {3}
    assert np.array_equal(changed, np.any([mask for _, mask in objects], 0))


def test_composed_data_repeats_and_splits_are_disjoint(data: Path, tmp_path: Path) -> None:
    prepare.composed(tmp_path, train=8, val=4, size=64)
    for split in ("train", "val", "test"):
        file = Path("annotations") / f"instances_{split}.json"
        assert (tmp_path / file).read_bytes() == (data / file).read_bytes()
        assert (tmp_path / split / "000001.jpg").read_bytes() == (data / split / "000001.jpg").read_bytes()
    splits = compose.digits()
    assert sum(len(items.labels) for items in splits.values()) == 1797
    left, right = compose.photographs()
    assert [a.shape[1] + b.shape[1] for a, b in zip(left, right, strict=True)] == [640, 640]


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


def test_fashion_paints_its_items_and_halves_the_test_part(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, count in (("train", 20), ("t10k", 10)):
        write_idx(tmp_path / f"{name}-images-idx3-ubyte.gz", rng.integers(0, 255, (count, 28, 28)))
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte.gz", np.arange(count) % 10)
    items = compose.fashion(*fashion_mnist.read(tmp_path))
    assert {split: len(part.labels) for split, part in items.items()} == {"train": 20, "val": 5, "test": 5}
    assert items["test"].labels.tolist() == [5, 6, 7, 8, 9]
    prepare.fashion(tmp_path / "out", source=tmp_path, train=2, val=1, size=96)
    names = [c["name"] for c in json.loads((tmp_path / "out/annotations/instances_val.json").read_text())["categories"]]
    assert names == list(fashion_mnist.CLASSES)


def xml(name: str, *objects: tuple[str, int, int, int, int, int]) -> str:
    boxes = "".join(
        f"<object><name>{label}</name><difficult>{difficult}</difficult><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin>"
        f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for label, x1, y1, x2, y2, difficult in objects
    )
    return f"<annotation><filename>{name}</filename>{boxes}</annotation>"


@pytest.fixture
def voc_folder(tmp_path: Path) -> Path:
    """Three 50 x 40 pictures; the first with a cat in its top left 10 x 8 pixels and a difficult dog."""
    folder = tmp_path / "VOC"
    (folder / "Annotations").mkdir(parents=True)
    (folder / "JPEGImages").mkdir()
    objects = [("cat", 1, 1, 10, 8, 0), ("dog", 20, 20, 50, 40, 1)]
    for number in range(3):
        Image.new("RGB", (50, 40)).save(folder / "JPEGImages" / f"{number}.jpg")
        (folder / "Annotations" / f"{number}.xml").write_text(xml(f"{number}.jpg", *objects[: 2 - number]))
    return folder


def test_voc_boxes_are_converted(voc_folder: Path, tmp_path: Path) -> None:
    lists = voc_folder / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("0\n")
    (lists / "val.txt").write_text("1\n2\n")
    prepare.prepare_voc(voc_folder, tmp_path / "out")
    train = json.loads((tmp_path / "out/annotations/instances_train.json").read_text())
    assert [(a["bbox"], a["category_id"], a["iscrowd"]) for a in train["annotations"]] == [
        ([0, 0, 10, 8], 1, 0),
        ([19, 19, 31, 21], 2, 1),
    ]
    assert [c["name"] for c in train["categories"]] == ["cat", "dog"]
    assert len(json.loads((tmp_path / "out/annotations/instances_val.json").read_text())["images"]) == 2


def test_a_voc_picture_in_both_splits_is_named(voc_folder: Path, tmp_path: Path) -> None:
    lists = voc_folder / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("0\n1\n")
    (lists / "val.txt").write_text("1\n2\n")
    with pytest.raises(coco.DataError, match=r"^1 \(1 in all\) is in both .*train\.txt and .*val\.txt"):
        voc.convert(voc_folder, tmp_path / "out")


@pytest.mark.parametrize("folder", ["VOC2012/", "../", "/etc/"])
def test_folders_in_voc_file_names_are_left_out(voc_folder: Path, tmp_path: Path, folder: str) -> None:
    (voc_folder / "Annotations/1.xml").write_text(xml(f"{folder}1.jpg", ("cat", 1, 1, 10, 8, 0)))
    voc.convert(voc_folder, tmp_path / "out", val_share=0.5)
    assert sum(1 for _ in (tmp_path / "out").rglob("1.jpg")) == 1


def test_bad_seeds_and_files_as_folders_are_named(tmp_path: Path, voc_folder: Path) -> None:
    with pytest.raises(coco.DataError, match=r"--seed -1: expected 0 or more"):
        prepare.composed(tmp_path / "out", seed=-1)
    (tmp_path / "file").touch()
    for make in (prepare.composed, lambda out: prepare.prepare_voc(voc_folder, out)):
        with pytest.raises(SparsityError, match=r"cannot write to the folder .*/file: File exists"):
            make(tmp_path / "file")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "JPEGImages/1.jpg").unlink(), r"the picture of .*1\.xml is missing .*No such file"),
        (
            lambda folder: (folder / "JPEGImages/1.jpg").write_text("x"),
            r"the picture of .*1\.xml is .*1\.jpg cannot be read as an image",
        ),
        (lambda folder: (folder / "Annotations/1.xml").write_text("<annotation>"), r"1\.xml is not a VOC annotation"),
        (lambda folder: (folder / "Annotations/1.xml").write_text("<a><object/></a>"), r"1\.xml .* no <bndbox/xmin>"),
        *(
            (
                lambda folder, box=box: (folder / "Annotations/1.xml").write_text(xml("1.jpg", ("cat", *box, 0))),
                rf"1\.xml is not a VOC annotation: a <bndbox> is {box[0]}\S*, .*; expected xmin, ymin, xmax, ymax",
            )
            for box in (("nan", 1, 5, 5), ("1", 1, "inf", 5), ("9", 1, 5, 5), ("1", 9, 5, 5))
        ),
        (
            lambda folder: (folder / "Annotations/1.xml").write_text(xml("2.jpg", ("cat", 1, 1, 10, 8, 0))),
            r"[12]\.xml and .*[12]\.xml are of the same picture, 2\.jpg",
        ),
        (
            lambda folder: (folder / "Annotations/1.xml").write_text(xml("x" * 5000, ("cat", 1, 1, 10, 8, 0))),
            r"the picture of .*1\.xml is .*File name too long",
        ),
        (lambda folder: [file.unlink() for file in (folder / "Annotations").iterdir()], "holds no XML files"),
    ],
)
def test_broken_voc_folders_are_named(voc_folder: Path, tmp_path: Path, break_it: object, message: str) -> None:
    assert callable(break_it)
    break_it(voc_folder)
    with pytest.raises(coco.DataError, match=message):
        voc.convert(voc_folder, tmp_path / "out", val_share=0.5)


def test_coco_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train2017").mkdir()
    assert prepare.main(["coco", "--data", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert "val2017.zip" in message
    assert "instances_train2017.json" in message
    assert "train2017.zip" not in message


def test_coco_folder_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train2017", "val2017"):
        (tmp_path / split).mkdir()
        Image.new("RGB", (20, 20)).save(tmp_path / split / "1.jpg")
        mask = np.ones((20, 20), bool)
        images = [{"id": 1, "file_name": "1.jpg", "width": 20, "height": 20}]
        coco.write(tmp_path / f"annotations/instances_{split}.json", images, [coco.instance(1, 1, mask)], ["person"])
    assert prepare.main(["coco", "--out", str(tmp_path), "--decode"]) == 0  # as it was called before
    assert capsys.readouterr().out.count("1 images, 1 annotations in 1 categories") == 2


def test_sizes_that_no_photograph_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(coco.DataError, match="32 to 192 pixels"):
        prepare.composed(tmp_path, size=500)


def test_run_lengths_are_pycocotools_own() -> None:
    mask = np.random.default_rng(0).random((17, 23)) > 0.5
    assert np.array_equal(rle.decode(coco.instance(1, 1, mask)["segmentation"]), mask)
