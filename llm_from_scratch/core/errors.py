"""The two ways in which a command ends without its result.

`UserError`: asked wrongly. One sentence that names what is wrong and the remedy; exit code 2.
`RunError`: asked rightly, but failed while running (disk full, loss not finite); exit code 1.
Neither is shown with a traceback.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable


class UserError(ValueError):
    """What was asked cannot be done; the message is one sentence and says what to do instead."""


class RunError(RuntimeError):
    """The work failed on its way; the message is one sentence and says what survived."""


_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 80


def shown(value: object) -> str:
    """A value out of a file as it stands in a sentence, cut where it is long."""
    return _short.repr(value)


def nearest(name: str, choices: Iterable[str]) -> str:
    """ " Did you mean 'x'?" for the closest of `choices`, or "" when nothing is close."""
    found = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f" Did you mean '{found[0]}'?" if found else ""
