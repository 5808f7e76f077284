"""Checkpoints: sparse as they stand, bit for bit on resume, atomic, and safe to open."""

import contextlib
import copy
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from nm_sparsity.core import (
    CheckpointError,
    SparsityError,
    finalize,
    load_sparsity_state,
    sparsify,
    sparsity_state,
    verify,
)
from nm_sparsity.core.files.checkpoint import merge, restore, split
from nm_sparsity.core.files.io import load, save
from nm_sparsity.core.files.metadata import METADATA, Metadata, find_parts
from nm_sparsity.core.pattern import NMPattern, Placement


def make(layout: str = "channel", pattern: str = "2:4", method: str = "sr-ste") -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 8), nn.Linear(8, 4))
    sparsify(net, pattern, layout=layout, method=method, **({"decay": 1.0} if method == "sr-ste" else {}))
    return net


def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    net(torch.randn(4, 8, 3, 3)).square().sum().backward()
    optimizer.step()


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(a == b)


def file_of(net: nn.Module, path: Path) -> Path:
    state, metadata = split(net)
    save(path, {"state_dict": state, METADATA: metadata})
    return path


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, float("nan"), float("inf"), 3.5]), min_size=32, max_size=32),
    pattern=st.sampled_from(["1:4", "2:4", "3:4", "3:8"]),
    layout=st.sampled_from(["channel", "kernel"]),
)
def test_merge_restores_what_split_took_apart_bit_for_bit(values: list[float], pattern: str, layout: str) -> None:
    net = nn.Sequential(nn.Conv2d(8, 2, (1, 2)))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor(values).reshape(2, 8, 1, 2))
    before = net[0].weight.detach().clone()
    sparsify(net, pattern, layout=layout)
    state, metadata = split(net)
    assert torch.equal(state["0.weight"].nan_to_num(7), net[0].weight.detach().nan_to_num(7))
    after = merge(state, metadata)["0.weight"]
    assert torch.equal(after.view(torch.int32), before.view(torch.int32)), "also the signs of zeros"


@pytest.mark.parametrize("method", ["sr-ste", "asp"])
@pytest.mark.parametrize("layout", ["channel", "kernel"])
def test_ten_steps_equal_five_and_a_resume_and_five(tmp_path: Path, method: str, layout: str) -> None:
    def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            step(net, optimizer)

    straight = make(layout, method=method)
    optimizer = torch.optim.SGD(straight.parameters(), lr=0.01, momentum=0.9)
    train(straight, optimizer, 5)
    path = file_of(straight, tmp_path / "five.pt")
    optimizer_state, rng = copy.deepcopy(optimizer.state_dict()), torch.get_rng_state()
    train(straight, optimizer, 5)

    resumed = make(layout, method=method)
    payload = load(path)
    restore(resumed, payload["state_dict"], payload[METADATA])
    optimizer = torch.optim.SGD(resumed.parameters(), lr=0.01, momentum=0.9)
    optimizer.load_state_dict(optimizer_state)
    torch.set_rng_state(rng)
    train(resumed, optimizer, 5)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(sparsity_state(straight), sparsity_state(resumed), rtol=0, atol=0)


def test_the_state_dict_is_sparse_as_it_stands_and_loads_into_a_dense_model() -> None:
    net = make()
    state, _ = split(net)
    dense = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 8), nn.Linear(8, 4))
    dense.load_state_dict(state)
    x = torch.randn(2, 8, 3, 3)
    torch.testing.assert_close(dense(x), net(x), rtol=0, atol=0)


def test_tied_weights_are_masked_under_every_name_and_restored() -> None:
    def tied() -> nn.Sequential:
        net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        net[1].weight = net[0].weight
        return net

    net = tied()
    sparsify(net, "1:4")
    state, metadata = split(net)
    assert torch.equal(state["1.weight"], net[0].weight)
    other = tied()
    sparsify(other, "1:4")
    restore(other, state, metadata)
    assert torch.equal(other[0]._parameters["weight"], net[0]._parameters["weight"])


