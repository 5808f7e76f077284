"""N:M fine-grained structured sparsity for any PyTorch model, trained from scratch with SR-STE."""

if __name__ != "nm_sparsity.core":
    raise ImportError(f'import this package as nm_sparsity.core, not as {__name__}: "pip install nm-sparsity" first')

from nm_sparsity.core.checkpoint import load_sparsity_state, sparsity_state
from nm_sparsity.core.config import SparsityConfig
from nm_sparsity.core.decay import decay_strength
from nm_sparsity.core.diagnostics import Flips, MaskTracker
from nm_sparsity.core.errors import CheckpointError, SparsityError, VerificationError
from nm_sparsity.core.layers import frozen
from nm_sparsity.core.masks import keep_largest, nm_mask, satisfies
from nm_sparsity.core.methods import Method, make_method, register
from nm_sparsity.core.pattern import NMPattern
from nm_sparsity.core.report import SparsityReport
from nm_sparsity.core.sparsify import finalize, sparsify, unsparsify
from nm_sparsity.core.verify import Verification, verify

__all__ = [
    "CheckpointError",
    "Flips",
    "MaskTracker",
    "Method",
    "NMPattern",
    "SparsityConfig",
    "SparsityError",
    "SparsityReport",
    "Verification",
    "VerificationError",
    "decay_strength",
    "finalize",
    "frozen",
    "keep_largest",
    "load_sparsity_state",
    "make_method",
    "nm_mask",
    "register",
    "satisfies",
    "sparsify",
    "sparsity_state",
    "unsparsify",
    "verify",
]
