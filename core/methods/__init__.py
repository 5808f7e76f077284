"""Sparse training methods, one file each. To add one, write its file and import it here."""

from nm_sparsity.core.methods import asp, dense, sr_ste, ste
from nm_sparsity.core.methods.base import Method, Step, WeightState, make_method, method_names, register

__all__ = [
    "Method",
    "Step",
    "WeightState",
    "asp",
    "dense",
    "make_method",
    "method_names",
    "register",
    "sr_ste",
    "ste",
]
