"""What people ship is verified as it is: Hugging Face folders, safetensors files, packed files, ONNX models."""

from __future__ import annotations

import json
import pickletools
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nm_sparsity.core import CheckpointError, SparsityError, VerificationError, finalize, sparsify, verify
from nm_sparsity.core.__main__ import main
from nm_sparsity.core.deploy.onnx import to_onnx
from nm_sparsity.core.files import contents
from nm_sparsity.core.files.contents import read
from nm_sparsity.core.files.metadata import METADATA, Metadata
from nm_sparsity.core.files.packed import save_packed

safetensors_torch = pytest.importorskip("safetensors.torch")


def finalized(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    sparsify(net, "2:4", **options)
    finalize(net)
    return net


def test_packed_files_are_unpacked_and_checked(tmp_path: Path) -> None:
    path = save_packed(tmp_path / "p.safetensors", finalized())
    assert [(check.name, check.groups) for check in verify(path, "2:4").checked] == [
        ("0.weight", 1024),
        ("1.weight", 128),
    ]
    assert len(verify(path).checked) == 2
    for other in ("1:4", "1:16"):
        with pytest.raises(VerificationError, match=f"which is not {other}"):
            verify(path, other)


# Folders of Hugging Face


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers")


def causal(transformers: Any, tied: bool = True) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, vocab_size=64, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_a_folder_is_verified_as_its_model(tmp_path: Path, transformers: Any, shard: str) -> None:
    model = causal(transformers)
    sparsify(model, "2:4")
    finalize(model)
    model.save_pretrained(tmp_path / "f", max_shard_size=shard)
    assert (tmp_path / "f" / "model.safetensors.index.json").exists() == (shard == "20KB")
    result = verify(tmp_path / "f", "2:4")
    assert len(result.checked) == 14
    assert [(check.name, check.skipped) for check in result.checks if check.skipped] == [
        ("model.embed_tokens.weight", "tied to an embedding")
    ]
    assert verify(model, "2:4").checked == result.checked
    with pytest.raises(VerificationError, match="14 of 14"):
        verify(tmp_path / "f", "1:4")
    with pytest.raises(SparsityError, match="carries no table"):
        verify(tmp_path / "f")

    config = json.loads((tmp_path / "f" / "config.json").read_text())
    (tmp_path / "f" / "config.json").write_text(json.dumps({**config, METADATA: Metadata.of(model).to_dict()}))
    assert verify(tmp_path / "f").checked == result.checked
    (tmp_path / "f" / "config.json").write_text(json.dumps({**config, METADATA: {"format": 1}}))
    with pytest.raises(CheckpointError, match="damaged: it lacks method"):
        verify(tmp_path / "f")
    # A model that transformers does not know: embeddings are told by their names.
    (tmp_path / "f" / "config.json").write_text(json.dumps({**config, "architectures": ["OfMyOwn"]}))
    assert len(verify(tmp_path / "f", "2:4").checked) == 14


def test_one_file_stands_before_the_shards_of_an_earlier_save(tmp_path: Path, transformers: Any) -> None:
    model = causal(transformers)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    index = (tmp_path / "model.safetensors.index.json").read_text()
    sparsify(model, "2:4")
    finalize(model)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert len(verify(tmp_path, "2:4").checked) == 14


def test_weights_that_were_not_gathered_are_skipped_with_the_reason(tmp_path: Path, transformers: Any) -> None:
    model = causal(transformers)
    sparsify(model, "2:4")
    finalize(model)
    model.save_pretrained(tmp_path)
    state = {
        **safetensors_torch.load_file(tmp_path / "model.safetensors"),
        "model.layers.0.mlp.up_proj.weight": torch.zeros(0),
    }
    safetensors_torch.save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    result = verify(tmp_path, "2:4")
    assert len(result.checked) == 13
    assert "it has 1 dimensions, the model's 2" in {check.skipped for check in result.checks}


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_layer_that_stores_its_weight_transposed(tmp_path: Path, transformers: Any, kind: str) -> None:
    """GPT-2's are (in, out); the position embeddings are no layer."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=64, n_positions=16, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config)
    sparsify(model, "2:4")
    finalize(model)
    model.save_pretrained(tmp_path)
    if kind == "bin":
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    found = {check.name.removeprefix("transformer.h.0."): check.skipped for check in verify(tmp_path, "2:4").checks}
    assert [name for name, skipped in found.items() if not skipped] == [
        *("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    ]


def test_a_dense_folder_and_damaged_ones_do_not_pass(tmp_path: Path, transformers: Any) -> None:
    causal(transformers, tied=False).save_pretrained(tmp_path / "f", max_shard_size="20KB")
    with pytest.raises(VerificationError, match="15 of 15"):
        verify(tmp_path / "f", "2:4")
    shard = sorted((tmp_path / "f").glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100])
    with pytest.raises(CheckpointError, match="damaged or not a safetensors file"):
        verify(tmp_path / "f", "2:4")
    shard.unlink()
    with pytest.raises(CheckpointError, match="there is no"):
        verify(tmp_path / "f", "2:4")
    shutil.copy(sorted((tmp_path / "f").glob("*.safetensors"))[0], shard)
    with pytest.raises(CheckpointError, match=r"lacks .*, which model\.safetensors\.index\.json names"):
        verify(tmp_path / "f", "2:4")
    (tmp_path / "f" / "model.safetensors.index.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="is no JSON"):
        verify(tmp_path / "f", "2:4")
    for hostile in ({"num_hidden_layers": 10**9}, {"n_layer": 10**9}, {"vision": [{"depths": [2, 10**9]}]}):
        config = json.loads((tmp_path / "f" / "config.json").read_text())
        assert contents._builds(config, 20)
        assert not contents._builds({**config, **hostile}, 20), hostile
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "finalized.pt").touch()
    with pytest.raises(CheckpointError, match=r"no folder of a Hugging Face model.*name a file in it: finalized\.pt"):
        verify(tmp_path / "run", "2:4")


@pytest.mark.parametrize("name", ["model.safetensors", "alone.safetensors"])
def test_finalize_writes_what_hugging_face_loads(
    tmp_path: Path, transformers: Any, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a folder, and of a file of which only names are known: embeddings stay as they are."""
    model = causal(transformers)
    model.save_pretrained(tmp_path / "f")
    source = tmp_path / "f"
    if name != "model.safetensors":
        source = tmp_path / name
        shutil.copy(tmp_path / "f" / "model.safetensors", source)
    output = tmp_path / "f" / "model.safetensors"
    assert main(["finalize", str(source), str(output), "--pattern", "2:4"]) == 0
    assert "model.embed_tokens.weight stays dense: " in capsys.readouterr().out
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "f")
    sparsify(model, "2:4", method="ste")
    finalize(model)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())
    assert len(verify(again, "2:4").checked) == 14
    assert len(verify(output, "2:4").checked) == 14
    assert len(verify(tmp_path / "f").checked) == 14, "its header holds the table"


