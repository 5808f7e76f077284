"""MMDetection's own scripts: ``python -m nm_sparsity.detection.tool {train,test,...} ARGUMENTS``.

They import ``mmcv.ops`` before they read a config, whose ``custom_imports`` then come too late to put operators in the
place of missing compiled ones. Here the plug-in is imported first.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import mmdet

from nm_sparsity.core.errors import SparsityError
from nm_sparsity.core.experiments.command_line import command_line
from nm_sparsity.detection.config import import_mmdet

FOLDER = Path(mmdet.__file__).parent / ".mim" / "tools"


@command_line
def main(arguments: list[str] | None = None) -> None:
    """Run ``tools/NAME.py`` with the rest of the arguments.

    Raises:
        SparsityError: if MMDetection has no script of that name.
    """
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    script = FOLDER / f"{name}.py"
    if not script.is_file():
        known = sorted(str(path.relative_to(FOLDER).with_suffix("")) for path in FOLDER.rglob("*.py"))
        raise SparsityError(f'MMDetection has no script "{name}"; it has {", ".join(known)}')
    import_mmdet()
    sys.argv = [str(script), *rest]
    sys.path.insert(0, str(script.parent))  # as Python does for a script
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    sys.exit(main())
