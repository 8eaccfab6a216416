"""Where a Chromium is, and how it is started so that nothing can leave the machine."""

from __future__ import annotations

import os
import shutil
import sys
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
REMEDY = "install Debian's chromium, or set CHROMIUM to the program"


def find_browser() -> str | None:
    """The program that `$CHROMIUM` names, else the first there is; None where there is none."""
    named = os.environ.get("CHROMIUM")
    for name in (named,) if named else NAMES:
        if found := shutil.which(name):
            return found
    return None


def why_no_browser() -> str | None:
    """What is missing for the browser tests, as a sentence; None where nothing is."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "the package playwright is missing (make test installs it)"
    if find_browser() is None:
        named = os.environ.get("CHROMIUM")
        what = f"CHROMIUM is {named!r}, which is no program" if named else "no chromium found"
        return f"{what}; {REMEDY}"
    return None


def launch_options() -> dict[str, Any]:
    """For Playwright's `chromium.launch`: no name but this machine's address has an address."""
    args = [
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        "--font-render-hinting=none",
    ]
    if sys.platform.startswith("linux"):
        args.append("--disable-dev-shm-usage")  # a container's /dev/shm is small
        if os.geteuid() == 0:
            args.append("--no-sandbox")  # Chromium's sandbox does not start as root
    return {"executable_path": find_browser(), "args": args}
