"""``decay="auto"`` in a run folder: lambda is chosen once, noted with its reason, and a run that resumes keeps it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from nm_sparsity.core.errors import SparsityError
from nm_sparsity.core.experiments.run import write_json
from nm_sparsity.core.model.config import SparsityConfig
from nm_sparsity.core.training.auto_decay import DecayChoice

CHOICE = "decay.json"
"""In a run folder: the lambda that was chosen, why, and what was tried."""


def with_chosen_decay(
    sparsity: SparsityConfig, folder: Path, resume: bool, choose: Callable[[], DecayChoice], main: bool = True
) -> SparsityConfig:
    """`sparsity` with a number for lambda, where it asks for one to be chosen: that in `folder` if the run resumes.

    Args:
        choose: chooses it otherwise.
        main: whether this process notes and tells the choice, for all that train together.

    Raises:
        SparsityError: if the note in the folder is damaged, or `choose` finds nothing.
    """
    if not sparsity.decay_is_auto:
        return sparsity
    path = folder / CHOICE
    if resume and path.is_file():
        try:
            return sparsity.with_decay(float(json.loads(path.read_text())["decay"]))
        except (ValueError, TypeError, LookupError) as error:
            raise SparsityError(
                f"{path} is damaged ({error}): give lambda as a number, the run's config has it"
            ) from None
    choice = choose()
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, choice)
        print(f"lambda is {choice.decay:g}: {choice.reason}", flush=True)
    return sparsity.with_decay(choice.decay)
