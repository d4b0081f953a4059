"""Save and load: an ordinary Hugging Face folder, plus ``adaptive_config.json`` and ``adaptive.safetensors``.

An adapter-only folder holds just these two files and names its base model. Nothing is ever unpickled. Missing,
foreign or misshapen keys are errors: a model with some random weights answers, and answers wrongly.
"""

from __future__ import annotations

import importlib.resources
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import cached_file

from adallava.config import AdaptiveConfig
from adallava.errors import CheckpointError, did_you_mean
from adallava.hosts.arch import ARCHITECTURES
from adallava.scheduling.scheduler import Scheduler

if TYPE_CHECKING:
    from adallava.hosts.model import AdaptiveVLM

CONFIG_FILE = "adaptive_config.json"
WEIGHTS_FILE = "adaptive.safetensors"
SHIPPED = ("mini-base", "mini-L", "mini-H")


def shipped_folder(name: str) -> Path:
    """The folder of a model that comes with the package."""
    return Path(str(importlib.resources.files("adallava"))) / "mini" / "weights" / name


def load(
    name: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    **kwargs: Any,
) -> AdaptiveVLM:
    """Load a shipped model, a local folder or a hub id as an ``AdaptiveVLM`` in eval mode.

    A folder without ``adaptive_config.json`` loads as a plain base model. dtype: float32 on the CPU and the
    checkpoint's own elsewhere when None. device: "cuda" if there is one, else "cpu". kwargs go to transformers'
    ``from_pretrained`` (for example ``attn_implementation``). Raises ``CheckpointError``.
    """
    from adallava.hosts.model import AdaptiveVLM

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if device.type == "cpu" else "auto")
    source = _source(name)
    config_path = _file(source, CONFIG_FILE)
    config = AdaptiveConfig.from_json_file(config_path) if config_path else None
    has_base = _file(source, "config.json") is not None
    if not has_base and config is None and not Path(source).is_dir():
        raise _not_on_hub(source, "nothing there, or no network")
    if not has_base and (config is None or config.base_model is None):
        raise CheckpointError(
            f"{name} has no config.json and names no base model. Pass a checkpoint folder with config.json, or an "
            f"adapter folder whose {CONFIG_FILE} has base_model."
        )
    base = source if has_base else _source(str(config and config.base_model))
    model, processor = _load_base(base, dtype, kwargs)
    scheduler = _load_scheduler(source, config) if config is not None else None
    return AdaptiveVLM(model.to(device), processor, config, scheduler).eval()


def save(vlm: AdaptiveVLM, folder: Path, *, adapter_only: bool) -> None:
    """Write ``vlm`` into ``folder``; see ``AdaptiveVLM.save_pretrained``."""
    if adapter_only and (vlm.adaptive_config is None or vlm.adaptive_config.base_model is None):
        raise CheckpointError(
            "an adapter-only folder must name its base model. Set base_model in the config, or save the whole model."
        )
    folder.mkdir(parents=True, exist_ok=True)
    if not adapter_only:
        vlm.model.save_pretrained(folder)
        vlm.processor.save_pretrained(folder)
    if vlm.adaptive_config is None or vlm.scheduler is None:
        return
    config = vlm.adaptive_config if adapter_only else replace(vlm.adaptive_config, base_model=None)
    config.to_json_file(folder / CONFIG_FILE)
    save_file({k: v.contiguous() for k, v in vlm.scheduler.state_dict().items()}, folder / WEIGHTS_FILE)
    for path in folder.glob("*.safetensors"):
        # safetensors makes files that only their owner can read; the config has the mode the user's umask asks for.
        shutil.copymode(folder / CONFIG_FILE, path)


def _source(name: str | Path) -> str:
    """What transformers can load: the shipped folder, a local folder, or a hub id."""
    text = os.fspath(name)
    if Path(text).is_dir():
        return text
    if text in SHIPPED:
        folder = shipped_folder(text)
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"{text} is not in this installation. Make it with: adallava train mini --out runs/mini"
            )
        return str(folder)
    looks_local = text.startswith((".", "/", "~")) or text.count("/") != 1
    if looks_local:
        raise CheckpointError(
            f"there is no model {text!r}: neither a folder nor one of {', '.join(SHIPPED)}."
            f"{did_you_mean(text, SHIPPED)}"
        )
    return text


def _file(source: str, name: str) -> str | None:
    """A file of a folder or hub repository, None if it is not there."""
    if Path(source).is_dir():
        path = Path(source) / name
        return str(path) if path.is_file() else None
    try:
        return cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise _not_on_hub(source, str(error).splitlines()[0]) from error


def _not_on_hub(source: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{source!r} is no local folder, and the hub does not give it ({reason}). Check the name or the network; "
        f"shipped models are {', '.join(SHIPPED)}.{did_you_mean(source, SHIPPED)}"
    )


def _load_base(source: str, dtype: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    try:
        config = AutoConfig.from_pretrained(source)
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"the config.json of {source} cannot be used: {error}") from error
    if config.model_type not in ARCHITECTURES:
        raise CheckpointError(
            f"{source} is a {config.model_type!r} model; known hosts: {', '.join(ARCHITECTURES)}. "
            "Pass a LLaVA checkpoint in Hugging Face format."
        )
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            source, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, use_safetensors=True, **kwargs
        )
        processor = AutoProcessor.from_pretrained(source)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{source} cannot be loaded: {error}") from error
    _check_keys(source, info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
    return model, processor


def _load_scheduler(source: str, config: AdaptiveConfig) -> Scheduler:
    path = _file(source, WEIGHTS_FILE)
    if path is None:
        raise CheckpointError(f"{source} has {CONFIG_FILE} but no {WEIGHTS_FILE}. Save the model again.")
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error}). Copy or save it again.") from error
    scheduler = Scheduler(config)
    wanted = scheduler.state_dict()
    wrong = [(k, tuple(weights[k].shape), tuple(wanted[k].shape)) for k in wanted.keys() & weights.keys()]
    _check_keys(
        path, wanted.keys() - weights.keys(), weights.keys() - wanted.keys(), [w for w in wrong if w[1] != w[2]]
    )
    scheduler.load_state_dict(weights)
    return scheduler


def _check_keys(source: str, missing: Any, foreign: Any, misshapen: Any) -> None:
    problems = [
        f"{len(keys)} {what}, such as {sorted(map(str, keys))[0]}"
        for keys, what in ((missing, "keys are missing"), (foreign, "keys are foreign"), (misshapen, "shapes differ"))
        if keys
    ]
    if problems:
        raise CheckpointError(f"{source} does not fit its config: {'; '.join(problems)}. Use a complete checkpoint.")
