from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nm_sparsity.classification import data, distributed
from nm_sparsity.classification.configs import ClassifierConfig, DataConfig
from nm_sparsity.core import SparsityError

Tiny = Callable[..., ClassifierConfig]


class Numbers(data.Images):
    """n images that hold their own number, plus noise when augmented."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def take(self, indices: list[int], augment: bool) -> tuple[torch.Tensor, torch.Tensor]:
        at = torch.tensor(indices)
        noise = torch.rand(len(indices)) if augment else torch.zeros(len(indices))
        return (at + noise / 2).view(-1, 1, 1, 1).expand(-1, 3, 1, 1), at


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "world", lambda: world)


@given(n=st.integers(1, 700), world=st.integers(1, 5))
def test_evaluation_shares_count_every_image_once(n: int, world: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        seen = []
        for rank in range(world):
            as_rank(patch, rank, world)
            config = ClassifierConfig(batch_size=60)
            seen += [int(i) for _, labels in data.eval_batches(Numbers(n), config) for i in labels]
    assert sorted(seen) == list(range(n))


@pytest.mark.parametrize(
    ("batch", "accumulation", "asked", "size"),
    [(64, 1, None, 256), (64, 8, None, 32), (8, 8, None, 4), (128, 1, None, 256), (512, 1, None, 512), (64, 1, 16, 16)],
)
def test_evaluation_takes_what_is_asked_for_or_little_more_than_training(
    tiny: Tiny, batch: int, accumulation: int, asked: int | None, size: int
) -> None:
    batches = data.eval_batches(Numbers(600), tiny(batch_size=batch, accumulation=accumulation), asked)
    assert [len(labels) for _, labels in batches] == [size] * (600 // size) + [600 % size] * (600 % size > 0)


def test_an_epoch_holds_each_image_once_in_a_new_order(tiny: Tiny) -> None:
    config = tiny(batch_size=10)
    epochs = []
    for epoch in range(2):
        steps = list(data.train_batches(Numbers(57), config, epoch, 0))
        assert [len(parts) for parts in steps] == [1] * 5
        epochs.append([int(i) for [(_, labels)] in steps for i in labels])
        assert len(set(epochs[-1])) == 50
    assert epochs[0] != epochs[1]


def test_batches_do_not_depend_on_processes_workers_or_interruption(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = Numbers(60)
    alone = list(data.train_batches(images, tiny(batch_size=12, accumulation=4), 3, 0))

    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        shared = list(data.train_batches(images, tiny(batch_size=12, accumulation=2), 3, 0))
        for parts, all_parts in zip(shared, alone, strict=True):
            for (found, _), (expected, _) in zip(parts, all_parts[rank::2], strict=True):
                assert torch.equal(found, expected)
    as_rank(monkeypatch, 0, 1)

    later = list(data.train_batches(images, tiny(batch_size=12, accumulation=4, data__workers=2), 3, 2))
    assert len(later) == 3
    for parts, expected_parts in zip(later, alone[2:], strict=True):
        for (found, _), (expected, _) in zip(parts, expected_parts, strict=True):
            assert torch.equal(found, expected)


def test_loading_leaves_the_global_generator_alone(tiny: Tiny) -> None:
    before = torch.get_rng_state()
    list(data.train_batches(Numbers(60), tiny(batch_size=12), 0, 0))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_that_cannot_be_shared_or_filled_is_an_error(tiny: Tiny) -> None:
    with pytest.raises(SparsityError, match="batch_size 10 cannot be shared equally by 1 processes x accumulation 3"):
        data.part_size(tiny(batch_size=10, accumulation=3))
    with pytest.raises(SparsityError, match="batch_size 107 is more than the 20 training images"):
        data.steps_per_epoch(Numbers(20), tiny())


def test_digits_are_split_by_class_without_overlap() -> None:
    splits = data.load_splits(DataConfig("digits"))
    again = data.load_splits(DataConfig("digits"))
    sizes = []
    for part, same in ((splits.train, again.train), (splits.val, again.val), (splits.test, again.test)):
        images, labels = part.take(list(range(len(part))), augment=False)
        assert torch.equal(images, same.take(list(range(len(same))), augment=False)[0])
        assert images.shape[1:] == (3, 8, 8)
        share = torch.bincount(labels, minlength=10) / len(labels)
        assert share == pytest.approx(torch.full((10,), 0.1), abs=0.005)
        sizes.append(len(part))
    assert sizes == [1077, 360, 360]
    pixels = splits.train.take(list(range(1077)), augment=False)[0]
    assert float(pixels.mean()) == pytest.approx(0, abs=0.02)
    assert float(pixels.std()) == pytest.approx(1, abs=0.02)


def test_a_share_of_the_training_images_holds_every_class_and_leaves_some() -> None:
    for count in (10, 500, 1067, 1077):
        train = data.load_splits(DataConfig("digits", images=count)).train
        labels = train.take(list(range(len(train))), augment=False)[1]
        assert (len(labels), len(labels.unique())) == (count, 10)
    for count in (5, 1070, 2000):
        with pytest.raises(SparsityError, match=rf"data.images is {count}, expected 10 .* to 1067, or all 1077"):
            data.load_splits(DataConfig("digits", images=count))


@given(labels=st.lists(st.integers(0, 4), min_size=100, max_size=300), share=st.sampled_from([0.1, 0.2, 0.25]))
def test_stratified_covers_everything_once_and_keeps_shares(labels: list[int], share: float) -> None:
    classes = np.array(labels + 4 * [0, 1, 2, 3, 4])
    held_out, rest = data.stratified(classes, share)
    assert sorted([*held_out, *rest]) == list(range(len(classes)))
    for label in range(5):
        assert abs((classes[held_out] == label).sum() - share * (classes == label).sum()) <= 1


def test_augmentation_shifts_and_flips_whole_images() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 255, (5, 6, 7), dtype=torch.uint8, generator=generator)
    small = data.SmallImages(images, torch.arange(5), data.Small(8, 2, True, 0.0, 1 / 255, ()))
    seen = set()
    for seed in range(60):
        batch, labels = small[data.Part([3, 1], seed)]
        assert labels.tolist() == [3, 1]
        for image, i in zip(batch, (3, 1), strict=True):
            padded = np.pad(images[i].numpy(), 2)
            options = {
                (dy, dx, flip): window[:, ::-1] if flip else window
                for dy in range(5)
                for dx in range(5)
                for flip in (False, True)
                for window in [padded[dy : dy + 6, dx : dx + 7]]
            }
            matches = [k for k, v in options.items() if np.array_equal(v, image[0].round().numpy())]
            assert len(matches) == 1
            assert torch.equal(image[0], image[2])
            seen.add(matches[0])
    assert len(seen) > 40


def test_fashion_mnist_is_found_wherever_a_command_put_it(tmp_path: Path) -> None:
    root = tmp_path / "usr/share/datasets/fashion-mnist"
    root.mkdir(parents=True)
    for part, n in (("train", 100), ("t10k", 20)):
        for kind, shape in (("images-idx3", (n, 28, 28)), ("labels-idx1", (n,))):
            values = np.arange(n).repeat(int(np.prod(shape)) // n).astype(np.uint8) % 10
            header = bytes([0, 0, 8, len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)
            (root / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + values.tobytes()))
    splits = data.load_splits(DataConfig("fashion-mnist", root=tmp_path))
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [90, 10, 20]
    images, labels = splits.test.take([3, 12], augment=False)
    assert labels.tolist() == [3, 2]
    assert images[0].unique() == pytest.approx((3 / 255 - 0.286) / 0.353)


def test_missing_data_sets_say_what_gets_them(tmp_path: Path) -> None:
    if Path("/usr/share/datasets/fashion-mnist").exists():
        pytest.skip("Fashion-MNIST is installed on this machine")
    with pytest.raises(SparsityError, match="one of these gets Fashion-MNIST"):
        data.load_splits(DataConfig("fashion-mnist", root=tmp_path))
    with pytest.raises(SparsityError, match="train is not there; imagefolder wants ROOT/train/CLASS") as imagenet:
        data.load_splits(DataConfig("imagefolder", root=tmp_path))
    assert "image-net.org" in str(imagenet.value)


def test_image_folders_crop_scale_and_normalize(folders: Path) -> None:
    for name in ("n01", "n02", "n03"):
        for path in (folders / "val" / name).iterdir():
            path.unlink()
        Image.new("RGB", (60, 50), (255, 128, 0)).save(folders / "val" / name / "flat.png")
    splits = data.load_splits(DataConfig("imagefolder", root=folders, image_size=32))
    assert splits.classes == 3
    assert splits.test is splits.val
    images, labels = splits.val.take([0, 1, 2], augment=False)
    assert (images.shape, labels.tolist()) == ((3, 3, 32, 32), [0, 1, 2])
    channels = zip((1.0, 128 / 255, 0.0), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)
    for channel, (value, mean, std) in enumerate(channels):
        assert images[:, channel].flatten().tolist() == pytest.approx([(value - mean) / std] * (3 * 32 * 32), abs=1e-5)
    first = splits.train[data.Part([0, 5], seed=1)]
    assert torch.equal(first[0], splits.train[data.Part([0, 5], seed=1)][0])
    assert not torch.equal(first[0], splits.train[data.Part([0, 5], seed=2)][0])
    assert first[1].tolist() == [0, 1]


def test_pca_jitter_has_the_published_covariance() -> None:
    torch.manual_seed(0)
    shifts = torch.stack([data.pca_jitter(torch.zeros(3, 1, 1)).flatten() for _ in range(20_000)]).double()
    vectors, values = data.PCA_VECTORS.double(), data.PCA_VALUES.double()
    assert vectors @ vectors.T == pytest.approx(torch.eye(3), abs=1e-3)
    expected = vectors @ torch.diag((0.1 * values) ** 2) @ vectors.T
    assert torch.allclose(shifts.T.cov(), expected, atol=2e-5)
    image = torch.rand(3, 4, 4)
    shift = data.pca_jitter(image) - image
    assert shift.flatten(1).std(1) == pytest.approx(torch.zeros(3), abs=1e-6)


def image_error(config: DataConfig) -> str:
    with pytest.raises(SparsityError) as caught:
        data.load_splits(config)
    return str(caught.value)


def test_empty_folders_and_missing_classes_are_named(folders: Path, tmp_path: Path) -> None:
    config = DataConfig("imagefolder", root=folders, image_size=32)
    (folders / "val" / "n02").rename(tmp_path / "aside")
    error = image_error(config)
    assert "only in train: n02" in error
    assert "only in val" not in error
    (folders / "val" / "n02").mkdir()
    assert f"{folders}/val/n02 holds no images" in image_error(config)
    empty = tmp_path / "empty"
    (empty / "train").mkdir(parents=True)
    assert "val is not there" in image_error(replace(config, root=empty))
    (empty / "val").mkdir()
    assert f"{empty}/train holds no class folders" in image_error(replace(config, root=empty))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["cut", "text"])
def test_a_corrupt_image_is_named(folders: Path, tiny: Tiny, workers: int, damage: str) -> None:
    bad = folders / "train" / "n02" / "1.JPEG"
    bad.write_bytes(bad.read_bytes()[:200] if damage == "cut" else b"not an image")
    config = tiny(
        data__name="imagefolder", data__root=folders, data__image_size=32, data__workers=workers, batch_size=12
    )
    splits = data.load_splits(config.data)
    with pytest.raises(SparsityError) as caught:
        list(data.train_batches(splits.train, config, 0, 0))
    assert str(caught.value).startswith(f"{bad} cannot be read as an image (")
    assert "Traceback" not in str(caught.value)


def test_more_processes_than_gpus_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with (
        pytest.raises(SparsityError, match="process 2 of this machine finds no GPU: torch sees 2; start as many"),
        distributed.processes("auto"),
    ):
        pass