def test_the_authors_format_with_module_prefix_loads(tmp_path: Path) -> None:
    source = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 8), nn.Linear(8, 4))
    published = {"epoch": 120, "state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}
    torch.save(published, tmp_path / "published.pth")
    net = make()
    state, metadata = find_parts(load(tmp_path / "published.pth"), "published.pth")
    restore(net, state, metadata)
    assert torch.equal(net[0]._parameters["weight"], source[0].weight)


def test_a_dense_checkpoint_initialises_and_a_finalized_one_too(tmp_path: Path) -> None:
    net = make(method="ste")
    finalized = copy.deepcopy(net)
    finalize(finalized)
    again = make(method="ste")
    restore(again, finalized.state_dict(), Metadata.of(finalized))
    assert torch.equal(again[2].weight, net[2].weight)


def test_other_models_patterns_and_layouts_are_refused_by_name(tmp_path: Path) -> None:
    payload = load(file_of(make(), tmp_path / "a.pt"))
    state, metadata = payload["state_dict"], payload[METADATA]
    with pytest.raises(CheckpointError, match=r"0\.weight is 1:4 along dimensions \[1\] in this model and 2:4"):
        restore(make(pattern="1:4"), state, metadata)
    with pytest.raises(CheckpointError, match=r"2:4 along dimensions \[1, 2, 3\] in this model and 2:4 along .*\[1\]"):
        restore(make(layout="kernel"), state, metadata)
    with pytest.raises(CheckpointError, match=r"lacks 0\.weight and 1 more of Linear|lacks weight"):
        restore(nn.Linear(3, 3), state, metadata)
    with pytest.raises(CheckpointError, match=r"holds 0\.weight and 5 more, which Sequential does not have"):
        restore(nn.Sequential(), state)
    wider = {**state, "3.bias": torch.zeros(5)}
    with pytest.raises(CheckpointError, match=r"3\.bias has shape \(4,\) in Sequential and \(5,\) in the checkpoint"):
        restore(make(), wider, metadata)
    net = make()
    before = copy.deepcopy(net.state_dict())
    broken = {**metadata, "dropped": {**metadata["dropped"], "0.weight": torch.zeros(3)}}
    with pytest.raises(CheckpointError, match="dropped"):
        restore(net, {k: v + 1 for k, v in state.items()}, broken)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items()), "a refused file must change nothing"
    with pytest.raises(CheckpointError, match="not a sparse weight of this model"):
        load_sparsity_state(net, {"9.weight": {}})
    with pytest.raises(CheckpointError, match=r"state of 0\.weight lacks preconditioned, state"):
        load_sparsity_state(net, {"0.weight": {"lr_sum": 0.0}})


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_opening_a_file_never_runs_code(tmp_path: Path) -> None:
    victim = tmp_path / "executed"
    torch.save({"state_dict": Evil(victim)}, tmp_path / "zip.pt")
    (tmp_path / "raw.pkl").write_bytes(pickle.dumps(Evil(victim)))
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt")
    for name in ("zip.pt", "raw.pkl", "model.pt"):
        with pytest.raises(
            CheckpointError, match=r"was not loaded, since that would run code|not a PyTorch checkpoint"
        ):
            load(tmp_path / name)
    assert not victim.exists()


def test_missing_truncated_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load(tmp_path / "nowhere.pt")
    whole = file_of(make(), tmp_path / "whole.pt").read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 7):
        (tmp_path / "cut.pt").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut\.pt is (truncated|not a PyTorch)"):
            load(tmp_path / "cut.pt")
    (tmp_path / "text.pt").write_text("learning rate: 0.1")
    with pytest.raises(CheckpointError, match="not a PyTorch checkpoint"):
        load(tmp_path / "text.pt")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        find_parts({"lr": 0.1}, "x.pt")


def test_saving_keeps_the_old_file_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file_of(make(), tmp_path / "latest.pt")
    before = path.read_bytes()

    def full(payload: object, file: Any) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"could not write .*No space left on device.*previous file.*unchanged"):
        save(path, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path], "no temporary file stays behind"


