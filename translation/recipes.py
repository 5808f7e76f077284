"""What a training run of a Transformer is: one frozen dataclass; and the recipes, which are such dataclasses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from nm_sparsity.core import CheckpointError, SparsityConfig, SparsityError
from nm_sparsity.core.experiments.recipes import Recipes, RunConfig
from nm_sparsity.core.experiments.run import CONFIG
from nm_sparsity.translation.__main__ import USER_DIR
from nm_sparsity.translation.options import as_options

Option = str | int | float | bool

BEST, LAST = "checkpoint_best.pt", "checkpoint_last.pt"
"""fairseq's checkpoints in a run folder: the best on the validation data, and what it goes on from."""


@dataclass(frozen=True)
class TransformerConfig(RunConfig):
    """One training run: a prepared corpus, a sparsity, and fairseq's own options."""

    # How long to train and how to decode may change; "run" is what `folder` was called.
    may_change = (*RunConfig.may_change, "beam", "lenpen", "fairseq", "run")
    renamed: ClassVar[Mapping[str, str]] = {**RunConfig.renamed, "--run": "--out"}

    data: Path = Path("data/number-words")
    """A folder made by prepare."""
    resume: bool = False
    """Refuse to start anew: there must be a run to continue. One that is there is continued in any case."""
    seed: int = 1
    """Seeds the initial weights, the order of batches and dropout."""
    beam: int = 5
    """Beam size when evaluating."""
    lenpen: float = 1.0
    """Length penalty when evaluating: above 1 favours longer translations."""
    fairseq: Annotated[Mapping[str, Option], tyro.conf.Suppress] = field(default_factory=dict)
    """fairseq-train's options by name. Any of them may also follow on the command line."""

    @property
    def checkpoint_to_start_from(self) -> Path | None:
        """The file that `init_from` stands for; none once the run has a checkpoint of its own to go on from."""
        begun = (self.folder / LAST).is_file()
        return None if self.init_from is None or begun else checkpoint_of(self.init_from)

    def arguments(self) -> list[str]:
        """The arguments of the plain ``fairseq-train`` command that this run stands for."""
        options: dict[str, Option | object] = {
            "user-dir": USER_DIR,
            "save-dir": self.folder,
            "tensorboard-logdir": self.folder / "tensorboard",
            "seed": self.seed,
            **self.fairseq,
            **as_options(self.sparsity),
        }
        if self.checkpoint_to_start_from is not None:
            options["finetune-from-model"] = self.checkpoint_to_start_from
        words = [str(self.data / "bin")]
        for name, value in options.items():
            if value is not False:
                words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        return words


def checkpoint_of(run: Path) -> Path:
    """The best checkpoint of a run folder; a checkpoint file itself.

    Raises:
        CheckpointError: if there is none.
    """
    best, last = run / BEST, run / LAST
    if not run.is_dir():
        best = run
    if best.is_file():
        return best
    instead = f"; training has not come to a validation yet: {last} is what there is" * last.is_file()
    raise CheckpointError(f"there is no checkpoint {best}{instead}")


def recorded(run: Path) -> dict[str, Any]:
    """The config in a run folder, as `RunConfig.to_dict` gave it; empty if there is none.

    Raises:
        SparsityError: if it is damaged.
    """
    path = run / CONFIG
    if not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_text())["config"]
        return {**tree, "sparsity": dict(tree["sparsity"])}
    except (ValueError, KeyError, TypeError):
        raise SparsityError(f"{path} is not the config of a run of ours: remove it, or choose another run") from None


RECIPES = Recipes[TransformerConfig]()
"""Every recipe by name."""

get = RECIPES.get


DECAY = 2e-4
"""SR-STE's lambda, the paper's for ImageNet. Under Adam lambda * sum(lr) says little: the decay is divided by the root
mean square of the gradients, some 1e-3 in the tiny recipes, and so acts that much more strongly than under SGD. On
number-words' validation set (800 updates) 2e-4 was as good as STE and 2e-3 already worse: translation/README.md."""

