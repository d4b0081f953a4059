"""Training at the paper's scale: what a recipe says, and the recipes of the paper.

A recipe names the model to start from, what of it is trained and how; where data and results are, and on how many
devices it runs, is said when it is run. The numbers are those of the paper's released code.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from adallava.errors import ConfigError, UnknownNameError, did_you_mean

Stage = Literal["projector", "instruction", "adaptive"]
Trainable = Literal["full", "lora", "scheduler", "projector"]
Sharding = Literal["none", "fsdp2", "zero3"]
LLAVA_MIX_SAMPLES = 665_298
"""Samples of llava_v1_5_mix665k.json."""
LLAVA_PRETRAIN_SAMPLES = 558_128
"""Samples of blip_laion_cc_sbu_558k.json."""


_ABOVE_ZERO = ("epochs", "global_batch", "device_batch", "learning_rate", "max_tokens", "lora_rank", "save_every")


@dataclass(frozen=True)
class TrainRecipe:
    """One training run; raises ``ConfigError`` for values that contradict each other."""

    about: str
    """One line for lists."""
    model: str
    """Checkpoint to start from: folder or hub id."""
    architecture: str | None = None
    """Name of its sizes in ``adallava.cost.SPECS``, so that a dry run needs no download."""
    stage: Stage = "adaptive"
    """"projector": image and caption, without prompts. "instruction": conversations, a base model. "adaptive": the
    same under a random budget for every sample; a checkpoint that is not adaptive yet is made so."""
    trainable: Trainable = "full"
    """"full": everything but the vision tower; "lora": adapters in the decoder, and in full the projector and what is
    adaptive; "scheduler": the latency encoder and the scheduler alone; "projector": that alone."""
    variant: str | None = None
    """"L" or "H" for a checkpoint that is to be made adaptive."""
    prefix_layers: int | None = None
    """Layers that always run; half of them when None."""
    heads_per_switch: int | None = None
    """Variant H: heads in a switch."""
    token_selection: str = "none"
    """Visual token selection during training."""
    samples: int = LLAVA_MIX_SAMPLES
    """Samples that a dry run reckons with where no data is given."""
    epochs: float = 1.0
    """Passes over the data."""
    global_batch: int = 128
    """Samples in one optimizer step, of all devices together."""
    device_batch: int = 8
    """Samples on one device in one pass."""
    learning_rate: float = 1e-5
    """Peak, reached after the warm-up; then a cosine to zero."""
    warmup_frac: float = 0.03
    """Share of the steps that warm up."""
    weight_decay: float = 0.0
    """Of AdamW."""
    adam_beta2: float = 0.999
    """Of AdamW."""
    max_tokens: int = 2048
    """Longer samples are cut off at their end."""
    bf16: bool = True
    """Weights and activations in bfloat16; False for float32."""
    gradient_checkpointing: bool = True
    """Compute activations again in the backward pass instead of keeping them."""
    lora_rank: int = 128
    """Rank of adapters."""
    lora_alpha: int = 256
    """Their scale is this divided by the rank."""
    lora_dropout: float = 0.05
    """Dropout in front of adapters."""
    sharding: Sharding = "none"
    """How several devices share one model: "none" (a copy each), "fsdp2", or "zero3" (DeepSpeed, as in the paper)."""
    workers: int = 4
    """Processes per device that load data."""
    save_every: int = 500
    """Steps between checkpoints."""
    seed: int = 42
    """Of the data's order, the budgets and the scheduler's noise."""

    def __post_init__(self) -> None:
        for name, allowed in (("stage", Stage), ("trainable", Trainable), ("sharding", Sharding)):
            if getattr(self, name) not in get_args(allowed):
                known = ", ".join(map(repr, get_args(allowed)))
                raise ConfigError(f"{name} is {getattr(self, name)!r}, expected one of {known}.")
        if self.trainable == "scheduler" and self.stage != "adaptive":
            raise ConfigError(f"trainable is 'scheduler' in the stage {self.stage!r}, which has none. Use 'full'.")
        if self.trainable == "lora" and self.sharding != "none":
            raise ConfigError(f"adapters are merged at the end, which {self.sharding} prevents. Set sharding to none.")
        if self.variant is not None and self.stage != "adaptive":
            raise ConfigError(f"variant is {self.variant!r} in the stage {self.stage!r}; it belongs to 'adaptive'.")
        for name in _ABOVE_ZERO:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ConfigError(f"{name} is {value!r}, expected a number above 0.")

    def per_pass(self, devices: int) -> tuple[int, int]:
        """Samples on a device in a pass, and passes in a step; ``ConfigError`` if the global batch cannot be had."""
        batch = min(self.device_batch, self.global_batch // devices)
        if batch < 1 or self.global_batch % (batch * devices):
            raise ConfigError(
                f"a global batch of {self.global_batch} cannot be made of {devices} devices with {self.device_batch} "
                "samples each. Choose device_batch so that devices x device_batch divides global_batch."
            )
        return batch, self.global_batch // (batch * devices)

    def steps(self, samples: int) -> int:
        """Optimizer steps for that many samples."""
        return max(1, math.ceil(self.epochs * samples / self.global_batch))


_FIELDS = {field.name: field for field in dataclasses.fields(TrainRecipe)}


def _paper(size: str, variant: str, selection: str) -> TrainRecipe:
    """The paper's setting for one size of LLaVA-1.5."""
    tokens = "" if selection == "none" else f" under {selection}"
    return TrainRecipe(
        about=f"AdaLLaVA-{variant} from LLaVA-1.5-{size.upper()}{tokens}, as in the paper",
        model=f"liuhaotian/llava-v1.5-{size}",
        architecture=f"llava-1.5-{size}",
        variant=variant,
        prefix_layers={"7b": 16, "13b": 20}[size],
        heads_per_switch=8 if variant == "H" else None,
        token_selection=selection,
        sharding="zero3",
    )


