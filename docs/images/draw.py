"""Draws attention.png anew: runs the Python of docs/en/attention.md and keeps what it drew."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent


def main() -> None:
    page = (HERE.parent / "en" / "attention.md").read_text(encoding="utf-8")
    blocks = [part.partition("\n```")[0] for part in page.split("```python\n")[1:]]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        sys.modules["page"] = module = ModuleType("page")
        exec("\n".join(blocks), vars(module))
        shutil.copy("attention.png", HERE / "attention.png")
        os.chdir(HERE)


if __name__ == "__main__":
    main()