def test_finalized_safetensors_keep_ties_and_tell_of_damage(tmp_path: Path) -> None:
    weight = torch.randn(16, 16)
    torch.save({"a.weight": weight, "b.weight": weight, "c.bias": torch.ones(3)}, tmp_path / "tied.pt")
    path = tmp_path / "tied.safetensors"
    assert main(["finalize", str(tmp_path / "tied.pt"), str(path), "--pattern", "2:4"]) == 0
    state = read(path).state
    assert torch.equal(state["a.weight"], state["b.weight"])
    assert set(safetensors_torch.load_file(path)) == {"a.weight", "c.bias"}
    assert len(verify(path, "2:4").checked) == 2
    content = path.read_bytes()
    for at in range(0, len(content), 5):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
        with pytest.raises(CheckpointError):
            verify(path)


# ONNX


class Attention(nn.Module):
    """A linear layer over sequences (MatMul), one over rows (Gemm), convolutions, an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.conv, self.up = nn.Conv1d(8, 16, 1), nn.ConvTranspose1d(16, 8, 1)
        self.fc1, self.fc2, self.head = nn.Linear(8, 16, bias=False), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.up(self.conv(self.embed(tokens).transpose(1, 2))).transpose(1, 2)
        return self.head(self.fc2(self.fc1(x)).mean(1))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_onnx_weights_are_checked_along_what_is_summed(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model, tokens = Attention(), torch.randint(16, (2, 5))
    to_onnx(model, (tokens,), tmp_path / "dense.onnx")
    with pytest.raises(VerificationError, match="5 of 5 weights break"):
        verify(tmp_path / "dense.onnx", "2:4")
    sparsify(model, "2:4")
    finalize(model)
    to_onnx(model, (tokens,), tmp_path / "sparse.onnx")
    result = verify(tmp_path / "sparse.onnx", "2:4")
    assert sorted(check.groups for check in result.checked) == [6, 32, 32, 32, 32]
    assert [check.skipped for check in result.checks if check.skipped] == ["an embedding"]
    with pytest.raises(SparsityError, match="carries no table"):
        verify(tmp_path / "sparse.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(CheckpointError, match="damaged or not an ONNX model"):
        verify(tmp_path / "text.onnx", "2:4")
    assert main(["finalize", str(tmp_path / "sparse.onnx"), str(tmp_path / "x.pt"), "--pattern", "2:4"]) == 1
    assert onnx.load(tmp_path / "sparse.onnx").graph.node


@pytest.mark.parametrize(
    ("operator", "attributes", "position", "shape", "dims"),
    [
        ("MatMul", {}, 1, (8, 4), (0,)),
        ("MatMul", {}, 1, (3, 8, 4), (1,)),
        ("MatMul", {}, 0, (4, 8), (1,)),
        ("Gemm", {"transB": 1}, 1, (4, 8), (1,)),
        ("Gemm", {}, 1, (8, 4), (0,)),
        ("Gemm", {"transA": 1}, 0, (8, 4), (0,)),
        ("Conv", {}, 1, (4, 8, 3, 3), (1,)),
        ("ConvTranspose", {}, 1, (8, 4, 3, 3), (0,)),
    ],
)
def test_each_operator_sums_along_its_own_dimension(
    tmp_path: Path, operator: str, attributes: Any, position: int, shape: Any, dims: Any
) -> None:
    """Of a weight that is 2:4 along `dims` and along nothing else."""
    onnx = pytest.importorskip("onnx")
    weight = torch.ones(shape)
    weight.movedim(dims[0], -1)[..., 2:4] = 0
    weight.movedim(dims[0], -1)[..., 6:8] = 0
    for name, turned, verified in (("right", weight, True), ("wrong", weight.roll(1, dims[0]) + weight, False)):
        inputs = ["x", "x"]
        inputs[position] = "w"
        nodes = [onnx.helper.make_node(operator, inputs, ["y"], **attributes)]
        values = [onnx.numpy_helper.from_array(turned.numpy(), "w")]
        graph = onnx.helper.make_graph(nodes, "g", [], [], values)
        onnx.save(onnx.helper.make_model(graph), tmp_path / f"{name}.onnx")
        if verified:
            assert len(verify(tmp_path / f"{name}.onnx", "2:4").checked) == 1
        else:
            with pytest.raises(VerificationError, match="1 of 1"):
                verify(tmp_path / f"{name}.onnx", "2:4")


# Whole models


def test_a_finalized_model_that_is_pickled_whole_needs_nothing_of_ours(tmp_path: Path) -> None:
    net = finalized(method="asp")
    torch.save(net, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        words = [str(argument) for _, argument, _ in pickletools.genops(archive.read(name))]
    assert not [word for word in words if "nm_sparsity" in word]
    again = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert verify(again, "2:4").checked == verify(net, "2:4").checked


@pytest.mark.parametrize("damage", [{"op_type": "ConvTranspose", "group": 0}, {"op_type": "Transpose", "perm": [0, 9]}])
def test_onnx_operators_that_do_not_fit_their_weights(tmp_path: Path, damage: dict[str, Any]) -> None:
    onnx = pytest.importorskip("onnx")
    node = onnx.helper.make_node(inputs=["x", "w"] if "group" in damage else ["w"], outputs=["y"], **damage)
    w = onnx.numpy_helper.from_array(
        torch.ones(8, 8, 1, 1).numpy() if "group" in damage else torch.ones(8, 8).numpy(), "w"
    )
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph([node], "g", [], [y], [w])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "damaged.onnx")
    with pytest.raises(CheckpointError, match="its operators do not fit its weights"):
        verify(tmp_path / "damaged.onnx", "2:4")


def test_initialisers_that_torch_has_no_kind_of_are_skipped(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    w = torch.zeros(8, 8)
    texts = onnx.helper.make_tensor("texts", onnx.TensorProto.STRING, (2, 2), [b"a", b"b", b"c", b"d"])
    small = onnx.helper.make_tensor("small", onnx.TensorProto.FLOAT8E4M3FN, (2, 2), [1.0, 2.0, 3.0, 4.0])
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, (1, 8))],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (1, 8))],
        [onnx.numpy_helper.from_array(w.numpy(), "w"), texts, small],
    )
    onnx.save(onnx.helper.make_model(graph), tmp_path / "m.onnx")
    result = verify(tmp_path / "m.onnx", "2:4")
    assert [check.name for check in result.checked] == ["w"]
    assert [check.name for check in result.checks if check.skipped] == ["texts", "small"]
