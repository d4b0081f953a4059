"""``estimate``: everything that the cost model says about one plan and one prompt, prefill and decoding apart.

FLOPs come in the convention that is asked for; bytes, times, cache and footprint are the roofline's (paper convention)
in either case, because the strict convention counts nothing but FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from adallava.cost.flops import CONVENTION, Pass, decode_step, footprint_bytes, prefill
from adallava.cost.load import PlanLike
from adallava.cost.prompt import PromptTokens
from adallava.cost.roofline import PAPER_DEVICE, get_device, pass_time_ms
from adallava.cost.spec import CostError, ModelSpec
from adallava.cost.strict import STRICT, strict_decode_step_flops, strict_prefill_flops
from adallava.cost.vision import projector_flops, vision_tower_flops
from adallava.errors import did_you_mean

CONVENTIONS = (CONVENTION, STRICT)


@dataclass(frozen=True)
class Setting:
    """On what and how a plan runs; ``CostError`` for an unknown convention, ``UnknownNameError`` for a device."""

    device: str = PAPER_DEVICE
    """Name in the device table."""
    batch: int = 1
    """Rows that all run the plan."""
    flash: bool = False
    """Count attention as one fused operator."""
    tensor_parallel: int = 1
    """Devices that share each layer; FLOPs, bytes and times are then those of one device."""
    convention: str = CONVENTION
    """How FLOPs are counted: "paper" or "strict"."""

    def __post_init__(self) -> None:
        """Check the names."""
        if self.convention not in CONVENTIONS:
            raise CostError(
                f"convention is {self.convention!r}, expected 'paper' (the roofline's count) or 'strict' (a FLOP "
                f"counter's).{did_you_mean(self.convention, CONVENTIONS)}"
            )
        get_device(self.device)


@dataclass(frozen=True)
class StageCost:
    """One pass: a prefill, or the first decoding step."""

    flops: float
    """In the estimate's convention."""
    traffic_bytes: float
    """Bytes read and written."""
    time_ms: float
    """Roofline time; no measurement."""


@dataclass(frozen=True)
class Estimate:
    """What one plan costs for one prompt; the language model only, but for ``vision_flops``."""

    prefill: StageCost
    decode: StageCost
    """The first decoding step; each further one attends to one position more."""
    weight_bytes: float
    """Weights that a pass reads: of what runs, and lm_head. Those of skipped layers stay in memory all the same."""
    kv_cache_bytes: float
    """Keys and values of the prompt, in the layers that run."""
    footprint_bytes: float
    """What the paper calls memory: weights and cache of the layers that run, and one layer's activations."""
    vision_flops: int | None
    """Vision tower and projector (strict convention), in no other number; None where the tower is unknown."""
    convention: str
    """How ``flops`` were counted."""


def estimate(spec: ModelSpec, plan: PlanLike, prompt: PromptTokens, setting: Setting | None = None) -> Estimate:
    """Return the cost of a plan for a prompt with at most one image.

    Raises ``PlanError`` for a plan of another model and ``CostError`` as ``flops.prefill`` does.
    """
    setting = setting or Setting()
    tokens = prompt.layers(spec.num_layers)
    split: dict[str, Any] = {"batch": setting.batch, "tensor_parallel": setting.tensor_parallel}
    onchip = int(get_device(setting.device).onchip_bytes) if setting.flash else None
    first = prefill(spec, plan, tokens, **split, flash_onchip_bytes=onchip)
    step = decode_step(spec, plan, tokens, **split, flash_onchip_bytes=onchip)
    flops = first.flops, step.flops
    if setting.convention == STRICT:
        # A counter sees a step attend to its own token too; the paper's count stops before it.
        longer = [length + 1 for length in tokens]
        flops = strict_prefill_flops(spec, plan, tokens, **split), strict_decode_step_flops(spec, plan, longer, **split)
    return Estimate(
        prefill=_stage(first, flops[0], setting.device),
        decode=_stage(step, flops[1], setting.device),
        weight_bytes=first.weight_bytes,
        kv_cache_bytes=first.kv_write_bytes,
        footprint_bytes=footprint_bytes(spec, plan, tokens, **split),
        vision_flops=_vision_flops(spec, prompt.visual, setting.batch),
        convention=setting.convention,
    )


def _stage(ops: Pass, flops: float, device: str) -> StageCost:
    return StageCost(flops, ops.traffic_bytes, pass_time_ms(ops, device))


def _vision_flops(spec: ModelSpec, visual: int, batch: int) -> int | None:
    """The tower sees the whole image, the projector what was kept of it."""
    if spec.vision is None or visual > spec.vision.num_patches:
        return None
    return batch * (vision_tower_flops(spec) + projector_flops(spec, visual_tokens=visual)) if visual else 0
