"""A hook of mkdocs: links that leave docs/ lead somewhere in the repository only; the site shows where, as text."""

import re
from typing import Any

FOLDERS = "benchmarks|classification|detection|translation|core|examples"
OUTSIDE = re.compile(rf"\[([^\]]+)\]\((?:\.\./)+((?:{FOLDERS})/[^)]*)\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    return OUTSIDE.sub(r"\1 (`\2` in the repository)", markdown)
