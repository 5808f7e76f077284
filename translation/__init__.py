"""Sparse Transformers through fairseq: this folder is a fairseq ``--user-dir``."""

PACKAGES = ("ve-fairseq", "sentencepiece", "sacrebleu")
"""Distributions whose versions a run records, beside core's."""
