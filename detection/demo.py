"""A dense and a 2:4 sparse Mask R-CNN on composed data, in minutes: ``python -m nm_sparsity.detection.demo``.

Both are trained side by side, one CPU core each; then an AP table, curves, and pictures of predictions.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib
import tyro

from nm_sparsity.core.experiments.command_line import command_line
from nm_sparsity.core.table import format_table
from nm_sparsity.detection import prepare
from nm_sparsity.detection.study import Experiment, execute, scalars

matplotlib.use("Agg")
from matplotlib import pyplot

EPOCHS = 6
DECAY = 0.1
"""The paper's 2e-4 is for 120 epochs of ImageNet: in a run of 1,000 short steps it would do nothing."""


def demo(out: Path = Path("runs/demo_detection"), epochs: int = EPOCHS, train: int = 1400) -> None:
    """Train, evaluate and compare; a second call shows what the first one left, or goes on with it.

    Args:
        out: the folder for data, runs, curves.png and predictions.
        epochs: passes over the training pictures.
        train: number of training pictures.
    """
    data = out / "data"
    if not (data / "annotations" / "instances_test.json").exists():
        prepare.composed(data, train=train)
    schedule = (f"train_cfg.max_epochs={epochs}", f"param_scheduler.1.T_max={epochs}", "train_cfg.val_interval=2")
    shared = ("tiny_mask_rcnn", *schedule, "--data", str(data), "--method")
    experiments = [
        Experiment("dense", (*shared, "dense")),
        Experiment("2to4", (*shared, "sr-ste", "--pattern", "2:4", "--decay", str(DECAY))),
    ]
    print(f"training {', '.join(e.name for e in experiments)}; follow {out}/*/train.log", flush=True)
    names = list(execute(experiments, out, processes=2))
    curves(out, names)
    rows = []
    for name in names:
        result = json.loads((out / name / "evaluation.json").read_text())
        numbers = [result[kind][number] for kind in ("box", "mask") for number in ("AP", "AP50", "AP75")]
        rows.append([name, *numbers, result.get("verified", "dense")])
    kinds = [f"{kind} {number}" for kind in ("box", "mask") for number in ("AP", "AP50", "AP75")]
    print(format_table(["run", *kinds, "pattern"], rows))
    print(f"curves: {out}/curves.png; ground truth above, predictions below: {out}/*/predictions.png")


def curves(out: Path, names: list[str]) -> None:
    """``curves.png``: training loss, box AP on the validation split, and flip rate against iterations."""
    panels = {"loss": "training loss", "coco/bbox_mAP": "box AP (val)", "flip_rate": "flip rate"}
    figure, axes = pyplot.subplots(1, len(panels), figsize=(12, 3.4), layout="constrained")
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        for name in names:
            log = scalars(out / name)
            training, validation = ([line for line in log if ("loss" in line) == wanted] for wanted in (True, False))
            # Validation lines count epochs, training lines iterations.
            scale = training[-1]["step"] / validation[-1]["step"] if key.startswith("coco") else 1
            points = [(line["step"] * scale, line[key]) for line in log if key in line]
            axis.plot([x for x, _ in points], [y for _, y in points], label=name)
        axis.set(xlabel="iteration", title=title)
    axes[0].legend()
    figure.savefig(out / "curves.png", dpi=120)
    pyplot.close(figure)


@command_line
def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    tyro.cli(demo, args=arguments, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
