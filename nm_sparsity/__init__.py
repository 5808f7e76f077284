"""N:M fine-grained structured sparsity for any PyTorch model, trained from scratch with SR-STE."""

from nm_sparsity.core import *  # noqa: F403
from nm_sparsity.core import __all__ as __all__

__version__ = "0.1.0"
