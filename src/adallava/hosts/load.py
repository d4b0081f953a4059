"""Save and load: an ordinary Hugging Face folder, plus ``adaptive_config.json`` and ``adaptive.safetensors``.

An adapter-only folder holds just these two files and names its base model. Checkpoints in the released layouts are
converted on the way (``convert_read``). Nothing is ever unpickled. Missing, foreign or misshapen keys are errors: a
model with some random weights answers, and answers wrongly.
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
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from adallava.config import AdaptiveConfig
from adallava.errors import CheckpointError, ConfigError, did_you_mean
from adallava.hosts.convert import adaptive_config
from adallava.hosts.convert_files import CONFIG_FILE, WEIGHTS_FILE, file_of, not_on_hub, read_json
from adallava.hosts.convert_processor import has_tokenizer
from adallava.hosts.convert_read import check_keys, load_foreign, read_foreign
from adallava.hosts.formats import detect
from adallava.scheduling.scheduler import Scheduler
from adallava.selection import describe_selector

if TYPE_CHECKING:
    from adallava.hosts.model import AdaptiveVLM

SHIPPED = ("mini-base", "mini-L", "mini-H")
_WHERE = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "trust_remote_code")
"""What of ``from_pretrained``'s options says where a checkpoint is."""


def shipped_folder(name: str) -> Path:
    """The folder of a model that comes with the package."""
    return Path(str(importlib.resources.files("adallava"))) / "mini" / "weights" / name


def load(
    name: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    token_selection: str | None = None,
    **kwargs: Any,
) -> AdaptiveVLM:
    """Load a shipped model, a local folder or a hub id as an ``AdaptiveVLM`` in eval mode.

    A folder without ``adaptive_config.json`` loads as a plain base model; one in a released layout (AdaLLaVA,
    LLaVA-1.5, Mipha) is converted in memory. A checkpoint without tokenizer loads with ``processor`` None. dtype:
    float32 on the CPU and the checkpoint's own elsewhere when None. device: "cuda" if there is one, else "cpu".
    token_selection: instead of the checkpoint's, such as "fastv"; see ``AdaptiveVLM.token_selection``.
    kwargs go to transformers' ``from_pretrained`` (for example ``attn_implementation``).
    Raises ``CheckpointError``, and ``ConfigError`` for a token selection that cannot work in this host.
    """
    from adallava.hosts.model import AdaptiveVLM

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if device.type == "cpu" else "auto")
    source = resolve(name)
    config = adaptive_config(source)
    has_base = file_of(source, "config.json") is not None
    if not has_base and config is None and not Path(source).is_dir():
        raise _unknown(source)
    if not has_base and (config is None or config.base_model is None):
        raise CheckpointError(
            f"{name} has no config.json and names no base model. Pass a checkpoint folder with config.json, or an "
            f"adapter folder whose {CONFIG_FILE} has base_model."
        )
    base = source if has_base else resolve(str(config and config.base_model))
    raw = _base_config(base)
    found = detect(raw, base)
    foreign = None if found is None else read_foreign(base, raw, found)
    learned = None if config is not None else foreign
    if learned is not None:
        config = learned.adaptive
    if config is not None and token_selection is not None:
        config = replace(config, token_selection=token_selection)
    if foreign is None:
        model, processor = _load_base(base, dtype, kwargs)
        weights: dict[str, Tensor] = {}
    else:
        model, weights = load_foreign(foreign, _torch_dtype(dtype), kwargs)
        processor = foreign.processor
    scheduler = None
    if config is not None:
        scheduler = _load_scheduler(source, config, weights if learned is not None else None)
    vlm = AdaptiveVLM(model.to(device), processor, config, scheduler).eval()
    if config is None and token_selection is not None:
        vlm.token_selection = token_selection
    return vlm


