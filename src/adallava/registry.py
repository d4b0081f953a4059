"""``Registry``: names for things that can be chosen, such as token selectors, tasks and figures.

A target may be given as "module:attribute", which is imported when it is first asked for: listing the names of a
command stays fast, and a bottom room can be extended by a higher one without importing it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Generic, TypeVar, cast

from adallava.errors import UnknownNameError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """A mapping from names to targets that grows until it is frozen.

    kind: what the names stand for, in the singular, for error messages ("token selector").
    """

    def __init__(self, kind: str) -> None:
        """Start empty."""
        self.kind = kind
        self._targets: dict[str, T | str] = {}
        self._frozen = False

    def register(self, name: str, target: T | str) -> None:
        """Add ``target``, or the text "module:attribute" that says where it is, under ``name``.

        Raises ``ValueError`` for a name that is taken or a text of another form, ``RuntimeError`` when frozen.
        """
        if self._frozen:
            raise RuntimeError(f"cannot register {self.kind} {name!r}: the registry is frozen. Register it at import.")
        if name in self._targets:
            raise ValueError(f"{self.kind} {name!r} is registered already. Choose another name.")
        if isinstance(target, str) and not all(target.partition(":")):
            raise ValueError(
                f"target {target!r} of {self.kind} {name!r}: expected text of the form 'module:attribute'."
            )
        self._targets[name] = target

    def get(self, name: str) -> T:
        """Return the target of ``name``, importing it if need be; raise ``UnknownNameError`` listing the names."""
        if name not in self._targets:
            known = ", ".join(self._targets) or "none"
            raise UnknownNameError(f"unknown {self.kind} {name!r}.{did_you_mean(name, self._targets)} Known: {known}.")
        target = self._targets[name]
        if isinstance(target, str):
            module, _, attribute = target.partition(":")
            target = self._targets[name] = cast("T", getattr(importlib.import_module(module), attribute))
        return target

    def names(self) -> list[str]:
        """Return the names in the order of their registration."""
        return list(self._targets)

    def freeze(self) -> None:
        """Refuse further names. Lazy targets still load."""
        self._frozen = True

    def __contains__(self, name: object) -> bool:
        """Return whether ``name`` is known."""
        return name in self._targets

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._targets)

    def __len__(self) -> int:
        """Return the number of names."""
        return len(self._targets)
