"""N:M fine-grained structured sparsity for any PyTorch model, trained from scratch with SR-STE."""

from nm_sparsity.core.errors import CheckpointError, SparsityError, VerificationError
from nm_sparsity.core.files.checkpoint import load_sparsity_state, sparsity_state
from nm_sparsity.core.files.stateful import SparsityState
from nm_sparsity.core.files.verify import Verification, verify
from nm_sparsity.core.masks import keep_largest, nm_mask, satisfies
from nm_sparsity.core.methods import Method, Schedule, Step, WeightState, make_method, method_names, register
from nm_sparsity.core.model.config import SparsityConfig
from nm_sparsity.core.model.convert import finalize, sparsify, unsparsify
from nm_sparsity.core.model.layers import frozen
from nm_sparsity.core.model.report import SparsityReport
from nm_sparsity.core.model.strength import decay_strength
from nm_sparsity.core.pattern import NMPattern
from nm_sparsity.core.training import hooks as hooks  # optimizer steps are treated from here on
from nm_sparsity.core.training.auto_decay import DecayChoice, choose_decay
from nm_sparsity.core.training.diagnostics import Flips, MaskTracker

__all__ = [
    "CheckpointError",
    "DecayChoice",
    "Flips",
    "MaskTracker",
    "Method",
    "NMPattern",
    "Schedule",
    "SparsityConfig",
    "SparsityError",
    "SparsityReport",
    "SparsityState",
    "Step",
    "Verification",
    "VerificationError",
    "WeightState",
    "choose_decay",
    "decay_strength",
    "finalize",
    "frozen",
    "keep_largest",
    "load_sparsity_state",
    "make_method",
    "method_names",
    "nm_mask",
    "register",
    "satisfies",
    "sparsify",
    "sparsity_state",
    "unsparsify",
    "verify",
]