def _mipha(variant: str) -> TrainRecipe:
    return dataclasses.replace(
        _paper("7b", variant, "none"),
        about=f"AdaLLaVA-{variant} from Mipha-3B, as in the paper",
        model="zhumj34/Mipha-3B",
        architecture="mipha-3b",
    )


_LLAVA = TrainRecipe("", "liuhaotian/llava-v1.5-7b", "llava-1.5-7b", sharding="zero3")
RECIPES: Mapping[str, TrainRecipe] = {
    **{
        f"llava-1.5-{size}-{variant}{'' if selection == 'none' else f'-{selection}'}": _paper(size, variant, selection)
        for size in ("7b", "13b")
        for selection in ("none", "prumerge", "prumerge+")
        for variant in ("L", "H")
    },
    **{f"mipha-3b-{variant}": _mipha(variant) for variant in ("L", "H")},
    "llava-1.5-7b-projector": dataclasses.replace(
        _LLAVA,
        about="LLaVA's first stage: the projector alone, on captions",
        stage="projector",
        trainable="projector",
        samples=LLAVA_PRETRAIN_SAMPLES,
        learning_rate=1e-3,
        global_batch=256,
        device_batch=32,
        sharding="none",
    ),
    "llava-1.5-7b-instruction": dataclasses.replace(
        _LLAVA, about="LLaVA's second stage: a base model on conversations", stage="instruction", learning_rate=2e-5
    ),
    "llava-1.5-7b-L-lora": dataclasses.replace(
        _paper("7b", "L", "none"),
        about="AdaLLaVA-L from LLaVA-1.5-7B with adapters of rank 128, on one device",
        trainable="lora",
        learning_rate=2e-4,
        sharding="none",
    ),
    "llava-1.5-7b-L-scheduler": dataclasses.replace(
        _paper("7b", "L", "none"),
        about="the latency encoder and scheduler alone, LLaVA-1.5-7B as it is",
        trainable="scheduler",
        learning_rate=1e-3,
        sharding="none",
    ),
}


def load_recipe(name: str, changes: Mapping[str, Any] | None = None) -> TrainRecipe:
    """A recipe by name, or from a JSON file of its fields, with some of them changed.

    A file may name another recipe as ``"extends"`` and then holds only what differs. Raises ``UnknownNameError``, and
    ``ConfigError`` for unknown fields and wrong values.
    """
    if name in RECIPES:
        return _changed(RECIPES[name], changes or {}, f"recipe {name}")
    path = Path(name)
    if path.suffix != ".json":
        raise UnknownNameError(
            f"there is no recipe {name!r}; known: {', '.join(RECIPES)}, or a .json file of your own."
            f"{did_you_mean(name, RECIPES)}"
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"the recipe {path} cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"the recipe {path} holds {type(fields).__name__}, expected an object of its fields.")
    extends = fields.pop("extends", None)
    if extends is not None:
        recipe = _changed(load_recipe(str(extends)), fields, str(path))
    else:
        if lacking := [n for n in ("about", "model") if n not in fields]:
            raise ConfigError(f'the recipe {path} lacks {", ".join(lacking)}. Add them, or say "extends": a recipe.')
        recipe = _changed(TrainRecipe(fields.pop("about"), fields.pop("model")), fields, str(path))
    return _changed(recipe, changes or {}, str(path))


def parse_change(text: str) -> tuple[str, Any]:
    """Read "field=value" as JSON where it is JSON, and as text otherwise; ``ConfigError`` without an equals sign."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"{text!r} is no change of a recipe. Write field=value, such as learning_rate=2e-5.")
    try:
        return name.strip(), json.loads(value)
    except ValueError:
        return name.strip(), value.strip()


def _changed(recipe: TrainRecipe, changes: Mapping[str, Any], where: str) -> TrainRecipe:
    for name in changes:
        if name not in _FIELDS:
            raise ConfigError(
                f"{where}: a recipe has no field {name!r}; known: {', '.join(_FIELDS)}.{did_you_mean(name, _FIELDS)}"
            )
    try:
        return dataclasses.replace(recipe, **changes)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}. Check the types of its fields.") from error
