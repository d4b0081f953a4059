"""The errors a user can cause, in one small tree.

Each derives from ``AdaLlavaError``, so that one ``except`` catches what this package says about a request, and from
the built-in error that callers already expect (mostly ``ValueError``). A message names the value that was passed,
what was expected, and what to do. Our own broken invariants are ``assert`` failures, never one of these.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AdaLlavaError(Exception):
    """Root of every error that this package raises about what a user passed."""


class ConfigError(AdaLlavaError, ValueError):
    """An ``AdaptiveConfig`` or another configuration contradicts itself or has unknown keys."""


class BudgetError(AdaLlavaError, ValueError):
    """A budget that cannot be read, or that the model cannot reach."""


class PlanError(AdaLlavaError, ValueError):
    """Gates that are not an execution plan of the given model."""


class CheckpointError(AdaLlavaError, ValueError):
    """A checkpoint whose files, keys or shapes are not what its format promises."""


class ImageError(AdaLlavaError, ValueError):
    """An image that cannot be read or used."""


class PromptError(AdaLlavaError, ValueError):
    """A prompt that cannot be turned into model input, such as one with a wrong number of image places."""


class DataError(AdaLlavaError, ValueError):
    """Training data that is not what its format promises."""


class ProfileError(AdaLlavaError, ValueError):
    """A device profile that is missing, unreadable, of another model or device, or cannot be measured."""


class UnknownNameError(AdaLlavaError, KeyError):
    """A name that a registry does not know."""

    def __str__(self) -> str:
        # KeyError prints the repr of its argument: quotes and escaped newlines around a sentence.
        return str(self.args[0]) if self.args else ""


class ResultExistsError(AdaLlavaError, FileExistsError):
    """A result file that would have been overwritten."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" with the closest of ``known``, or "" when nothing is close."""
    names = list(known)
    same = [k for k in names if k.lower() == name.lower()]
    close = same or difflib.get_close_matches(name, names, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