def save(vlm: AdaptiveVLM, folder: Path, *, adapter_only: bool, weights: dict[str, Tensor] | None = None) -> None:
    """Write ``vlm`` into ``folder``; see ``AdaptiveVLM.save_pretrained``."""
    if adapter_only and (vlm.adaptive_config is None or vlm.adaptive_config.base_model is None):
        raise CheckpointError(
            "an adapter-only folder must name its base model. Set base_model in the config, or save the whole model."
        )
    folder.mkdir(parents=True, exist_ok=True)
    if not adapter_only:
        vlm.model.save_pretrained(folder, state_dict=None if weights is None else _part(weights, "model."))
        if vlm.processor is not None:
            vlm.processor.save_pretrained(folder)
    if vlm.adaptive_config is None or vlm.scheduler is None:
        return
    config = replace(vlm.adaptive_config, token_selection=describe_selector(vlm.token_selection))
    if not adapter_only:
        config = replace(config, base_model=None)
    config.to_json_file(folder / CONFIG_FILE)
    scheduler = vlm.scheduler.state_dict() if weights is None else _part(weights, "scheduler.")
    save_file({k: v.contiguous() for k, v in scheduler.items()}, folder / WEIGHTS_FILE)
    for path in folder.glob("*.safetensors"):
        # safetensors makes files that only their owner can read; the config has the mode the user's umask asks for.
        shutil.copymode(folder / CONFIG_FILE, path)


def _part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def resolve(name: str | Path) -> str:
    """What transformers can load: the shipped folder, a local folder, or a hub id; ``CheckpointError`` if none."""
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


def _unknown(source: str) -> CheckpointError:
    remark = f" Shipped models are {', '.join(SHIPPED)}.{did_you_mean(source, SHIPPED)}"
    return not_on_hub(source, "nothing there, or no network", remark)


def _base_config(source: str) -> dict[str, Any]:
    path = file_of(source, "config.json")
    if path is None:
        raise CheckpointError(f"the base model {source} has no config.json. Pass a checkpoint folder or hub id.")
    return read_json(path)


def _torch_dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype != "auto" else dtype
    if not isinstance(found, torch.dtype) and found != "auto":
        raise ConfigError(f"dtype is {dtype!r}, expected a type of torch, such as 'bfloat16', or 'auto'.")
    return found


def _load_base(source: str, dtype: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    where = {name: value for name, value in kwargs.items() if name in _WHERE}
    try:
        config = AutoConfig.from_pretrained(source, **where)
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"the config.json of {source} cannot be used: {error}") from error
    asked = {
        "config": config,  # read once
        "dtype": dtype,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
        "use_safetensors": True,
    }
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(source, **(asked | kwargs))
        processor = AutoProcessor.from_pretrained(source) if has_tokenizer(source) else None
    except ImportError as error:
        # The processors of LLaVA-OneVision, Qwen-VL, SmolVLM and InternVL handle videos with packages of their own.
        raise CheckpointError(
            f"the processor of {source} needs a package that is not installed. Install what these models use with: "
            f"pip install 'adallava[processors]'. transformers says: {error}"
        ) from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{source} cannot be loaded: {error}") from error
    check_keys(source, info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
    return model, processor


def _load_scheduler(source: str, config: AdaptiveConfig, weights: dict[str, Tensor] | None) -> Scheduler:
    """The scheduler, with ``weights`` or what the folder has in ``adaptive.safetensors``."""
    path = file_of(source, WEIGHTS_FILE) if weights is None else source
    if path is None:
        raise CheckpointError(f"{source} has {CONFIG_FILE} but no {WEIGHTS_FILE}. Save the model again.")
    if weights is None:
        try:
            weights = load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is damaged ({error}). Copy or save it again.") from error
    with torch.device("meta"):  # no weights are drawn that would be overwritten
        scheduler = Scheduler(config)
    wanted = scheduler.state_dict()
    both = [(k, tuple(weights[k].shape), tuple(wanted[k].shape)) for k in wanted.keys() & weights.keys()]
    check_keys(path, wanted.keys() - weights.keys(), weights.keys() - wanted.keys(), [b for b in both if b[1] != b[2]])
    scheduler.load_state_dict({name: weights[name].to(wanted[name].dtype) for name in wanted}, assign=True)
    return scheduler
