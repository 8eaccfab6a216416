"""Memory that was freed, returned to the system."""

from __future__ import annotations

import contextlib
import sys


def give_back() -> None:
    """Return what was freed in small pieces to the system.

    Parsing a vocabulary of 262,144 entries leaves 280 MB of them, which the C library keeps for
    later small pieces; what comes next is large and would come on top. Linux (glibc) only;
    elsewhere nothing happens.
    """
    if sys.platform == "linux":
        import ctypes  # not for those who have nothing to return

        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
