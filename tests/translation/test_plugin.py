"""The fairseq tasks: options, which layers are sparse, decoding, the effective lambda, what is refused."""

from __future__ import annotations

import copy
import dataclasses
import math
import signal
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from fairseq import tasks, utils
from fairseq.logging import metrics
from fairseq_tools import WIDTH, arguments, batches, lm_arguments, make_trainer, masked
from omegaconf import OmegaConf
from torch import nn

from nm_sparsity.core import MaskTracker, SparsityConfig, SparsityError, unsparsify
from nm_sparsity.core.model.layers import SparseLayer
from nm_sparsity.translation.__main__ import USER_DIR
from nm_sparsity.translation.options import add_options, as_options, sparsity_config
from nm_sparsity.translation.trainer import unwrap

CONFIGS = [
    SparsityConfig(),
    SparsityConfig(pattern="1:4", method="asp", layout="kernel", remainder="error"),
    SparsityConfig(decay=0.5, include=("encoder.*", "decoder.layers.0"), exclude=("*.fc1",)),
    SparsityConfig(hyperparameters={"decay": "0.25"}),
    SparsityConfig(method="ste", patterns={"decoder.layers": "1:4", "*.out_proj": "dense"}),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_options_stand_for_a_sparsity_config(config: SparsityConfig) -> None:
    task_config = add_options(tasks.FairseqDataclass)()
    for name, value in as_options(config).items():
        setattr(task_config, name.replace("-", "_"), value)
    assert sparsity_config(task_config) == config


def test_every_field_is_an_option_with_help() -> None:
    fields = add_options(tasks.FairseqDataclass).__dataclass_fields__
    for field in dataclasses.fields(SparsityConfig):
        assert len(fields[f"nm_{field.name}"].metadata["help"]) > 10


def test_malformed_options_are_named() -> None:
    task_config = add_options(tasks.FairseqDataclass)()
    task_config.nm_patterns = "decoder.layers"
    with pytest.raises(SparsityError, match=r'"decoder.layers" is not GLOB=PATTERN'):
        sparsity_config(task_config)
    task_config.nm_patterns, task_config.nm_hyperparameters = None, "ramp"
    with pytest.raises(SparsityError, match=r'"ramp" is not NAME=VALUE'):
        sparsity_config(task_config)


def test_commas_in_parentheses_belong_to_an_entry() -> None:
    task_config = add_options(tasks.FairseqDataclass)()
    task_config.nm_patterns = "a(1, 2)=1:4, b=2:4"
    assert sparsity_config(task_config).patterns == {"a(1, 2)": "1:4", "b": "2:4"}


def test_the_yaml_of_the_readme_is_a_pattern_and_without_quotes_a_hint() -> None:
    text = (USER_DIR / "README.md").read_text().partition("```yaml\n")[2].partition("```")[0]
    task_config = add_options(tasks.FairseqDataclass)()
    for written, complaint in (text, ""), (text.replace('"2:4"', "2:4"), 'the number 124: .* quote it: "2:4"'):
        task_config.nm_pattern = str(OmegaConf.create(written).task.nm_pattern)
        with pytest.raises(SparsityError, match=complaint) if complaint else nullcontext():
            assert sparsity_config(task_config).pattern == "2:4"


ARCHITECTURES = [
    "transformer",
    "transformer_iwslt_de_en",
    "transformer_wmt_en_de",
    "transformer_lm",
    "transformer_lm_gpt",
]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_attention_and_feed_forward_are_sparse_and_nothing_else(
    arch: str, corpus: Path, text_corpus: Path, tmp_path: Path
) -> None:
    make = (lm_arguments, text_corpus) if "lm" in arch else (arguments, corpus)
    model = make_trainer(make[0](make[1], tmp_path, "--arch", arch)).get_model()
    found = {name for name, module in model.named_modules() if isinstance(module, SparseLayer)}
    parts = {
        f"{side}.layers.{i}.{name}"
        for side, attentions in (("encoder", ("self_attn",)), ("decoder", ("self_attn", "encoder_attn")))
        if hasattr(model, side)
        for i in range(len(getattr(model, side).layers))
        for name in [
            *(
                f"{a}.{p}_proj"
                for a in attentions
                if "lm" not in arch or a == "self_attn"
                for p in ("q", "k", "v", "out")
            ),
            "fc1",
            "fc2",
        ]
    }
    assert found == parts
    assert model.decoder.output_projection.weight is model.decoder.embed_tokens.weight


def sparse_and_dense(
    corpus: Path, tmp_path: Path, *more: str, n: int = 2, m: int = 4
) -> tuple[nn.Module, nn.Module, dict]:
    """A sparse model, the same model truly dense with its weights masked by the oracle, and a batch."""
    trainer = make_trainer(arguments(corpus, tmp_path, "--nm-pattern", f"{n}:{m}", *more))
    sparse = trainer.get_model()
    dense = copy.deepcopy(sparse)
    unsparsify(dense)
    assert not any(isinstance(module, SparseLayer) for module in dense.modules())
    with torch.no_grad():
        for name, module in sparse.named_modules():
            if isinstance(module, SparseLayer):
                weight = dense.get_submodule(name).weight
                weight.copy_(masked(weight, n, m))
    return sparse, dense, batches(trainer, 1)[0]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4), (2, 8)])
