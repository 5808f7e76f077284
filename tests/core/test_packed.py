"""Packed files give back the same bits, are as small as they should be, and damaged ones are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nm_sparsity.core import CheckpointError, SparsityError, VerificationError, finalize, masks, sparsify
from nm_sparsity.core.files.checkpoint import split
from nm_sparsity.core.files.codec import FORMAT, POSITIONS, pack, unpack
from nm_sparsity.core.files.io import save
from nm_sparsity.core.files.metadata import METADATA
from nm_sparsity.core.files.packed import load_packed, save_packed
from nm_sparsity.core.files.sealed import checksum
from nm_sparsity.core.pattern import NMPattern, Placement

safetensors_torch = pytest.importorskip("safetensors.torch")

INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def model(pattern: str = "2:4", layout: str = "channel", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(8, 16, 3), nn.ConvTranspose2d(16, 6, 2), nn.Flatten(), nn.Linear(6, 16), nn.BatchNorm1d(16)
    )
    sparsify(net, pattern, layout=layout)
    finalize(net)
    return net.to(dtype)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_pattern_unpacks_to_the_same_bits(data: st.DataObject) -> None:
    m = data.draw(st.integers(2, 33))
    groups = Placement(NMPattern(data.draw(st.integers(1, m - 1)), m), data.draw(st.sampled_from([(1,), (0,), (1, 2)])))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]))
    shape = {(1,): (3, 2 * m, 2), (0,): (m, 3, 2), (1, 2): (2, 3, m)}[groups.dims]
    w = torch.randn(shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    w[w > 2] = torch.inf
    w[w < -2] = torch.nan
    w = masks.keep_largest(w.to(dtype), groups.pattern, groups.dims)
    values, positions = pack("w", w, groups)
    restored = unpack(values, positions, groups, w.shape)
    integer = INTEGER[w.element_size()]
    assert torch.equal(restored.view(integer), w.contiguous().view(integer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("pattern", "layout"), [("2:4", "channel"), ("1:8", "channel"), ("2:4", "kernel")])
def test_a_model_comes_back(tmp_path: Path, pattern: str, layout: str, dtype: torch.dtype) -> None:
    net = model(pattern, layout, dtype)
    restored = load_packed(save_packed(tmp_path / "new" / "m.safetensors", net))
    assert same(restored, net.state_dict())
    (tmp_path / "plain").touch()
    (written,) = (tmp_path / "new").iterdir()
    assert written.stat().st_mode == (tmp_path / "plain").stat().st_mode  # others can read it as any file


def test_half_precision_2_4_takes_nine_sixteenths() -> None:
    w = masks.keep_largest(torch.randn(64, 256), "2:4").half()
    values, positions = pack("w", w, Placement(NMPattern(2, 4), (1,)))
    assert values.nbytes + positions.nbytes == 0.5625 * w.nbytes


def test_checkpoints_of_ours_pack_too(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(16, 8))
    sparsify(net)
    state, metadata = split(net)
    payload = {"state_dict": state, METADATA: metadata}
    save(tmp_path / "c.pt", payload)
    for source in (payload, tmp_path / "c.pt"):
        assert same(load_packed(save_packed(tmp_path / "p.safetensors", source)), state)
    with pytest.raises(SparsityError, match="not a finalized sparse model"):
        save_packed(tmp_path / "p.safetensors", net)
    with pytest.raises(SparsityError, match="no table of sparse weights"):
        save_packed(tmp_path / "p.safetensors", {"state_dict": state})


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    net[1].weight = net[0].weight
    sparsify(net)
    finalize(net)
    path = save_packed(tmp_path / "m.safetensors", net)
    assert path.stat().st_size < 64 * 64 * 4
    assert same(load_packed(path), net.state_dict())


def test_a_broken_pattern_is_not_packed(tmp_path: Path) -> None:
    net = model()
    with torch.no_grad():
        next(net.parameters()).fill_(1.0)
    with pytest.raises(VerificationError, match=r"0\.weight is not 2:4"):
        save_packed(tmp_path / "m.safetensors", net)
    assert not list(tmp_path.iterdir())


def damage_values(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors["0.weight"] = tensors["0.weight"][1:]


def damage_positions(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors["0.weight" + POSITIONS].zero_()


def drop_positions(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    del tensors["0.weight" + POSITIONS]


def damage_json(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata["layers"] = metadata["layers"][:-5]


def damage_shape(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    layers = json.loads(metadata["layers"])
    layers["0.weight"]["shape"] = [16, 8]
    metadata["layers"] = json.dumps(layers)


def damage_pattern(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata["layers"] = metadata["layers"].replace("2:4", "4:2")


def damage_dims(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata["layers"] = metadata["layers"].replace('"dims": [1]', '"dims": [1, 1]')


def drop_dims(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata["layers"] = metadata["layers"].replace('"dims": [1]', '"dims": []')


def endless_dims(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata["layers"] = metadata["layers"].replace('"dims": [1]', '"dims": [Infinity]')


def negative_shape(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata["layers"] = metadata["layers"].replace("[16, 8, 3, 3]", "[-16, -8, 3, 3]")


def nest_deeply(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata["layers"] = "[" * 100_000


def foreign_format(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata["format"] = "pt"


@pytest.mark.parametrize("sealed", [True, False], ids=["with its checksum", "without"])
@pytest.mark.parametrize(
    "damage",
    [
        damage_values,
        damage_positions,
        drop_positions,
        damage_json,
        damage_shape,
        damage_pattern,
        damage_dims,
        drop_dims,
        endless_dims,
        negative_shape,
        nest_deeply,
        foreign_format,
    ],
)
def test_damaged_metadata_is_refused(tmp_path: Path, damage, sealed: bool) -> None:  # type: ignore[no-untyped-def]
    import safetensors

    path = save_packed(tmp_path / "m.safetensors", model())
    with safetensors.safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    tensors = safetensors_torch.load_file(path)
    assert metadata["format"] == FORMAT
    damage(tensors, metadata)
    if sealed:
        metadata["sha256"] = checksum(tensors, metadata)
    safetensors_torch.save_file(tensors, path, metadata)
    expected = "does not fit its tensors" if sealed else "does not have the checksum"
    with pytest.raises(CheckpointError, match=f"{expected}|not a packed file of ours"):
        load_packed(path)


def test_no_flipped_bit_goes_unnoticed(tmp_path: Path) -> None:
    path = save_packed(tmp_path / "m.safetensors", model())
    content = path.read_bytes()
    for at in range(0, len(content), 41):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
        with pytest.raises(CheckpointError):
            load_packed(path)


def test_truncated_and_missing_files_are_refused(tmp_path: Path) -> None:
    path = save_packed(tmp_path / "m.safetensors", model())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged or not a safetensors file"):
        load_packed(path)
    path.write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(CheckpointError, match="damaged or not a safetensors file"):
        load_packed(path)
    with pytest.raises(CheckpointError, match="there is no file"):
        load_packed(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="could not write"):
        save_packed(tmp_path / "file" / "m.safetensors", model())
