"""Print the folder to give to fairseq: ``fairseq-train --user-dir $(python -m nm_sparsity.translation) ...``."""

from pathlib import Path

USER_DIR = Path(__file__).resolve().parent

if __name__ == "__main__":
    print(USER_DIR)
