"""What demos of all tasks end with."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping


def print_next_steps(steps: Mapping[str, str]) -> None:
    """Print commands to try next: what each does -> the Python module to run, with its arguments."""
    python = os.path.relpath(sys.executable)
    print("What to try next:")
    for what, command in steps.items():
        print(f"  {python} -m {command}\n      {what}")
