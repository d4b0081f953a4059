"""Do milliseconds follow FLOPs with quantised weights too? Variant L, which runs layers whole, over the plain model.

The same suite as ``adallava.bench.speed``, for every kind of packed weights of which the library is installed. What is
compared has the same weights on both sides, so a ratio says what leaving out layers saves, not what packing does.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration, TorchAoConfig

from adallava.bench import BenchSettings
from adallava.bench.models import random_llava
from adallava.bench.speed import Measure, Sample, Suite
from adallava.bench.timing import set_up
from adallava.errors import ConfigError
from adallava.results import ResultRow, provenance


@dataclass(frozen=True)
class Packing:
    """One kind of packed weights."""

    library: str
    bits: float
    """Of each weight, scales included."""
    config: Callable[[], Any]
    """For ``from_pretrained``."""


def _int8() -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


# Without a threshold for outliers, whose search waits for the device in every product, so that graphs can hold them.
PACKINGS = {
    "int8, torchao": Packing("torchao", 8, _int8),
    "int8, bitsandbytes": Packing(
        "bitsandbytes", 8, partial(BitsAndBytesConfig, load_in_8bit=True, llm_int8_threshold=0.0)
    ),
    # One float32 scale for 64 weights.
    "nf4, bitsandbytes": Packing(
        "bitsandbytes", 4.5, partial(BitsAndBytesConfig, load_in_4bit=True, bnb_4bit_quant_type="nf4")
    ),
}


def measure(settings: BenchSettings) -> list[ResultRow]:
    """Rows as those of ``speed``, for each packing; ``ConfigError`` where no library for any is installed."""
    found = {name: packing for name, packing in PACKINGS.items() if importlib.util.find_spec(packing.library)}
    if not found:
        raise ConfigError("no library for quantised weights is installed. pip install 'adallava[quantized]'.")
    device, dtype = set_up(settings)
    origin = provenance(device=device, dtype=dtype, seed=settings.seed)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        random_llava(settings.model, device, dtype).save_pretrained(folder)
        for name, packing in found.items():
            base = LlavaForConditionalGeneration.from_pretrained(
                folder, quantization_config=packing.config(), dtype=dtype
            )
            packed = packing.bits / (8 * dtype.itemsize)
            suite = Suite(base.to(device).eval(), settings, packed=packed)
            config = {"model": settings.model, "weights": name, "prompt_tokens": suite.tokens, "seed": settings.seed}
            rows += [each.row("quantized", config, origin) for each in _layers(suite)]
    return rows


def _layers(suite: Suite) -> list[Measure]:
    """Prefill and decoding at whole and partial budgets; on CUDA decoding with graphs too."""
    names = ("100%", "75%", "50%")
    things: dict[str, Callable[[], Sample]] = {"plain": partial(suite.plain, suite.base, 1)}
    told = suite.rounds(things | {name: suite.asking("L", (name,)) for name in names})
    made = []
    for name, allowances in zip(names, ((0.01, 0.01), (0.02, 0.03), (0.02, 0.03)), strict=True):
        loads = [suite.loads("L", name)]
        shares = (1.0, 1.0) if name == "100%" else (suite.flops_share(loads), suite.bytes_share(loads))
        made += [
            suite.ratio(f"L {name}, {stage}", told, name, "plain", stage, share, allowance)
            for stage, share, allowance in zip(("prefill", "decode"), shares, allowances, strict=True)
        ]
    if suite.base.device.type == "cuda":
        made += suite.graphed()  # last, because graphs stay
    return made