def test_no_flipped_bit_goes_unnoticed(tmp_path: Path) -> None:
    """Bits that carry nothing apart: what loads is what was saved."""
    path = file_of(make(), tmp_path / "whole.pt")
    content, whole = path.read_bytes(), load(path)
    refused = 0
    for at in range(0, len(content), 23):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
        try:
            found = load(path)
        except CheckpointError:
            refused += 1
        else:
            assert same(found, whole)
    assert refused > len(content) / 23 / 2


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_metadata_of_any_shape_is_one_error_or_does_no_harm(data: st.DataObject) -> None:
    """Any entry replaced by anything, at any depth: refused before anything changes, by restore as by verify."""
    net, other = (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2))
    method = data.draw(st.sampled_from(["asp", "s-ste"]))
    for model in (net, other):
        sparsify(model, "2:4", method=method)
    net(torch.ones(1, 4)).sum().backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    state, metadata = split(net)
    metadata = copy.deepcopy(metadata)
    plain = st.recursive(
        st.one_of(
            st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3),
            st.sampled_from(["2:4", "1:4", "9:8", "0.weight", "9.weight", torch.zeros(3), torch.zeros(4, 8), 10**400]),
            st.sampled_from([torch.ones(2, device="meta"), torch.eye(4).to_sparse(), 3j, b"x", torch.zeros(()), -1]),
        ),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2) | st.integers(), inner),
        max_leaves=4,
    )  # fmt: skip
    where: Any = metadata
    while True:
        key = data.draw(st.sampled_from(list(where) if isinstance(where, dict) else list(range(len(where)))))
        inner = where[key]
        if not isinstance(inner, dict | list) or not inner or data.draw(st.integers(0, 2)) == 0:
            break
        where = inner
    if isinstance(where, dict) and data.draw(st.booleans()):
        where[data.draw(st.sampled_from(["0.weight", "9", "layers"]) | st.text(max_size=2))] = where.pop(key)
    elif isinstance(where, dict | list):
        where[key] = data.draw(plain)
    before = copy.deepcopy(other.state_dict()), sparsity_state(other)
    try:
        restore(other, state, metadata)
    except CheckpointError:
        assert same(dict(enumerate((other.state_dict(), sparsity_state(other)))), dict(enumerate(before)))
    with contextlib.suppress(SparsityError):
        verify({"state_dict": state, METADATA: metadata})


def test_names_that_are_no_text_are_refused() -> None:
    with pytest.raises(CheckpointError, match="holds no state dict: int 0 is no name of a tensor"):
        find_parts({0: torch.zeros(2)}, "x.pt")


def test_threads_that_save_one_path_do_not_disturb_each_other(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: save(tmp_path / "x.pt", {"x": torch.full((1000,), i)}), range(40)))
    assert list(tmp_path.iterdir()) == [tmp_path / "x.pt"]
    assert len(load(tmp_path / "x.pt")["x"].unique()) == 1


def test_a_link_stays_one_and_long_names_are_written(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "latest.pt").symlink_to(Path("elsewhere") / "run.pt")
    for value in (1, 2):
        save(tmp_path / "latest.pt", {"x": value})
        assert (tmp_path / "latest.pt").is_symlink()
        assert load(tmp_path / "elsewhere" / "run.pt") == {"x": value}
    save(tmp_path / f"{'n' * 252}.pt", {})


@pytest.mark.slow
def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\nfrom nm_sparsity.core.files.io import replacing\n"
        "with replacing(sys.argv[1]) as file:\n    file.write(b'half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "x.pt")], check=False)
    (left,) = tmp_path.iterdir()
    host, process, end = re.fullmatch(r"(\.nm_sparsity\..*)\.(\d+)\.(.*\.tmp)", left.name).groups()  # type: ignore[union-attr]
    (tmp_path / f"{host}.{10**12}.{end}").touch()  # no process can have that number
    kept = {f"{host}.{os.getpid()}.{end}", f"{host}x.{process}.{end}", f"{host}.{process}.{end}.mine", ".x.1.tmp"}
    for name in kept:
        (tmp_path / name).touch()
    save(tmp_path / "x.pt", {})
    assert {path.name for path in tmp_path.iterdir()} == {"x.pt", *kept}, "those of others and of the living stay"


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    path = file_of(make(), tmp_path / "latest.pt")
    before = path.read_bytes()
    code = (
        "import resource, signal, sys, torch\n"
        "from nm_sparsity.core.files.io import save\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "save(sys.argv[1], {'x': torch.zeros(1_000_000)})"
    )
    run = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert "CheckpointError: could not write" in run.stderr
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_model_whose_own_submodule_is_called_module(tmp_path: Path) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Sequential(nn.Linear(8, 8))

    net, other = Wrapper(), Wrapper()
    sparsify(net, method="ste")
    sparsify(other, method="ste")
    payload = load(file_of(net, tmp_path / "a.pt"))
    restore(other, *find_parts(payload, "a.pt"))
    assert torch.equal(other.module[0]._parameters["weight"], net.module[0]._parameters["weight"])
    assert len(verify(tmp_path / "a.pt").checked) == 1


