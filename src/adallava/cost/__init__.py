"""What a plan costs, computed without a model: FLOPs, bytes and roofline time.

Everything here is arithmetic in plain Python and follows the *paper* convention (see ``adallava.cost.flops``), which
reproduces the cost columns of the AdaLLaVA paper; only ``adallava.cost.vision`` counts otherwise and says so.
"""

from __future__ import annotations

from adallava.cost.flops import (
    CONVENTION,
    Op,
    Pass,
    decode_step,
    decode_step_flops,
    footprint_bytes,
    prefill,
    prefill_flops,
)
from adallava.cost.load import LayerLoad, PlanLike, as_loads, full_loads, plan_loads
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
from adallava.cost.summary import Cost, GenerationCost, generate, plan_cost
from adallava.cost.vision import projector_flops, vision_tower_flops

__all__ = [
    "CONVENTION",
    "DEVICES",
    "LLAVA_1_5_7B",
    "LLAVA_1_5_13B",
    "PAPER_DEVICE",
    "SPECS",
    "Cost",
    "CostError",
    "Device",
    "GenerationCost",
    "LayerLoad",
    "ModelSpec",
    "Op",
    "Pass",
    "PlanLike",
    "VisionSpec",
    "as_loads",
    "decode_step",
    "decode_step_flops",
    "decode_step_time_ms",
    "footprint_bytes",
    "full_loads",
    "generate",
    "get_device",
    "op_time_ms",
    "pass_time_ms",
    "plan_cost",
    "plan_loads",
    "prefill",
    "prefill_flops",
    "prefill_time_ms",
    "projector_flops",
    "vision_tower_flops",
]
