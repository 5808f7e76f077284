"""Sparse training methods, one file each. To add one, write its file and import it here."""

from nm_sparsity.core.methods import asp, decaying, dense, s_ste, sr_ste, ste
from nm_sparsity.core.methods.base import Method, Step, WeightState, make_method, method_names, register
from nm_sparsity.core.methods.schedules import Schedule

__all__ = [
    "Method",
    "Schedule",
    "Step",
    "WeightState",
    "asp",
    "decaying",
    "dense",
    "make_method",
    "method_names",
    "register",
    "s_ste",
    "sr_ste",
    "ste",
]
