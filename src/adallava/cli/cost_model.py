"""Which model ``adallava cost`` is about: its sizes and how it is cut into switches, from a name or a config.json.

Nothing is loaded. torch and transformers are imported only for a config.json that leaves out its defaults, and for the
hub.
"""

from __future__ import annotations

import importlib.resources
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adallava.config import AdaptiveConfig, default_heads_per_switch
from adallava.cost import SPECS, ModelSpec
from adallava.errors import CheckpointError, ConfigError, did_you_mean

_ADAPTIVE_FILE = "adaptive_config.json"
_MINI = {"mini": "mini-L", "mini-base": "mini-base", "mini-L": "mini-L", "mini-H": "mini-H"}


@dataclass(frozen=True)
class CostModel:
    """A model as the cost model sees it."""

    name: str
    spec: ModelSpec
    adaptive: AdaptiveConfig
    assumed: bool
    """Whether the switches are this package's defaults rather than the model's own."""


def find_model(name: str, variant: str | None) -> CostModel:
    """Find a model by shipped name, path or hub id; ``CheckpointError`` with a suggestion if there is none.

    variant: "L" or "H" instead of the model's own; another one than its own is cut by default settings.
    """
    spec, own = _find(name)
    if own is not None and variant in (None, own.variant):
        if (own.num_layers, own.num_heads) != (spec.num_layers, spec.num_heads):
            raise ConfigError(
                f"{name}: {_ADAPTIVE_FILE} is for {own.num_layers} layers of {own.num_heads} heads, but config.json "
                f"has {spec.num_layers} of {spec.num_heads}. Put files of one model together."
            )
        return CostModel(name, spec, own, False)
    made = AdaptiveConfig(
        variant=variant or "L",
        num_layers=spec.num_layers,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        hidden_size=spec.hidden_size,
        prefix_layers=own.prefix_layers if own is not None else max(1, spec.num_layers // 2),
        heads_per_switch=default_heads_per_switch(spec.num_heads, spec.num_kv_heads),
    )
    return CostModel(name, spec, made, True)


def _find(name: str) -> tuple[ModelSpec, AdaptiveConfig | None]:
    if name in SPECS:
        return SPECS[name], None
    if name in _MINI:
        folder = Path(str(importlib.resources.files("adallava"))) / "mini" / "weights" / _MINI[name]
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"{name} is not in this installation. Make it with: adallava train mini --out runs/mini"
            )
        return _read(folder / "config.json")
    path = Path(name)
    if path.is_dir():
        return _read(path / "config.json")
    if path.is_file() or path.suffix == ".json":
        return _read(path)
    known = [*SPECS, *_MINI]
    close = did_you_mean(name, known)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        from adallava.hosts.specs import read_spec

        return read_spec(name), None
    raise CheckpointError(
        f"there is no model {name!r}: no folder, no config.json, and none of {', '.join(known)}.{close}"
    )


def _read(path: Path) -> tuple[ModelSpec, AdaptiveConfig | None]:
    if not path.is_file():
        raise CheckpointError(f"there is no {path}. Pass a checkpoint folder with config.json, or that file itself.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}). Copy or download it again.") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds a {type(raw).__name__}, expected a JSON object: a model's config.json.")
    if raw.keys() >= {"variant", "prefix_layers"}:
        raise CheckpointError(f"{path} says how a model is cut, not its sizes. Pass config.json or the folder.")
    spec = _spec(path, raw)
    beside = path.parent / _ADAPTIVE_FILE
    if beside.is_file():
        return spec, AdaptiveConfig.from_json_file(beside)
    return spec, _released(raw, spec)


def _spec(path: Path, raw: dict[str, Any]) -> ModelSpec:
    try:
        return ModelSpec.from_config(raw)
    except ConfigError as error:
        if "lacks" not in str(error) or "model_type" not in raw:
            raise ConfigError(f"{path}: {error}") from error
    from adallava.hosts.specs import read_spec

    return read_spec(str(path))


def _released(raw: dict[str, Any], spec: ModelSpec) -> AdaptiveConfig | None:
    """The switches of a checkpoint in the layout of the released AdaLLaVA code."""
    if raw.get("scheduler_type") not in ("L", "H"):
        return None
    config = AdaptiveConfig(
        variant=raw["scheduler_type"],
        num_layers=spec.num_layers,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        hidden_size=spec.hidden_size,
        prefix_layers=raw.get("num_prefix_layers") or 16,
    )
    return replace(config, heads_per_switch=raw["scheduler_rank"]) if raw.get("scheduler_rank") else config
