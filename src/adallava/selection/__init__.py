"""Visual token selection: which of an image's tokens the decoder gets to see.

Pure tensor functions behind small frozen dataclasses, one file per method. Nothing here knows a model: a host reads the
tensors, asks a selector, and splices what it answers. A selector works at one of two places (``place``): "tower", on
the patch features before the projector, or "decoder", on the tokens of a prompt before one decoder layer.

Names are registered with lazy targets, so that listing them does not import torch.
"""

from __future__ import annotations

import ast
import dataclasses
from typing import TYPE_CHECKING, Any

from adallava.errors import ConfigError, did_you_mean
from adallava.registry import Registry

if TYPE_CHECKING:
    from adallava.selection.common import DecoderSelector, TowerSelector

SELECTORS: Registry[type[TowerSelector] | type[DecoderSelector]] = Registry("token selector")
SELECTORS.register("none", "adallava.selection.baselines:NoSelection")
SELECTORS.register("prumerge", "adallava.selection.prumerge:PruMerge")
SELECTORS.register("prumerge+", "adallava.selection.prumerge:PruMergePlus")
SELECTORS.register("fastv", "adallava.selection.fastv:FastV")
SELECTORS.register("random", "adallava.selection.baselines:Random")
SELECTORS.register("uniform", "adallava.selection.baselines:Uniform")


def parse_selector(text: str) -> TowerSelector | DecoderSelector:
    """Build a selector from text, "name" or "name:setting=value,...", such as "fastv:layer=3,ratio=0.75".

    Raises ``UnknownNameError`` for an unknown name and ``ConfigError`` for settings that cannot be read or are wrong.
    """
    name, _, rest = text.partition(":")
    settings = {}
    for pair in rest.split(",") if rest else []:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"{text!r} has {pair!r} where a setting=value was expected, as in 'fastv:ratio=0.75'.")
        try:
            settings[key.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError) as error:
            raise ConfigError(
                f"{text!r}: {value!r} is no value for {key.strip()}, expected a number or True."
            ) from error
    return selector(name.strip(), **settings)


def describe_selector(chosen: TowerSelector | DecoderSelector) -> str:
    """Inverse of ``parse_selector``: the name, and the settings that differ from the defaults."""
    settings = {f.name: (getattr(chosen, f.name), f.default) for f in dataclasses.fields(chosen)}
    changed = ",".join(f"{name}={value!r}" for name, (value, default) in settings.items() if value != default)
    return f"{chosen.name}:{changed}" if changed else chosen.name


def selector(name: str, /, **settings: Any) -> TowerSelector | DecoderSelector:
    """Build the selector called ``name``; ``selector(s.name, **dataclasses.asdict(s)) == s`` for every selector s.

    settings: fields of its dataclass; those left out keep their defaults.
    Raises ``UnknownNameError`` for an unknown name, ``ConfigError`` for unknown, wrong or contradictory settings.
    """
    kind = SELECTORS.get(name)
    known = [field.name for field in dataclasses.fields(kind)]
    for key in settings:
        if key not in known:
            raise ConfigError(
                f"token selector {name!r} has no setting {key!r}.{did_you_mean(key, known)} "
                f"Known: {', '.join(known) or 'none, it has no settings'}."
            )
    return kind(**settings)