def test_teacher_forced_logits_equal_a_truly_masked_model(corpus: Path, tmp_path: Path, n: int, m: int) -> None:
    sparse, dense, batch = sparse_and_dense(corpus, tmp_path, "--dropout", "0", n=n, m=m)
    for training in (True, False):
        sparse.train(training)
        dense.train(training)
        assert (sparse(**batch["net_input"])[0] - dense(**batch["net_input"])[0]).abs().max() < 1e-5


def test_incremental_logits_equal_a_truly_masked_model(corpus: Path, tmp_path: Path) -> None:
    sparse, dense, batch = sparse_and_dense(corpus, tmp_path)
    inputs, logits = batch["net_input"], []
    with torch.no_grad():
        for model in (sparse.eval(), dense.eval()):
            encoded = model.encoder(inputs["src_tokens"], inputs["src_lengths"])
            state: dict = {}
            steps = [
                model.decoder(inputs["prev_output_tokens"][:, : t + 1], encoded, incremental_state=state)[0]
                for t in range(inputs["prev_output_tokens"].shape[1])
            ]
            logits.append(torch.cat(steps, dim=1))
        assert (logits[0] - logits[1]).abs().max() < 1e-5
        # And to the teacher-forced ones, where there is a token.
        there = inputs["prev_output_tokens"] != sparse.decoder.padding_idx
        assert (logits[0] - sparse(**inputs)[0])[there].abs().max() < 1e-4


def shadow_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".layers." in name and p.dim() == 2}


