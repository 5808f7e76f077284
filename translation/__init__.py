"""Sparse Transformers through fairseq: this folder is a fairseq ``--user-dir``."""

import logging
import warnings

# What fairseq says on import about its own age and its speech tasks.
logging.getLogger("fairseq.tasks.text_to_speech").setLevel(logging.WARNING)
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=".torch.jit.script. is deprecated", category=FutureWarning)
    import nm_sparsity.translation.plugin  # noqa: F401
