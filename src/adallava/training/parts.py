"""Which weights a run trains: the parts of a host, adapters, and how they become one ordinary model again."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from adallava.errors import ConfigError
from adallava.hosts.arch import architecture_of, decoder_layers
from adallava.hosts.model import AdaptiveVLM
from adallava.training.recipes import TrainRecipe

_PROJECTOR = re.compile(r"(^|\.)(multi_modal_projector|connector|merger|deepstack_merger_list)(\.|$)")
PARTS = ("vision", "projector", "language", "scheduler")


def part_of(vlm: AdaptiveVLM, name: str) -> str:
    """Which of ``PARTS`` a parameter of ``vlm`` belongs to, by its name."""
    if name.startswith("scheduler."):
        return "scheduler"
    if _PROJECTOR.search(name):
        return "projector"
    language = architecture_of(vlm.model).layers.rpartition(".")[0]
    return "language" if name.startswith((f"model.{language}.", "model.lm_head.")) else "vision"


def choose_trainable(vlm: AdaptiveVLM, recipe: TrainRecipe) -> Any:
    """Freeze what the recipe does not train, adding adapters for "lora"; returns peft's model of them, or None.

    The vision tower is always frozen, as in the paper. Raises ``ConfigError`` if that leaves nothing to train.
    """
    adapters = _add_adapters(vlm, recipe) if recipe.trainable == "lora" else None
    wanted = {
        "full": {"projector", "language", "scheduler"},
        "lora": {"projector", "scheduler"},
        "scheduler": {"scheduler"},
        "projector": {"projector"},
    }[recipe.trainable]
    for name, weight in vlm.named_parameters():
        weight.requires_grad_(part_of(vlm, name) in wanted or ".lora_" in name)
    trained = [weight for weight in vlm.parameters() if weight.requires_grad]
    if not trained:
        raise ConfigError(f"trainable is {recipe.trainable!r}, and this {type(vlm.model).__name__} has no such part.")
    if recipe.trainable != "full":
        # Few weights are trained, so they can afford float32, in which small steps are not lost to rounding.
        for weight in trained:
            weight.data = weight.data.float()
    return adapters


def merge_adapters(adapters: Any) -> None:
    """Add adapters to the weights they belong to and take them out of the model, in place."""
    adapters.merge_and_unload()


def counts(vlm: AdaptiveVLM) -> dict[str, tuple[int, int]]:
    """Parameters of each part: all, and trained."""
    totals = {part: [0, 0] for part in PARTS}
    for name, weight in vlm.named_parameters():
        total = totals[part_of(vlm, name)]
        total[0] += weight.numel()
        total[1] += weight.numel() * weight.requires_grad
    return {part: (every, trained) for part, (every, trained) in totals.items()}


def _add_adapters(vlm: AdaptiveVLM, recipe: TrainRecipe) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError("adapters need peft, which is not installed: pip install 'adallava[train]'") from error

    layers = {id(module) for layer in decoder_layers(vlm.model) for module in layer.modules()}
    linear = [n for n, m in vlm.model.named_modules() if isinstance(m, nn.Linear) and id(m) in layers]
    config = LoraConfig(
        r=recipe.lora_rank, lora_alpha=recipe.lora_alpha, lora_dropout=recipe.lora_dropout, target_modules=linear
    )
    # The base weights stay as they are: only adapters and what is trained in full is kept in float32.
    adapters = get_peft_model(vlm.model, config, autocast_adapter_dtype=False)
    return adapters
