"""Sizes of models whose config.json leaves out what equals its defaults, which only transformers can fill in."""

from __future__ import annotations

from transformers import AutoConfig

import adallava.hosts.mipha  # noqa: F401  # makes its config known to AutoConfig
from adallava.cost import ModelSpec
from adallava.errors import CheckpointError
from adallava.hosts.convert_files import not_on_hub


def read_spec(source: str) -> ModelSpec:
    """The sizes of a local folder, config.json or hub id, without its weights; ``CheckpointError`` if there is none."""
    try:
        config = AutoConfig.from_pretrained(source)
    except OSError as error:
        raise not_on_hub(source, str(error).splitlines()[0]) from error
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"the config.json of {source} cannot be used: {error}") from error
    return ModelSpec.from_config(config)
