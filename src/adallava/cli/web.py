"""``adallava demo --web``: the demo as a page in a browser."""

from __future__ import annotations

import importlib.util

from rich.console import Console

from adallava.cli.demo import DemoOptions
from adallava.errors import ConfigError
from adallava.hosts.images import load_image

_NEEDED = ("gradio", "matplotlib")


def web(options: DemoOptions, port: int | None) -> None:
    """Load the models that have budgets, and serve the page on this machine until Ctrl-C."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"the page needs {', '.join(missing)}: pip install 'adallava[web]'")
    from adallava.web.page import build, show
    from adallava.web.studio import Studio

    image = None if options.image is None else load_image(options.image)
    studio = Studio(options.models)
    page = build(studio, image, options.questions, options.seed)
    say = Console(stderr=True, highlight=False, soft_wrap=True).print
    show(page, port, lambda address: say(f"the page is at {address}; stop with Ctrl-C"))