def test_a_part_of_a_model_splits_restores_and_finalizes() -> None:
    net, other = nn.Sequential(make()), make()
    part = net[0]
    restore(other, *split(part))
    assert torch.equal(other[0]._parameters["weight"], part[0]._parameters["weight"])
    whole = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    sparsify(whole, method="ste")
    finalize(whole["a"])
    again = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    sparsify(again, method="ste")
    finalize(again["a"])
    restore(again, *split(whole))
    assert same(dict(again.state_dict()), dict(whole.state_dict()))
    finalize(whole)
    assert {c.name for c in verify(whole).checks} == {"a.weight", "b.weight"}


def test_a_state_dict_without_a_sparse_weight_is_not_split() -> None:
    net = make()
    state = {name: value for name, value in net.state_dict().items() if not name.startswith("2.")}
    with pytest.raises(CheckpointError, match=r"the state dict lacks 2\.weight, which is sparse"):
        split(net, state)


def test_weights_and_dropped_values_of_two_moments_are_told() -> None:
    net = make()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    step(net, optimizer)
    state, before = split(net)
    for _ in range(3):
        step(net, optimizer)
    later, metadata = split(net)
    for mixed in ((state, metadata), (later, before)):
        with pytest.raises(CheckpointError, match="of another moment of training than the weights"):
            merge(*mixed)


@pytest.mark.parametrize("first", ["sparsify", "wrap"])
def test_activation_checkpointing_around_modules_changes_no_name(first: str) -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 8))
    plain = copy.deepcopy(net)
    sparsify(plain, exclude=["1"])
    if first == "sparsify":
        sparsify(net, exclude=["1"])
    net[0] = checkpoint_wrapper(net[0])
    if first == "wrap":
        sparsify(net, exclude=["1"])
    (state, metadata), (expected, _) = split(net), split(plain)
    assert same(state, expected)
    assert sparsity_state(net).keys() == sparsity_state(plain).keys() == {"0.0.weight"}
    restore(plain, state, metadata)
    restore(net, state, metadata)
    finalize(net)
    assert [check.name for check in verify(net).checks] == ["0.0.weight"]


def test_a_file_of_a_newer_version_is_refused() -> None:
    state, metadata = split(make())
    with pytest.raises(CheckpointError, match="written by a newer nm-sparsity"):
        find_parts({"state_dict": state, METADATA: {**metadata, "format": 99}}, "x.pt")


def test_what_kind_of_optimizer_stepped_is_remembered() -> None:
    net = make()
    step(net, torch.optim.AdamW(net.parameters(), lr=1e-4))
    state, metadata = split(net)
    again = make()
    restore(again, state, metadata)
    finalize(again)  # no warning about a weak decay: under AdamW its number says nothing


@pytest.mark.slow
def test_a_killed_process_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "latest.pt"
    script = (
        "import torch\nfrom nm_sparsity.core.files.io import save\n"
        f"i = 0\nwhile True:\n    save({str(path)!r}, {{'state_dict': {{'w': torch.full((500_000,), float(i))}}}})\n"
        "    i += 1\n    print(i, flush=True)\n"
    )
    for delay in (0.0, 0.011, 0.027):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(3):
            process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        w = load(path)["state_dict"]["w"]
        assert (w == w[0]).all()


def test_a_path_that_cannot_be_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "x.pt", tmp_path / "file" / "folder" / "x.pt", tmp_path / "x\0.pt"):
        with pytest.raises(CheckpointError, match="could not write"):
            save(path, {})
    endless = tmp_path / ("n" * 300) / "x.pt"
    with pytest.raises(CheckpointError, match="could not write"):
        save(endless, {})
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load(endless)


def test_files_have_ordinary_permissions(tmp_path: Path) -> None:
    save(tmp_path / "ours.pt", {})
    (tmp_path / "plain").touch()
    assert (tmp_path / "ours.pt").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_file_of_the_first_format_loads(tmp_path: Path) -> None:
    """Written at format 1: Linear(8, 4), ReLU, Linear(4, 4) at 2:4 with asp after one step."""
    path = Path(__file__).parent / "formats" / "format_1.pt"
    state, metadata = find_parts(load(path), path)
    assert metadata is not None
    assert (metadata.method, metadata.layout) == ("asp", "channel")
    assert metadata.layers == {name: Placement(NMPattern(2, 4), (1,)) for name in ("0.weight", "2.weight")}
    assert len(verify(path, "2:4").checked) == 2
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 4))
    sparsify(model, "2:4", method="asp")
    restore(model, state, metadata)
    again, entry = split(model)
    assert all(torch.equal(again[name], state[name]) for name in state)
    assert torch.equal(entry["state"]["0.weight"]["state"]["mask"], state["0.weight"] != 0)
    assert entry["state"]["0.weight"]["lr_sum"] == 0.1


