"""Prints the folder to give to fairseq: ``fairseq-train --user-dir $(python -m nm_sparsity.translation) ...``."""

from pathlib import Path

print(Path(__file__).resolve().parent)
