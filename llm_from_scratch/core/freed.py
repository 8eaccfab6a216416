"""Memory that was freed, returned to the system."""

from __future__ import annotations

import contextlib
import sys

LARGE = 1 << 20
MMAP_THRESHOLD = -3  # its number in malloc.h


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


def return_large() -> None:
    """Let everything of LARGE bytes and more come from the system and return to it when freed.

    glibc takes what is below 32 MB from its heap as soon as a piece of that size was freed once.
    Gradients and activations of a training step are born and die in different orders, so that the
    heap has holes of a fifth of all memory. The price is that each step asks for its pages anew.
    Linux (glibc) only; elsewhere nothing happens.
    """
    if sys.platform == "linux":
        import ctypes

        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, LARGE)
