"""What a plan costs, computed without a model: FLOPs, bytes and roofline time.

Everything here is arithmetic in plain Python and follows the *paper* convention (see ``adallava.cost.flops``), which
reproduces the cost columns of the AdaLLaVA paper; only ``adallava.cost.strict`` and ``adallava.cost.vision`` count as a
FLOP counter does, and say so.
"""

from __future__ import annotations

from adallava.cost.budgets import most_flops, resolve_budget
from adallava.cost.estimate import CONVENTIONS, Estimate, Setting, StageCost, estimate
from adallava.cost.flops import (
    CONVENTION,
    Op,
    Pass,
    decode_step,
    decode_step_flops,
    footprint_bytes,
    layer_flops,
    prefill,
    prefill_flops,
)
from adallava.cost.load import LayerLoad, PlanLike, as_loads, full_loads, plan_loads
from adallava.cost.prompt import MME_TEXT_TOKENS, PRUMERGE_VISUAL_TOKENS, PromptTokens
from adallava.cost.roofline import (
    DEVICES,
    PAPER_DEVICE,
    Device,
    decode_step_time_ms,
    get_device,
    op_time_ms,
    pass_time_ms,
    prefill_time_ms,
)
from adallava.cost.spec import LLAVA_1_5_7B, LLAVA_1_5_13B, SPECS, CostError, ModelSpec, VisionSpec
from adallava.cost.strict import STRICT, strict_decode_step_flops, strict_prefill_flops
from adallava.cost.summary import Cost, GenerationCost, generate, plan_cost
from adallava.cost.vision import projector_flops, vision_tower_flops

__all__ = [
    "CONVENTION",
    "CONVENTIONS",
    "DEVICES",
    "LLAVA_1_5_7B",
    "LLAVA_1_5_13B",
    "MME_TEXT_TOKENS",
    "PAPER_DEVICE",
    "PRUMERGE_VISUAL_TOKENS",
    "SPECS",
    "STRICT",
    "Cost",
    "CostError",
    "Device",
    "Estimate",
    "GenerationCost",
    "LayerLoad",
    "ModelSpec",
    "Op",
    "Pass",
    "PlanLike",
    "PromptTokens",
    "Setting",
    "StageCost",
    "VisionSpec",
    "as_loads",
    "decode_step",
    "decode_step_flops",
    "decode_step_time_ms",
    "estimate",
    "footprint_bytes",
    "full_loads",
    "generate",
    "get_device",
    "layer_flops",
    "most_flops",
    "op_time_ms",
    "pass_time_ms",
    "plan_cost",
    "plan_loads",
    "prefill",
    "prefill_flops",
    "prefill_time_ms",
    "projector_flops",
    "resolve_budget",
    "strict_decode_step_flops",
    "strict_prefill_flops",
    "vision_tower_flops",
]
