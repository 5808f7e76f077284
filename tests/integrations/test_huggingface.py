"""`NMSparsity` in Hugging Face's Trainer, on tiny models of five families."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import AutoModel, Trainer, TrainerCallback, TrainingArguments
from transformers_models import FAMILIES, bert, classes, llama, words

from nm_sparsity.core import SparsityError, decay_strength, finalize, frozen, sparsify, verify
from nm_sparsity.core.files.metadata import METADATA
from nm_sparsity.core.integrations.huggingface import RESUME, NMSparsity, heads, resume, save_pretrained
from nm_sparsity.core.methods import WeightState
from nm_sparsity.core.model.bank import Scope


def trainer(model: Any, sample: Any, folder: Path, *callbacks: TrainerCallback, **options: Any) -> Trainer:
    """A Trainer of four steps, evaluated on what it trains on."""
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(str(folder), **{**defaults, **options})
    data = [sample(i) for i in range(16)]
    return Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data, callbacks=list(callbacks))


def seeded(build: Any) -> Any:
    torch.manual_seed(0)
    return build()


def is_2to4(w: Tensor, dim: int) -> bool:
    return bool((w.movedim(dim, -1).reshape(-1, 4).count_nonzero(dim=1) <= 2).all())


def check_folder(folder: Path, count: int) -> Mapping[str, Tensor]:
    """What lies in a folder of `save_pretrained` is N:M by its own table; returns its tensors."""
    layers = json.loads((folder / "config.json").read_text())[METADATA]["layers"]
    tensors = load_file(folder / "model.safetensors")
    assert len(layers) == count
    for name, (pattern, dims) in layers.items():
        assert pattern == "2:4"
        assert is_2to4(tensors[name], *dims), name
    return tensors


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    for (name, a), (_, b) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_trains_and_its_folders_are_sparse_and_load_anywhere(family: str, tmp_path: Path) -> None:
    build, sample, count, head = FAMILIES[family]
    model, callback = seeded(build), NMSparsity("2:4", decay=0.5, interval=2)
    assert heads(model) == [head]
    run = trainer(model, sample, tmp_path, callback, lr_scheduler_type="constant")
    assert callback.report is not None
    assert len(callback.report.sparse) == count
    assert not any(w.name.startswith(head) for w in callback.report.sparse)
    dense_type = type(model)

    run.train()
    logged = [entry for entry in run.state.log_history if "flip_rate" in entry]
    assert [entry["step"] for entry in logged] == [2, 4]
    assert logged[-1]["decay_strength"] == pytest.approx(0.5 * 4 * 1e-2)
    assert logged[-1]["sad"] == round(logged[-1]["flip_rate"] * sum(w.size for w in callback.report.sparse))

    # A checkpoint from the middle is sparse as it stands; the model is finalized, plain, and equal to the last one.
    check_folder(tmp_path / "checkpoint-2", count)
    assert type(model) is dense_type
    verify(model, "2:4")
    run.save_model(str(tmp_path / "final"))
    check_folder(tmp_path / "final", count)
    assert len(verify(tmp_path / "final", "2:4").checked) == len(verify(tmp_path / "checkpoint-2").checked) == count
    assert not (tmp_path / "final" / RESUME).exists()
    for folder in ("checkpoint-4", "final"):
        assert_equal(dense_type.from_pretrained(tmp_path / folder), model)
    if model.base_model is not model:
        backbone = AutoModel.from_pretrained(tmp_path / "final").state_dict()
        for name, w in model.base_model.state_dict().items():
            assert torch.equal(backbone[name], w), name


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"decay": 5.0}),
        ("gpt2", {"decay": "linear(0, 5)"}),
        ("vit", {"decay": 5.0}),
        ("bert", {"method": "asp"}),
        ("t5", {"method": "ste"}),
        ("llama", {"method": "s-ste"}),
        ("bert", {"method": "decaying"}),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value.values())),
)
def test_a_resumed_run_ends_with_the_same_bits(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    build, sample, _, _ = FAMILIES[family]

    def callback() -> NMSparsity:
        return NMSparsity(interval=1, **options)

    straight, resumed = seeded(build), seeded(build)
    once = trainer(straight, sample, tmp_path / "once", callback())
    once.train()
    other = tmp_path / "moved"
    (tmp_path / "once" / "checkpoint-2").rename(other)
    with torch.no_grad():
        for param in resumed.parameters():
            param.normal_()  # nothing but the folder may matter
    twice = trainer(resumed, sample, tmp_path / "twice", callback())
    twice.train(resume_from_checkpoint=str(other))
    assert_equal(straight, resumed)
    assert [e for e in once.state.log_history if "sad" in e] == [e for e in twice.state.log_history if "sad" in e]


def test_shadow_weights_lie_beside_and_memory_comes_back(tmp_path: Path) -> None:
    model, dense = seeded(llama), seeded(llama)
    sparsify(model, decay=1.0, exclude=heads(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**{key: value[None] for key, value in words(0).items()}).loss.backward()
    optimizer.step()
    save_pretrained(model, tmp_path)
    masked = check_folder(tmp_path, 14)
    shadow = copy.deepcopy(model.state_dict())
    assert any(not torch.equal(shadow[name], masked[name]) for name in masked)

    sparsify(dense, decay=1.0, exclude=heads(dense))
    dense.load_state_dict(masked)
    resume(dense, tmp_path)
    assert_equal(dense, model)
    assert decay_strength(dense) == decay_strength(model) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "options",
    [{}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}],
    ids=["gradient checkpointing", "accumulation"],
)
def test_how_the_gradient_is_made_does_not_matter(options: dict[str, Any], tmp_path: Path) -> None:
    plain, other = seeded(llama).double(), seeded(llama).double()
    if not options:
        other.activation_checkpointing_enable()
    common = {"optim": "sgd", "save_strategy": "no", "learning_rate": 0.1}
    trainer(plain, words, tmp_path / "plain", NMSparsity(decay=5.0), **common).train()
    trainer(other, words, tmp_path / "other", NMSparsity(decay=5.0), **common, **options).train()
    for (name, a), (_, b) in zip(plain.state_dict().items(), other.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    verify(other, "2:4")


def test_bf16_autocast(tmp_path: Path) -> None:
    model = seeded(bert)
    trainer(model, classes, tmp_path, NMSparsity(decay=5.0), bf16=True, save_strategy="no").train()
    verify(model, "2:4")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_an_averaged_model_is_sparse_too(tmp_path: Path) -> None:
    class EMA(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, model: Any = None, **__: Any) -> None:
            self.model = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))

        def on_step_end(self, *_: Any, model: Any = None, **__: Any) -> None:
            self.model.update_parameters(model)

    model, ema = seeded(llama), EMA()
    trainer(model, words, tmp_path, NMSparsity(), ema).train()
    average = ema.model.module
    average.save_pretrained(tmp_path / "ema")
    saved = check_folder(tmp_path / "ema", 14)
    finalize(average)
    verify(average, "2:4")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(average.state_dict()[name], saved[name])
    assert not torch.equal(average.state_dict()[name], model.state_dict()[name])


def test_the_callback_may_come_late_and_models_may_be_made_late(tmp_path: Path) -> None:
    early, late = seeded(llama), seeded(llama)
    trainer(early, words, tmp_path / "early", NMSparsity()).train()
    run = trainer(late, words, tmp_path / "late")
    run.add_callback(NMSparsity())
    run.train(resume_from_checkpoint=str(tmp_path / "early" / "checkpoint-2"))
    assert_equal(early, late)

    arguments = TrainingArguments(str(tmp_path / "init"), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    data = [words(i) for i in range(8)]
    run = Trainer(model_init=lambda: llama(), args=arguments, train_dataset=data, callbacks=[NMSparsity()])
    run.train()
    verify(run.model, "2:4")


def test_training_goes_on_with_a_finalized_model(tmp_path: Path) -> None:
    model = seeded(llama)
    run = trainer(model, words, tmp_path, NMSparsity(), save_strategy="no")
    run.train()
    first = copy.deepcopy(model)
    run.train()
    verify(model, "2:4")
    assert not torch.equal(next(model.parameters()), next(first.parameters()))


def test_the_dense_baseline_trains_by_the_same_callback(tmp_path: Path) -> None:
    model, other = seeded(llama), seeded(llama)
    trainer(model, words, tmp_path / "ours", NMSparsity(method="dense")).train()
    trainer(other, words, tmp_path / "plain").train()
    assert_equal(model, other)


def test_a_checkpoint_of_dense_training_is_continued_sparse(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(seeded(llama), words, tmp_path).train()
    model = seeded(llama)
    trainer(model, words, tmp_path, NMSparsity()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    verify(model, "2:4")
    assert "of dense training" in caplog.text


@pytest.mark.parametrize("method", ["sr-ste", "s-ste"])
def test_the_best_checkpoint_is_loaded_at_the_end(method: str, tmp_path: Path) -> None:
    model = seeded(llama)
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    run = trainer(model, words, tmp_path, NMSparsity(method=method), **options)
    run.train()
    assert_equal(type(model).from_pretrained(run.state.best_model_checkpoint), model)
    # What the sparse model scored in training is what a dense one scores with the file.
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert run.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"torch_compile": True, "torch_compile_backend": "eager"}], ids=["eager", "compiled"]
)
def test_a_plain_module(options: dict[str, Any], tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(8, 16), nn.Linear(16, 2)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": nn.functional.cross_entropy(self.head(self.layer(x).relu()), labels)}

    def sample(i: int) -> dict[str, Any]:
        return {"x": torch.randn(8, generator=torch.Generator().manual_seed(i)), "labels": torch.tensor(i % 2)}

    straight, resumed = seeded(Net), Net()
    trainer(straight, sample, tmp_path / "once", NMSparsity(decay=5.0, exclude=["head"]), **options).train()
    saved = load_file(tmp_path / "once" / "checkpoint-2" / "model.safetensors")
    assert is_2to4(saved["layer.weight"], 1)
    run = trainer(resumed, sample, tmp_path / "twice", NMSparsity(decay=5.0, exclude=["head"]), **options)
    run.train(resume_from_checkpoint=str(tmp_path / "once" / "checkpoint-2"))
    assert_equal(straight, resumed)


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    for options, message in [
        ({"patern": "2:4"}, 'no hyperparameter "patern"'),
        ({"pattern": "4:2"}, "is not N:M"),
        ({"interval": -1}, "expected 0"),
        ({"exclude": "lm_head"}, "takes a list of globs"),
    ]:
        with pytest.raises(SparsityError, match=message):
            NMSparsity(**options)
    with pytest.raises(SparsityError, match="nothing of LlamaForCausalLM is sparse at 2:64"):
        trainer(llama(), words, tmp_path, NMSparsity("2:64"))
    with pytest.raises(SparsityError, match="sparsified before"):
        model = llama()
        sparsify(model)
        trainer(model, words, tmp_path, NMSparsity())


def test_what_its_checkpoints_do_not_cover_is_refused() -> None:
    model = llama()
    sparsify(model)
    state = SimpleNamespace(global_step=3)
    with pytest.raises(SparsityError, match="one device and under DDP"):
        NMSparsity().on_train_begin(SimpleNamespace(deepspeed="zero.json"), state, None, model=model)
    # A loop that is not the Trainer's does not tell what it resumes; one that begins has nothing to tell.
    with pytest.raises(SparsityError, match="from which folder this Trainer resumes"):
        NMSparsity().on_train_begin(SimpleNamespace(), state, None, model=model)
    NMSparsity().on_train_begin(SimpleNamespace(), SimpleNamespace(global_step=0), None, model=model)


def test_generation_makes_each_mask_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = seeded(llama).eval()
    sparsify(model, exclude=heads(model))
    made = {"alone": 0, "together": 0}

    def counted(kind: str, original: Any) -> Any:
        def call(*args: Any) -> Any:
            made[kind] += 1
            return original(*args)

        return call

    monkeypatch.setattr(WeightState, "value", counted("alone", WeightState.value))
    monkeypatch.setattr(Scope, "launch", counted("together", Scope.launch))
    prompt = words(0)["input_ids"][None]
    greedy = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(prompt, **greedy)
    assert made == {"alone": 0, "together": 8}
    made.update(alone=0, together=0)
    with frozen(model):
        inside = model.generate(prompt, **greedy)
    assert made == {"alone": 14, "together": 0}
    trained = seeded(llama).eval()
    trainer(trained, words, tmp_path, NMSparsity())  # converted by now
    made.update(alone=0, together=0)
    assert torch.equal(trained.generate(prompt, **greedy), plain)
    assert made == {"alone": 14, "together": 0}
    finalize(model)
    assert torch.equal(plain, inside)
    assert torch.equal(plain, model.generate(prompt, **greedy))