ADAM: dict[str, Option] = {
    "optimizer": "adam",
    "adam-betas": "(0.9, 0.98)",
    "adam-eps": 1e-9,
    "lr-scheduler": "inverse_sqrt",
    "dropout": 0.1,
    # fairseq's default of 8 silently drops the last batch of any split that is not a multiple of 8.
    "required-batch-size-multiple": 1,
    "no-progress-bar": True,
}
SMOOTHED: dict[str, Option] = {
    "task": "nm_translation",
    "share-all-embeddings": True,
    "criterion": "label_smoothed_cross_entropy",
    "label-smoothing": 0.1,
}


# Vaswani et al. 2017, table 3: Adam 0.9/0.98, inverse square root after 4,000 steps of warm-up, 100,000 steps of some
# 25,000 target tokens (8 GPUs or --update-freq parts of 4,096; one GPU is assumed), label smoothing 0.1. The paper does
# not tell its lambda for translation: see `DECAY`. The learning rates here sum to 24: lambda * sum(lr) is 0.005.
_base = RECIPES.add(
    "transformer_base_wmt14_2to4",
    "Transformer base on WMT14 English-German, 2:4 SR-STE (paper: about 27.2 BLEU, dense 27.3)",
    TransformerConfig(
        data=Path("data/wmt14"),
        sparsity=SparsityConfig(decay=DECAY),
        beam=4,
        lenpen=0.6,
        fairseq={
            **SMOOTHED,
            **ADAM,
            "arch": "transformer_wmt_en_de",
            "lr": 7e-4,
            "warmup-init-lr": 1e-7,
            "warmup-updates": 4000,
            "max-update": 100_000,
            "max-tokens": 4096,
            "update-freq": 8,
            "keep-last-epochs": 5,
            "log-interval": 100,
        },
    ),
)
RECIPES.add(
    "transformer_base_wmt14_dense",
    "Transformer base on WMT14 English-German, dense",
    replace(_base, sparsity=SparsityConfig(method="dense")),
)


def tiny(width: int, layers: int) -> dict[str, Option]:
    """A Transformer that trains in minutes on one CPU core: `width` channels, `layers` in encoder and decoder each."""
    sides = ("encoder", "decoder")
    return {
        **{f"{side}-embed-dim": width for side in sides},
        **{f"{side}-ffn-embed-dim": 2 * width for side in sides},
        **{f"{side}-layers": layers for side in sides},
        **{f"{side}-attention-heads": 4 for side in sides},
        "arch": "transformer",
        "lr": 2e-3,
        "lr-scheduler": "cosine",
        "warmup-updates": 200,
        "max-tokens": 2500,
        "num-workers": 0,
        "log-interval": 50,
        "no-epoch-checkpoints": True,
    }


for _corpus, _updates, _about in (
    ("number-words", 800, "number-words, 2:4 SR-STE, in two CPU minutes"),
    ("libreoffice", 2000, "LibreOffice's easy sentences, 2:4 SR-STE, in a few CPU minutes"),
):
    RECIPES.add(
        f"tiny_{_corpus.replace('-', '_')}",
        f"a 2+2-layer Transformer on {_about}",
        TransformerConfig(
            data=Path("data") / _corpus,
            sparsity=SparsityConfig(decay=DECAY),
            beam=1,
            fairseq={**SMOOTHED, **ADAM, **tiny(128, 2), "max-update": _updates},
        ),
    )

_decoder = {name: value for name, value in tiny(128, 2).items() if not name.startswith("encoder")}
RECIPES.add(
    "tiny_pydoc_topics",
    "a 2-layer Transformer language model on pydoc-topics, 2:4 SR-STE, in two CPU minutes",
    TransformerConfig(
        data=Path("data/pydoc-topics"),
        sparsity=SparsityConfig(decay=DECAY),
        fairseq={
            **ADAM,
            **_decoder,
            "task": "nm_language_modeling",
            "arch": "transformer_lm",
            **{f"decoder-{end}-dim": _decoder["decoder-embed-dim"] for end in ("input", "output")},
            "share-decoder-input-output-embed": True,
            "tokens-per-sample": 128,
            "max-update": 600,
        },
    ),
)
