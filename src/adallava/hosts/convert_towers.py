"""Vision towers that a checkpoint only names: their sizes, their weights and how they want their images.

LLaVA's ``mm_vision_tower`` is a folder (absolute, relative to the checkpoint, or relative to where the program runs) or
a hub id. The sizes of the towers that the released checkpoints use are known here, so that a checkpoint that
brings the weights converts without a network.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adallava.errors import CheckpointError
from adallava.hosts.convert_files import file_of, not_on_hub, read_json

_CLIP_MEAN, _CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
_CLIP_L = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_SIGLIP_SO400M = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
KNOWN: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14-336": {**_CLIP_L, "image_size": 336},
    "openai/clip-vit-large-patch14": {**_CLIP_L, "image_size": 224},
}
_SIGLIP_FIELDS = ("num_channels", "attention_dropout", *_SIGLIP_SO400M)
_ABOUT_THE_FILE = ("architectures", "torch_dtype", "dtype", "transformers_version", "_name_or_path")
_KEPT = ("image_mean", "image_std", "size", "crop_size", "resample", "rescale_factor")


@dataclass(frozen=True)
class Tower:
    """A vision tower: its config in transformers' terms, where its weights can be had, and its image settings."""

    config: dict[str, Any]
    """A ``clip_vision_model`` or ``siglip_vision_model`` config."""
    where: str | None = None
    """Folder or hub id that holds its weights; None where they are only in the checkpoint."""
    images: dict[str, Any] = field(default_factory=dict)
    """Arguments of the image processor."""

    @property
    def has_cls(self) -> bool:
        """Whether its first token is a CLS token rather than a patch."""
        return self.config["model_type"] == "clip_vision_model"


def named_tower(name: str, source: str) -> Tower:
    """The tower that a checkpoint in ``source`` names; ``CheckpointError`` says where it was looked for."""
    folders = [Path(name).expanduser()]
    if Path(source).is_dir():
        folders.insert(0, Path(source) / name)
    for folder in folders:
        if (folder / "config.json").is_file():
            return _read(str(folder))
    if name in KNOWN:
        return Tower(KNOWN[name], name, _clip_images(KNOWN[name]["image_size"]))
    looked = " nor ".join(dict.fromkeys(f"{str(folder)!r}" for folder in folders))
    try:
        if name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise CheckpointError("it is no hub id")
        return _read(name)
    except CheckpointError as error:
        raise CheckpointError(
            f"the vision tower {name!r}, which mm_vision_tower of {source} names, cannot be had: there is no folder "
            f"{looked}, and not from the hub: {error}. Put the tower's folder there, or set mm_vision_tower."
        ) from error


def siglip_tower(section: dict[str, Any]) -> Tower:
    """Mipha's tower: the ``vision_tower`` section of its config; its weights come with the checkpoint."""
    config = _SIGLIP_SO400M | {key: section[key] for key in _SIGLIP_FIELDS if key in section}
    config["model_type"] = "siglip_vision_model"
    size = {"height": config["image_size"], "width": config["image_size"]}
    images = {"size": size, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_center_crop": False}
    return Tower(config, None, images)


def known_name(vision_config: Any) -> str | None:
    """The hub id of the known tower that has these sizes."""
    fits = (name for name, config in KNOWN.items() if all(getattr(vision_config, k) == v for k, v in config.items()))
    return next(fits, None)


def check_fits(name: str, vision_config: Any) -> None:
    """Raise ``CheckpointError`` if the named tower is at hand and has other sizes than ``vision_config``."""
    if name not in KNOWN and not (Path(name) / "config.json").is_file():
        return  # a hub id, or a folder on another machine
    tower = named_tower(name, ".").config
    for key in ("hidden_size", "num_hidden_layers", "image_size", "patch_size"):
        if (theirs := tower.get(key)) != (ours := getattr(vision_config, key)):
            raise CheckpointError(
                f"the vision tower {name} has {key} {theirs}, this model's {ours}. Name its own tower."
            )


def _read(where: str) -> Tower:
    config_path = file_of(where, "config.json")
    if config_path is None and not Path(where).is_dir():
        raise not_on_hub(where, "nothing there, or no network")
    if config_path is None:
        raise CheckpointError(f"{where} has no config.json")
    raw = read_json(config_path)
    config = raw.get("vision_config", raw) if raw.get("model_type") == "clip" else raw
    if config.get("model_type", "clip_vision_model") != "clip_vision_model":
        raise CheckpointError(
            f"the vision tower {where} is a {raw.get('model_type')!r}, expected a CLIP as of LLaVA-1.5. Check the name."
        )
    config = {key: value for key, value in config.items() if key not in _ABOUT_THE_FILE}
    config["model_type"] = "clip_vision_model"
    for key in ("image_size", "patch_size", "hidden_size"):
        if not isinstance(config.get(key), int):
            raise CheckpointError(f"{config_path} has no {key}. Use the config that came with the tower.")
    images = _clip_images(config["image_size"])
    if path := file_of(where, "preprocessor_config.json"):
        raw_images = read_json(path)
        images |= {key: raw_images[key] for key in _KEPT if key in raw_images}
    return Tower(config, where, images)


def _clip_images(size: int) -> dict[str, Any]:
    return {
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        "image_mean": _CLIP_MEAN,
        "image_std": _CLIP_STD,
    }
