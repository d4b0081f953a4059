"""Runs a recipe on LLaVA data: reads it, builds the model, trains, and writes a folder that ``from_pretrained`` reads.

Under ``torchrun`` or ``accelerate launch`` the same command uses several devices; the first process writes.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from adallava.data.collate import Collator
from adallava.data.llava_json import Conversation, missing_images, read_llava_json
from adallava.errors import ConfigError, DataError
from adallava.hosts.model import AdaptiveVLM
from adallava.training.blank import blank_sample
from adallava.training.dataset import LlavaDataset
from adallava.training.fit import HISTORY, TrainConfig, fit, write_history
from adallava.training.parts import choose_trainable, merge_adapters
from adallava.training.recipes import TrainRecipe

log = logging.getLogger(__name__)

UNUSABLE = "unusable.jsonl"
"""Samples that were left out, and why."""


@dataclass(frozen=True)
class DataPaths:
    """Where training data is."""

    conversations: Path
    """LLaVA's JSON or JSONL."""
    images: Path
    """The folder that image names are relative to."""


def train_recipe(
    recipe: TrainRecipe, paths: DataPaths, output: Path, callbacks: list[TrainerCallback] | None = None
) -> Path:
    """Train by ``recipe`` into ``output`` and return it; a run that was stopped goes on from its last checkpoint.

    Raises ``DataError``, ``ConfigError`` and ``CheckpointError`` before anything is trained; ``Interrupted`` after
    Ctrl-C. A finished run is not repeated.
    """
    if (output / HISTORY).exists():
        return output
    output.mkdir(parents=True, exist_ok=True)
    config = train_config(recipe, len(conversations := usable(paths, output)))
    # DeepSpeed must be told before weights are loaded, and knows it for as long as this is kept.
    _arguments = config.to_arguments(output)
    torch.manual_seed(recipe.seed)  # scheduler and adapters start at random
    vlm = build_model(recipe)
    if vlm.processor is None:
        raise ConfigError(
            f"{recipe.model} has no tokenizer, without which no prompts can be made. Put its files there."
        )
    adapters = choose_trainable(vlm, recipe)
    dataset = LlavaDataset(
        conversations,
        paths.images,
        vlm.processor,
        max_tokens=recipe.max_tokens,
        plain=recipe.stage == "projector",
        unusable=output / UNUSABLE,
    )
    collator = Collator(vlm.processor.tokenizer.pad_token_id, blank=blank_sample(vlm.processor))
    outcome = fit(vlm.train(), dataset, collator, config, output, callbacks)
    if adapters is not None:
        merge_adapters(adapters)
    if is_first_process():
        vlm.save_pretrained(output, weights=outcome.weights)
        about = {"recipe": recipe.about, "model": recipe.model, "steps": config.steps, "devices": _devices()}
        write_history(outcome.history, about, config.seed, output)
    return output


def usable(paths: DataPaths, output: Path) -> list[Conversation]:
    """The conversations whose images are there; those that are not are counted, logged and listed in ``UNUSABLE``."""
    conversations = read_llava_json(paths.conversations)
    missing = set(missing_images(conversations, paths.images))
    kept = [c for c in conversations if not missing.intersection(c.images)]
    if not kept:
        raise DataError(
            f"no image that {paths.conversations} names is in {paths.images}: it looks for "
            f"{paths.images / min(missing)}. Pass the folder that the names are relative to."
        )
    if len(kept) < len(conversations):
        lost = [c for c in conversations if missing.intersection(c.images)]
        log.warning("%d of %d samples are left out: their images are not there", len(lost), len(conversations))
        if is_first_process() and not (output / UNUSABLE).exists():  # a run that goes on keeps what it found
            lines = [json.dumps({"id": c.id, "images": c.images, "error": "no such image file"}) for c in lost]
            (output / UNUSABLE).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return kept


def train_config(recipe: TrainRecipe, samples: int, devices: int | None = None) -> TrainConfig:
    """A recipe as the settings of one stage, for that many samples on that many devices (all of this run's if None)."""
    batch, passes = recipe.per_pass(devices or _devices())
    return TrainConfig(
        steps=recipe.steps(samples),
        batch_size=batch,
        accumulate=passes,
        learning_rate=recipe.learning_rate,
        warmup_frac=recipe.warmup_frac,
        weight_decay=recipe.weight_decay,
        adam_beta2=recipe.adam_beta2,
        seed=recipe.seed,
        save_every=recipe.save_every,
        log_every=1,
        gradient_checkpointing=recipe.gradient_checkpointing,
        bf16=recipe.bf16 and torch.cuda.is_available(),
        order="by_length",
        workers=recipe.workers,
        tensorboard=True,
        deepspeed=ZERO3 if recipe.sharding == "zero3" else None,
        fsdp=FSDP2 if recipe.sharding == "fsdp2" else None,
    )


# "auto" is filled in from the other settings by transformers.
ZERO3: dict[str, Any] = {
    "bf16": {"enabled": "auto"},
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}
FSDP2: dict[str, Any] = {
    "version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "reshard_after_forward": True,
    "state_dict_type": "FULL_STATE_DICT",
}


def build_model(recipe: TrainRecipe) -> AdaptiveVLM:
    """The model that a recipe starts from, on the CPU; Trainer brings it to its device.

    Raises ``ConfigError`` where checkpoint and recipe contradict each other.
    """
    # Where everything is trained, float32 weights keep the small steps; ZeRO keeps such a copy by itself.
    half = recipe.bf16 and torch.cuda.is_available() and (recipe.trainable != "full" or recipe.sharding == "zero3")
    vlm = AdaptiveVLM.from_pretrained(recipe.model, dtype=torch.bfloat16 if half else torch.float32, device="cpu")
    return prepare(vlm, recipe)


def prepare(vlm: AdaptiveVLM, recipe: TrainRecipe) -> AdaptiveVLM:
    """Make a loaded model adaptive, or keep it as it is, as the recipe's stage asks."""
    if recipe.stage != "adaptive":
        if vlm.adaptive_config is not None:
            raise ConfigError(f"{recipe.model} is adaptive; the stage {recipe.stage!r} trains a base model. Pass one.")
        return vlm
    if vlm.adaptive_config is None:
        if recipe.variant is None:
            raise ConfigError(
                f"{recipe.model} is a base model, and the recipe names no variant. Set variant to L or H."
            )
        fields = {"prefix_layers": recipe.prefix_layers, "heads_per_switch": recipe.heads_per_switch}
        vlm = AdaptiveVLM.adapt(
            vlm.model,
            vlm.processor,
            variant=recipe.variant,
            token_selection=recipe.token_selection,
            **{name: value for name, value in fields.items() if value is not None},
        )
    elif recipe.variant not in (None, vlm.adaptive_config.variant):
        raise ConfigError(
            f"{recipe.model} is adaptive of variant {vlm.adaptive_config.variant}, the recipe says {recipe.variant}. "
            "Pass a base model, or leave the variant out."
        )
    return vlm


def is_first_process() -> bool:
    """Whether this process writes what all processes made."""
    return int(os.environ.get("RANK", "0")) == 0


def part_together() -> None:
    """End a run of several processes: one that goes while another still talks to it makes that one abort."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _devices() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
