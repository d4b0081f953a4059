"""How the command line ends: one red line and exit status 2 for a user's mistake, never a traceback.

``Commands`` is the group that all commands belong to. It runs typer's own machinery and turns what comes out of it
into a line on stderr and an exit status: 2 for a mistake in the request, 130 for Ctrl-C, as shells expect. With
``--debug``, wherever it stands, errors come with their traceback. Errors that are our own fault always do.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from adallava.errors import AdaLlavaError

DEBUG = "--debug"
_USAGE_ERROR: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
"""The root of typer's usage errors; it has no public name that all supported versions share."""


class Stopped(Exception):
    """Ctrl-C, with a sentence on how to go on."""


class Commands(TyperGroup):
    """The group of all commands; see the module."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run one command line; in standalone mode end the process with its exit status."""
        arguments = list(sys.argv[1:] if args is None else args)
        if not standalone_mode:
            return super().main(arguments, prog_name, complete_var, False, windows_expand_args, **extra)
        debug = _take_debug(arguments)
        _quiet_libraries(debug)
        try:
            status = super().main(arguments, prog_name, complete_var, False, windows_expand_args, **extra)
        except (AdaLlavaError, OSError, Stopped, _USAGE_ERROR) as error:
            if debug and not isinstance(error, Stopped):
                traceback.print_exception(error)
            _say(error)
            sys.exit(130 if isinstance(error, Stopped) else 2)
        except typer.Abort:
            sys.exit(130)
        sys.exit(status if isinstance(status, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; Ctrl-C ends it quietly."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Stopped("stopped.") from error


def error_line(text: str) -> None:
    """Print one red line on stderr."""
    line = " ".join(text.split())
    Console(stderr=True).print(line, style="bold red", markup=False, highlight=False, soft_wrap=True)


def _say(error: BaseException) -> None:
    if isinstance(error, Stopped):
        Console(stderr=True).print(str(error), style="yellow", markup=False, highlight=False, soft_wrap=True)
        return
    if isinstance(error, AdaLlavaError):
        text = str(error)
    elif isinstance(error, OSError):
        text = f"{error.filename}: {error.strerror}." if error.filename and error.strerror else str(error)
    else:
        text = error.format_message().rstrip(".") + "."  # type: ignore[attr-defined]
        context = getattr(error, "ctx", None)
        text += f" See: {context.command_path} --help" if context is not None else ""
    error_line(f"error: {text}")


def _take_debug(arguments: list[str]) -> bool:
    """Take --debug out of the arguments, before or after the command's name; what follows "--" is left alone."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    found = DEBUG in arguments[:end]
    arguments[:end] = [a for a in arguments[:end] if a != DEBUG]
    return found


def _quiet_libraries(debug: bool) -> None:
    """Keep progress bars and hints of libraries off the screen; must come before they are imported."""
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
