"""FLOPs of a forward pass, in total and per weight."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nm_sparsity.core.model.candidates import candidates, is_supported, is_transposed
from nm_sparsity.core.model.modes import evaluating


def count_flops(model: nn.Module, *inputs: Any) -> tuple[int, dict[str, int]]:
    """(FLOPs of the whole forward pass, FLOPs of each weight's product by weight name), 2 a multiply-accumulate.

    `model` runs once in eval mode without gradients; put it and `inputs` on the meta device to make that free. A
    weight that the pass does not use is missing.
    """
    names = {id(candidate.param): candidate.names[0] for candidate in candidates(model)}
    counts: dict[str, int] = {}

    def count(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, nn.MultiheadAttention):
            # The output projection is applied inside, without a call of its module.
            positions = args[0].numel() // args[0].shape[-1] if args else 0
            used = [*module._parameters.values(), module.out_proj._parameters["weight"]]
        else:
            transposed = is_transposed(module)
            t: Tensor = args[0] if transposed else output
            param = module._parameters["weight"]
            assert param is not None
            positions, used = t.numel() // param.shape[0], [param]
        for weight in used:
            if weight is not None and weight.dim() > 1:
                counts[names[id(weight)]] = counts.get(names[id(weight)], 0) + 2 * weight.numel() * positions

    handles = [m.register_forward_hook(count) for m in model.modules() if is_supported(m)]
    counter = FlopCounterMode(display=False)
    try:
        with evaluating(model), counter:
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return counter.get_total_flops(), counts
