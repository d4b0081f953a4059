"""What a recipe would do, without weights, data or a GPU: sizes, steps, memory per device and FLOPs.

The model is built on the meta device from the sizes that this package knows, the optimizer over its parameters.
Weights, gradients and optimizer state are counted; activations are an estimate, and said to be one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    PhiConfig,
    SiglipVisionConfig,
)

from adallava.cost import SPECS, ModelSpec, full_loads, projector_flops, strict_prefill_flops, vision_tower_flops
from adallava.data.llava_json import Conversation
from adallava.errors import ConfigError
from adallava.hosts.mipha import MiphaConfig
from adallava.hosts.model import AdaptiveVLM
from adallava.training.parts import choose_trainable, counts
from adallava.training.recipes import TrainRecipe
from adallava.training.run import prepare, train_config

TEXT_TOKENS = 200
"""Text tokens of a sample where no data is given; an assumption."""
TOKENS_PER_WORD = 1.35
"""Of Llama's tokenizer on LLaVA's English; an assumption."""
_GIB = 2**30


@dataclass(frozen=True)
class DryRun:
    """What a recipe amounts to on some devices."""

    parameters: dict[str, tuple[int, int]]
    """Of each part: all, and trained."""
    samples: int
    steps: int
    device_batch: int
    passes: int
    """Forward and backward passes of a device in a step."""
    tokens: int
    """Mean length of a sample, visual tokens included."""
    weights_gib: float
    gradients_gib: float
    optimizer_gib: float
    activations_gib: float
    """An estimate; the other three are counted."""
    step_flops: float
    """Of all devices, backward pass included (strict convention)."""

    @property
    def device_gib(self) -> float:
        """Memory of one device."""
        return self.weights_gib + self.gradients_gib + self.optimizer_gib + self.activations_gib

    @property
    def total_flops(self) -> float:
        """Of the whole run."""
        return self.step_flops * self.steps


def dry_run(recipe: TrainRecipe, devices: int = 1, conversations: Sequence[Conversation] | None = None) -> DryRun:
    """Reckon a recipe through for that many devices, on the given data or on as much as the paper's."""
    vlm = prepare(meta_model(recipe), recipe)
    choose_trainable(vlm, recipe)
    torch.optim.AdamW([p for p in vlm.parameters() if p.requires_grad], lr=recipe.learning_rate)
    samples = len(conversations) if conversations is not None else recipe.samples
    config = train_config(recipe, samples, devices)
    visual = _visual_tokens(vlm)
    tokens = min(recipe.max_tokens, _mean_tokens(conversations, visual))
    parameters = counts(vlm)
    every = sum(a for a, _ in parameters.values())
    trained = sum(t for _, t in parameters.values())
    shards = devices if recipe.sharding != "none" else 1
    half = recipe.bf16 and (recipe.trainable != "full" or recipe.sharding == "zero3")
    zero = recipe.sharding == "zero3"
    # Weights that are trained in part are float32 while the others are halves; ZeRO's copy belongs to its optimizer.
    bytes_of_trained = 2 if zero and recipe.trainable == "full" and half else 4
    weights = (every - trained) * (2 if half else 4) + trained * bytes_of_trained
    return DryRun(
        parameters=parameters,
        samples=samples,
        steps=config.steps,
        device_batch=config.batch_size,
        passes=config.accumulate,
        tokens=tokens,
        weights_gib=weights / shards / _GIB,
        gradients_gib=trained * bytes_of_trained / shards / _GIB,
        optimizer_gib=trained * (12 if zero and bytes_of_trained == 2 else 8) / shards / _GIB,
        activations_gib=_activations(vlm.spec, recipe, config.batch_size, tokens) / _GIB,
        step_flops=_step_flops(vlm.spec, recipe, tokens),
    )


def meta_model(recipe: TrainRecipe) -> AdaptiveVLM:
    """The recipe's base model on the meta device, without processor; by the hub's config if its sizes are not known."""
    if recipe.architecture is None:
        config: Any = AutoConfig.from_pretrained(recipe.model)
    elif recipe.architecture in SPECS and SPECS[recipe.architecture].vision is not None:
        config = _host_config(SPECS[recipe.architecture])
    else:
        known = ", ".join(name for name, spec in SPECS.items() if spec.vision is not None)
        raise ConfigError(f"architecture is {recipe.architecture!r}, expected one of {known}, or null for the hub's.")
    with torch.device("meta"):
        return AdaptiveVLM(AutoModelForImageTextToText.from_config(config), None)


def _host_config(spec: ModelSpec) -> Any:
    vision, llama = spec.vision, spec.gated_mlp
    assert vision is not None
    tower = (CLIPVisionConfig if vision.class_token else SiglipVisionConfig)(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_hidden_layers=vision.num_layers,
        num_attention_heads=vision.num_heads,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
    )
    text = (LlamaConfig if llama else PhiConfig)(
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        vocab_size=spec.vocab_size,
    )
    more = {} if llama else {"vision_feature_select_strategy": "full"}
    return (LlavaConfig if llama else MiphaConfig)(
        vision_config=tower.to_dict(), text_config=text.to_dict(), image_token_id=spec.vocab_size - 1, **more
    )


def _visual_tokens(vlm: AdaptiveVLM) -> int:
    vision = vlm.spec.vision
    return vision.num_patches if vision is not None else 0


def _mean_tokens(conversations: Sequence[Conversation] | None, visual: int) -> int:
    if conversations is None:
        return visual + TEXT_TOKENS
    words = sum(c.words for c in conversations) * TOKENS_PER_WORD
    return max(1, round((words + visual * sum(len(c.images) for c in conversations)) / len(conversations)))


def _activations(spec: ModelSpec, recipe: TrainRecipe, batch: int, tokens: int) -> float:
    """Bytes that the decoder keeps for the backward pass, in half precision, and its logits in float32."""
    size = 2 if recipe.bf16 else 4
    rows = batch * tokens
    # Inputs of the norms and projections of one layer, the MLP's neurons three times.
    layer = rows * (8 * spec.hidden_size + 3 * spec.intermediate_size) * size
    kept = rows * spec.hidden_size * size * spec.num_layers + layer
    return (kept if recipe.gradient_checkpointing else layer * spec.num_layers) + rows * spec.vocab_size * 3 * 4


def _step_flops(spec: ModelSpec, recipe: TrainRecipe, tokens: int) -> float:
    """FLOPs of one step: forward, once more where activations are computed again, and twice for the backward pass.

    The backward pass is counted in full also where weights are frozen: gradients still go through most of them.
    """
    decoder = strict_prefill_flops(spec, full_loads(spec), tokens, logits="all")
    vision = 0.0 if spec.vision is None else vision_tower_flops(spec) + 3 * projector_flops(spec)
    return recipe.global_batch * ((4 if recipe.gradient_checkpointing else 3) * decoder + vision)
