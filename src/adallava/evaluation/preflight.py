"""What a sweep checks before it starts: a mistake in the second model must not be told after hours with the first.

What a folder's configs say is enough to check budgets and token selections, so no weights are read. What only loading
tells, such as a hub model or a released layout, is checked by the same functions as soon as the model is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from adallava.budget import Budget
from adallava.config import AdaptiveConfig
from adallava.errors import BudgetError, ConfigError
from adallava.hosts.convert_files import read_json
from adallava.hosts.formats import detect
from adallava.hosts.load import CONFIG_FILE, SHIPPED, shipped_folder
from adallava.hosts.model import AdaptiveVLM
from adallava.hosts.visual import check_selector
from adallava.selection import parse_selector


def preflight(source: str, budgets: Sequence[Budget], selections: Sequence[str]) -> AdaptiveConfig | None:
    """Check a model's name, and budgets and token selections as far as its folder tells, without loading weights.

    Returns its adaptive config; None for a base model, and where only loading tells.
    Raises ``CheckpointError``, ``BudgetError`` and ``ConfigError``.
    """
    folder = Path(source) if Path(source).is_dir() else shipped_folder(source) if source in SHIPPED else None
    if folder is None or not folder.is_dir():
        if not _looks_like_hub_id(source):
            AdaptiveVLM.from_pretrained(source)  # raises, and says best what is wrong
        return None
    config = AdaptiveConfig.from_json_file(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else None
    if config is not None:
        check_budgets(source, config, budgets)
    dropping = [text for text in selections if text != "none"]
    if dropping and (model := _without_weights(folder)) is not None:
        check_selections(source, model, config, dropping)
    return config


def check_budgets(name: str, config: AdaptiveConfig, budgets: Sequence[Budget]) -> None:
    """Raise ``BudgetError``, naming the model, for a budget below its minimum."""
    for budget in budgets:
        try:
            budget.resolve(config)
        except BudgetError as error:
            raise BudgetError(f"{name}: {error}") from error


def check_selections(name: str, model: Any, config: AdaptiveConfig | None, selections: Sequence[str]) -> None:
    """Raise ``ConfigError``, naming the model, for a token selection that cannot work in it."""
    for text in selections:
        try:
            check_selector(model, parse_selector(text), None if config is None else config.prefix_layers)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error


def _looks_like_hub_id(source: str) -> bool:
    return source.count("/") == 1 and not source.startswith((".", "/", "~"))


def _without_weights(folder: Path) -> Any:
    """The host of a folder on the meta device; None where only loading tells what it is or why it cannot be used."""
    # A released layout means something else by the same words, and an adapter folder has no host of its own.
    path = folder / "config.json"
    if not path.is_file() or detect(read_json(str(path)), str(folder)) is not None:
        return None
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config)
    except (ValueError, KeyError, OSError):
        return None
