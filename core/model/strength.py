"""How strongly the decay of dropped weights acted: lambda * sum(lr)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import nn

from nm_sparsity.core.methods import Method, Schedule
from nm_sparsity.core.model import bank
from nm_sparsity.core.model.layers import sparse_weights
from nm_sparsity.core.model.wrappers import unwrap

STRENGTH = 6.0
"""lambda * sum(lr) of the paper's ImageNet run, rounded."""

WEAK_DECAY = 0.1
"""Below this lambda * sum(lr), dropped weights hardly decay and SR-STE trains like STE."""


def decay_strength(model: nn.Module) -> float | None:
    """The sum of lambda * lr over all optimizer steps so far: how strongly dropped weights were decayed, at most.

    With plain SGD a weight that is dropped throughout shrinks by about exp(-strength), with momentum by
    exp(-strength / (1 - momentum)). About 6 in the paper's ImageNet run; below 0.1 SR-STE acts like STE. Adaptive
    optimizers divide the term by the gradient's magnitude, which no such scale describes. A scheduled lambda counts as
    it was at each step, and steps before the weights became sparse count nothing. ``None`` if the method has no decay
    or has not been stepped.
    """
    strengths = [
        _largest_decay(sparse.method) * float(sparse.lr_sum)
        for _, param, sparse in sparse_weights(unwrap(model))
        if param.requires_grad
    ]
    return max(strengths, default=0.0) or None


def planned_strength(method: Method, lrs: Sequence[float]) -> float | None:
    """The sum of lambda * lr over the steps of a run, whose learning rates are `lrs`; ``None`` without a decay."""
    decay = getattr(method, "decay", None)
    if decay is None:
        return None
    if not isinstance(decay, Schedule):
        return float(decay) * sum(lrs)
    steps = torch.arange(len(lrs), dtype=torch.float64, device="cpu")
    return float((decay.at(steps / len(lrs)) * torch.tensor(lrs, dtype=torch.float64, device="cpu")).sum())


def _largest_decay(method: Method) -> float:
    decay = getattr(method, "decay", 0.0)
    return decay.largest if isinstance(decay, Schedule) else float(decay)


def warn_if_weak(model: nn.Module) -> None:
    """Warn if the decay never reached the weights, or was too weak to matter in the SGD steps so far."""
    trained = [s for _, p, s in sparse_weights(model) if p.requires_grad and p.grad is not None]
    if steps := bank.left_out(model):
        warn_left_out(sum(p.requires_grad and not s.stepped for _, p, s in sparse_weights(model)), steps)
    elif trained and not any(sparse.stepped or sparse.lr_sum for sparse in trained):
        warnings.warn(
            "the sparse weights got gradients, but no torch.optim optimizer stepped them: if they were trained, their "
            "method's part in it (SR-STE's decay, ASP's mask) was never applied",
            UserWarning,
            stacklevel=3,
        )
    strength = decay_strength(model)
    if strength is not None and not any(s.preconditioned for _, _, s in sparse_weights(model)):
        warn_if_strength_is_weak(strength)


def warn_left_out(weights: int, steps: int) -> None:
    """Warn that so many sparse weights were in no optimizer during the last so many steps."""
    warnings.warn(
        f"{weights} sparse weights got gradients, but no optimizer that made the last {steps} steps holds them: "
        "neither they nor their decay are applied. Give model.parameters() to a torch.optim optimizer that does not "
        "copy or flatten them (layer.weight is the masked value and no nn.Parameter)",
        UserWarning,
        stacklevel=3,
    )


def warn_if_of_another_length(model: nn.Module) -> None:
    """Warn if what was planned over the run came to no end, or long before the run's, since it had other steps."""
    for _, param, sparse in sparse_weights(model):
        method, total, done = sparse.method, sparse.method.total_steps, int(sparse.steps)
        if total is None or not (method.scheduled and param.requires_grad and done):
            continue
        # One step in a hundred is no matter, such as those that a loss scaler skips; that which fixes the mask is.
        least = {name: sparse.boundary(v.end - 0.01) for name, v in vars(method).items() if isinstance(v, Schedule)}
        if method.fix_at:
            least["fix_at"] = sparse.boundary(max(method.fix_at, method.latest_start)) + 1
        missed = [name for name, steps in least.items() if done < min(steps, total)]
        if missed or done > 1.01 * total:
            what = f"{', '.join(missed)} came to no end" if missed else "what was planned over the run ended before it"
            warnings.warn(
                f"the weights were trained for {done:,} optimizer steps and total_steps is {total:,}: {what}",
                UserWarning,
                stacklevel=3,
            )
            return


def warn_if_strength_is_weak(strength: float) -> None:
    """Warn if `strength`, done or planned, is too weak to matter."""
    if strength < WEAK_DECAY:
        warnings.warn(
            f"lambda * sum(lr) is {strength:.2g}: below {WEAK_DECAY} dropped weights hardly decay and SR-STE trains "
            "like STE (the paper's ImageNet run has 6); a short run needs a larger decay",
            UserWarning,
            stacklevel=3,
        )