@pytest.mark.parametrize(
    "more",
    [
        *([], ["--update-freq", "4"], ["--clip-norm", "0.1"]),
        pytest.param(["--amp"], marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
    ],
    ids=["plain", "accumulated", "clipped", "amp"],
)
def test_the_effective_lambda_is_the_nominal_one(corpus: Path, tmp_path: Path, more: list[str]) -> None:
    """One update of SGD with and without the decay: they differ by -lr * lambda * the dropped weights."""
    lr, decay = 0.5, 0.25
    after, before = [], {}
    for value in (0.0, decay):
        options = ["--optimizer", "sgd", "--lr", str(lr), "--nm-decay", str(value), *more]
        argv = arguments(corpus, tmp_path, *options)
        trainer = make_trainer([word for word in argv if word != "--cpu"] if "--amp" in more else argv)
        before = shadow_weights(trainer.get_model())
        trainer.begin_epoch(1)
        trainer.train_step(batches(trainer, 4 if "--update-freq" in more else 1))
        after.append(shadow_weights(trainer.get_model()))
    assert len(before) == 6 + 2 * 10
    for name, weight in before.items():
        expected = -lr * decay * (weight - masked(weight, 2, 4))
        torch.testing.assert_close(after[1][name] - after[0][name], expected, atol=2e-7, rtol=1e-4)


def test_sad_and_flip_rate_are_those_of_one_update(corpus: Path, tmp_path: Path) -> None:
    trainer = make_trainer(arguments(corpus, tmp_path, "--log-interval", "1", "--lr", "0.05"))
    before = shadow_weights(trainer.get_model())
    trainer.begin_epoch(1)
    with metrics.aggregate() as figures:
        trainer.train_step(batches(trainer, 1))
    logged = figures.get_smoothed_values()
    after = shadow_weights(trainer.get_model())
    flips = sum(int(((masked(before[n], 2, 4) == 0) != (masked(after[n], 2, 4) == 0)).sum()) for n in before)
    assert flips > 0
    assert logged["sad"] == flips
    assert logged["flip_rate"] == pytest.approx(flips / sum(w.numel() for w in before.values()), abs=1e-6)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--fp16"], "--fp16 trains a copy of the weights, .*; use --amp"),
        (["--bf16"], "--bf16 trains a copy of the weights, .*; use --amp"),
        (["--ddp-backend", "fully_sharded"], "flattens the weights"),
        (["--nm-pattern", "4:2"], 'pattern "4:2"'),
        (["--nm-include", "encoder.nothing"], 'the glob "encoder.nothing" matches no layer'),
        (["--source-lang", "en", "--target-lang", "fr"], 'no data in the language "fr"; it has de, en'),
    ],
)
def test_refused_with_one_clear_line(options: list[str], complaint: str, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(SparsityError, match=complaint):
        make_trainer(arguments(corpus, tmp_path, *options))


def test_a_folder_without_data(tmp_path: Path) -> None:
    with pytest.raises(SparsityError, match=r"holds no data for translation \(no dict\.\*\.txt\)"):
        make_trainer(arguments(tmp_path, tmp_path))


def test_data_of_the_other_task(corpus: Path, text_corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(SparsityError, match=r"holds no data for translation"):
        make_trainer(arguments(text_corpus, tmp_path))
    with pytest.raises(SparsityError, match=r"holds no data for a language model \(no dict\.txt\)"):
        make_trainer(lm_arguments(corpus, tmp_path))


def test_half_precision_weights_warn(corpus: Path, tmp_path: Path) -> None:
    trainer = make_trainer(arguments(corpus, tmp_path, "--memory-efficient-fp16", "--fp16-init-scale", "1"))
    trainer.begin_epoch(1)
    with pytest.warns(UserWarning, match="half-precision sparse weights, which rounds the decay"):
        trainer.train_step(batches(trainer, 1))


def test_masks_are_computed_once_a_batch_in_decoding(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(arguments(corpus, tmp_path))
    model, task = trainer.get_model().eval(), trainer.task
    sparse = [module for module in model.modules() if isinstance(module, SparseLayer)]
    method = sparse[0].nm_weights["weight"].method
    calls: list[object] = []
    original = type(method).value
    monkeypatch.setattr(type(method), "value", lambda self, w, s: calls.append(s) or original(self, w, s))
    generator = task.build_generator([model], trainer.cfg.generation)
    task.inference_step(generator, [model], batches(trainer, 1)[0])
    assert len(calls) == len(sparse)


def test_conversion_draws_no_random_numbers(corpus: Path, tmp_path: Path) -> None:
    """The sparse model starts from the very weights of fairseq's own."""
    weights = []
    for task in ("translation", "nm_translation"):
        model = make_trainer(arguments(corpus, tmp_path, task=task)).get_model()
        weights.append(model.state_dict())
        random_after = utils.get_rng_state()["torch_rng_state"]
        weights[-1]["rng"] = random_after
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert MaskTracker(unwrap(model)).update().total_sad == 0
    assert model.encoder.embed_tokens.weight.shape[1] == WIDTH


def test_what_an_epoch_did_not_measure_is_not_a_number(corpus: Path, tmp_path: Path) -> None:
    """fairseq would show None, once an epoch before it had a figure."""
    trainer = make_trainer(arguments(corpus, tmp_path))
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with metrics.aggregate("train"):
            metrics.log_scalar("sad", 3.0, round=0)
        metrics.reset_meters("train")
        trainer.task.begin_epoch(2, trainer.get_model())
        assert math.isnan(metrics.get_smoothed_value("train", "sad"))
        with metrics.aggregate("train"):
            metrics.log_scalar("sad", 4.0, round=0)
        assert metrics.get_smoothed_value("train", "sad") == 4
    finally:
        metrics.reset_meters("train")
        signal.signal(signal.SIGTERM, handler)
