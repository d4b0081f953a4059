"""Prefill at the paper's budgets, measured, beside the ratios of the prefill times that the paper tells.

Those are a roofline's (Tab. B: 81, 69 and 49 ms at 100, 85 and 60 % for LLaVA-1.5-7B, L and H alike); here the clock
runs, on any of the shapes and any device. Nothing is promised: a budget buys whole layers, so it may buy less than it
says.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from adallava.bench import BenchSettings
from adallava.bench.models import random_llava
from adallava.bench.speed import Sample, Suite
from adallava.bench.timing import set_up
from adallava.results import ResultRow, provenance

PAPER_MS = {"100%": 81.0, "85%": 69.0, "60%": 49.0}


def measure(settings: BenchSettings) -> list[ResultRow]:
    """One row per variant and budget: its prefill over the plain model's; as the share what the paper's times say."""
    device, dtype = set_up(settings)
    suite = Suite(random_llava(settings.model, device, dtype), settings)
    things: dict[str, Callable[[], Sample]] = {"plain": partial(suite.plain, suite.base, 1, new_tokens=1)}
    names = {f"{variant} {budget}": (variant, budget) for variant in ("L", "H") for budget in PAPER_MS}
    told = suite.rounds(
        things | {name: suite.asking(v, (budget,), new_tokens=1) for name, (v, budget) in names.items()}
    )
    origin = provenance(device=device, dtype=dtype, seed=settings.seed)
    config = {"model": settings.model, "prompt_tokens": suite.tokens, "seed": settings.seed}
    rows = []
    for name, (variant, budget) in names.items():
        made = suite.ratio(
            f"{name}, prefill", told, name, "plain", "prefill", PAPER_MS[budget] / PAPER_MS["100%"], None
        )
        made.more.update(flops_share=suite.flops_share([suite.loads(variant, budget)]), paper_ms=PAPER_MS[budget])
        rows.append(made.row("paper", config, origin))
    return rows
