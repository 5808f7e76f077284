"""Registers ``nm_translation`` and ``nm_language_modeling`` with fairseq."""

import nm_sparsity.translation.plugin  # noqa: F401
