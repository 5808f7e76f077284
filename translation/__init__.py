"""Sparse Transformers through fairseq: this folder is a fairseq ``--user-dir``."""

import logging
import warnings

# What fairseq says and causes on every start: about its own age, its speech tasks, and memory pinned for no GPU.
logging.getLogger("fairseq.tasks.text_to_speech").setLevel(logging.WARNING)
for _message in (
    r".torch\.jit\.script. is deprecated",
    r".torch\.cuda\.amp\.",
    r"'pin_memory' argument is set as true but no accelerator",
    r"(?s).*\bhydra\b",
    r"Support for mismatched key_padding_mask and attn_mask",
):
    warnings.filterwarnings("ignore", message=_message)

import nm_sparsity.translation.plugin  # noqa: E402, F401