def with_memory(metadata: dict[str, Any], memory: Any) -> dict[str, Any]:
    return {**metadata, "state": {"0.weight": {"lr_sum": 0.0, "preconditioned": False, "state": memory}}}


DAMAGE: dict[str, Any] = {
    "a number": lambda m: 5,
    "empty": lambda m: {},
    "format as text": lambda m: {**m, "format": "1"},
    "no method": lambda m: {k: v for k, v in m.items() if k != "method"},
    "a list of layers": lambda m: {**m, "layers": []},
    "no such dimension": lambda m: {**m, "layers": {"0.weight": ("2:4", [7])}},
    "negative dimension": lambda m: {**m, "layers": {"0.weight": ("2:4", [-1])}},
    "no dimensions": lambda m: {**m, "layers": {"0.weight": ("2:4", [])}},
    "half a pattern": lambda m: {**m, "layers": {"0.weight": ("2", [1])}},
    "a layer without a pattern": lambda m: {**m, "layers": {"0.weight": None}},
    "dropped as text": lambda m: {**m, "dropped": "much"},
    "too few dropped": lambda m: {**m, "dropped": {"0.weight": torch.zeros(1)}},
    "dropped of the first alone": lambda m: {**m, "dropped": {"0.weight": m["dropped"]["0.weight"]}},
    "dropped of no weight": lambda m: {**m, "dropped": {"9.weight": torch.zeros(1)}},
    "tied to nothing": lambda m: {**m, "tied": {"0.weight": "9.weight"}},
    "state of no weight": lambda m: {**m, "state": {"9.weight": {"lr_sum": 0.0, "preconditioned": False, "state": {}}}},
    "a tensor for a placement": lambda m: {**m, "layers": {"0.weight": torch.ones(2, device="meta")}},
    "a tensor for dimensions": lambda m: {**m, "layers": {"0.weight": ("2:4", torch.ones(2, device="meta"))}},
    "half a state": lambda m: {**m, "state": {"0.weight": {"lr_sum": 0.0}}},
    "state as a list": lambda m: {**m, "state": [1]},
    "memory of no kind": lambda m: with_memory(m, 3),
    "a mask of another shape": lambda m: with_memory(m, {"mask": torch.ones(4, 8, dtype=torch.bool)}),
    "a format before the first": lambda m: {**m, "format": 0},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_metadata_is_one_error_and_changes_nothing(damage: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    sparsify(model, "2:4")
    state, metadata = split(model)
    other = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    sparsify(other, "2:4")
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(CheckpointError):
        restore(other, state, DAMAGE[damage](metadata))
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


@pytest.mark.parametrize(
    "change",
    [
        {"tied": {"0.bias": "0.weight"}},
        {"state": {"0.weight": {"lr_sum": 0.0, "preconditioned": False, "state": {}, "steps": 10**30}}},
    ],
)
def test_a_damaged_entry_leaves_the_model_as_it_was(change: dict[str, Any]) -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    sparsify(net, "2:4")
    state, metadata = split(net)
    before = {name: p.detach().clone().fill_(3.0) for name, p in net.named_parameters()}
    net.load_state_dict(before)
    with pytest.raises(CheckpointError):
        restore(net, state, {**metadata, **change})
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


@pytest.mark.parametrize("bias", [torch.zeros(8, device="meta"), torch.zeros(8).to_sparse()], ids=["meta", "sparse"])
def test_what_cannot_be_loaded_leaves_the_model_as_it_was(bias: torch.Tensor) -> None:
    net = nn.Sequential(nn.Linear(8, 8))
    sparsify(net, "2:4")
    state, metadata = split(net)
    before = net[0].get_parameter("weight").detach().clone()
    with torch.no_grad():
        state = {**state, "0.weight": state["0.weight"] + 1, "0.bias": bias}
    with pytest.raises(CheckpointError, match=r"0\.bias of the checkpoint is a tensor of layout"):
        restore(net, state, metadata)
    assert torch.equal(net[0].get_parameter("weight"), before)
