"""Arguments of a wrong type: one line each that names what was expected, and what was found; nothing is changed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from nm_sparsity.core import (
    MaskTracker,
    NMPattern,
    SparsityError,
    decay_strength,
    finalize,
    frozen,
    keep_largest,
    load_sparsity_state,
    make_method,
    nm_mask,
    satisfies,
    sparsify,
    sparsity_state,
    unsparsify,
    verify,
)
from nm_sparsity.core.masks import add_dropped_, soft_threshold


def enter(model: Any) -> None:
    with frozen(model):
        pass


def sparse() -> nn.Module:
    net = nn.Sequential(nn.Linear(8, 8))
    sparsify(net)
    return net


NO_MODEL = "expected a torch.nn.Module, found"
WRONG: dict[str, tuple[Callable[[], object], str]] = {
    **{
        f"{function.__name__}({value!r:.20})": ((lambda f=function, v=value: f(v)), NO_MODEL)
        for function in (sparsify, finalize, unsparsify, enter, decay_strength, MaskTracker, sparsity_state)
        for value in (None, "model.pt", [nn.Linear(8, 8)], nn.Linear)
    },
    **{
        f"sparsify {arguments}": ((lambda a=arguments: sparsify(nn.Linear(8, 8), **a)), expected)
        for arguments, expected in (
            ({"pattern": (2, 4)}, "is not of the form N:M"),
            ({"pattern": 24}, "is not of the form N:M"),
            ({"pattern": None}, "is not of the form N:M"),
            ({"pattern": "2:" + "9" * 5000}, "is not of the form N:M"),
            ({"layout": 1}, "unknown layout"),
            ({"layout": ["channel"]}, "unknown layout"),
            ({"remainder": True}, "remainder must be"),
            ({"include": "0"}, "include takes a list of globs"),
            ({"include": 0}, "include takes a list of globs"),
            ({"include": [nn.Linear]}, "include takes globs of layer names as text"),
            ({"exclude": None}, "exclude takes a list of globs"),
            ({"exclude": [b"0"]}, "exclude takes globs of layer names as text"),
            ({"patterns": [("0", "2:4")]}, "patterns takes a mapping"),
            ({"patterns": "2:4"}, "patterns takes a mapping"),
            ({"patterns": {nn.Linear: "2:4"}}, "patterns takes a mapping"),
            ({"patterns": {"": None}}, "is not of the form N:M"),
            ({"trust": nn.Linear}, "trust takes a list of classes"),
            ({"method": 3}, "unknown method"),
            ({"method": ["ste"]}, "unknown method"),
            ({"method": nn.Linear}, "unknown method"),
            ({"decay": "much"}, "must be a number, a schedule or"),
            ({"decay": None}, "decay"),
            ({"decay": [0.1]}, "decay"),
            ({"decay": True}, "decay"),
            ({"decay": float("nan")}, "decay"),
        )
    },
    "NMPattern(2.0, 4)": (lambda: NMPattern(2.0, 4), "is not N:M"),  # type: ignore[arg-type]
    "NMPattern('2', '4')": (lambda: NMPattern("2", "4"), "is not N:M"),  # type: ignore[arg-type]
    "make_method(None)": (lambda: make_method(None), "unknown method"),  # type: ignore[arg-type]
    "keep_largest(list)": (lambda: keep_largest([1.0, 2.0], "2:4"), "needs a tensor, found list"),  # type: ignore[arg-type]
    "nm_mask(int)": (lambda: nm_mask(torch.ones(4, 4, dtype=torch.int), "2:4"), "floating-point weight"),
    "keep_largest(fp8)": (lambda: keep_largest(torch.ones(4, 4).to(torch.float8_e4m3fn), "2:4"), "16 bits or more"),
    "keep_largest(dtype=int)": (lambda: keep_largest(torch.ones(4, 4), "2:4", dtype=torch.int), "floating-point dtype"),
    **{
        f"nm_mask(dims={dims})": (
            lambda dims=dims: nm_mask(torch.ones(4, 4), "2:4", dims),
            "dims are different dimensions",
        )
        for dims in (1, None, "1", (), (2,), (-3,), (1, 1), (1, -1), (1.0,), (True,))
    },
    "nm_mask(vector)": (lambda: nm_mask(torch.ones(4), "2:4"), "dims are different dimensions"),
    "soft_threshold(scales)": (
        lambda: soft_threshold(torch.ones(4, 4), "2:4", (1,), torch.empty(0)),
        "a 0-dim tensor, found one of shape (0,)",
    ),
    "add_dropped_(shape)": (
        lambda: add_dropped_(torch.zeros(8, 4)[:4], torch.ones(8, 4), "2:4", (1,), 1.0),
        "of shape (4, 4) does not go with a weight of (8, 4)",
    ),
    "satisfies(sparse)": (lambda: satisfies(torch.eye(4).to_sparse(), "2:4"), "needs a dense tensor"),
    "verify(None)": (lambda: verify(None, "2:4"), "found NoneType"),  # type: ignore[arg-type]
    "verify(3)": (lambda: verify(3, "2:4"), "int"),  # type: ignore[arg-type]
    "verify(tensor)": (lambda: verify(torch.ones(4, 4), "2:4"), "Tensor"),  # type: ignore[arg-type]
    "verify(exclude='0')": (lambda: verify({"w": torch.ones(4, 4)}, "2:4", exclude="w"), "exclude takes a list"),
    "load_sparsity_state(list)": (lambda: load_sparsity_state(sparse(), [1]), "list"),  # type: ignore[arg-type]
    "load_sparsity_state(model)": (lambda: load_sparsity_state(3, {}), NO_MODEL),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_type_is_one_clear_line(case: str) -> None:
    call, expected = WRONG[case]
    with pytest.raises(SparsityError) as caught:
        call()
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_numbers_as_text_are_numbers() -> None:
    """PyYAML reads 2e-4 as text."""
    net = nn.Sequential(nn.Linear(8, 8))
    sparsify(net, decay="2e-4")
    assert net[0].nm_weights["weight"].method == make_method("sr-ste", decay=2e-4)
