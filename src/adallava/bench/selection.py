"""Does dropping visual tokens save the time it should? Prefill, from pixels to the first logits, for every selector."""

from __future__ import annotations

from collections.abc import Callable

import torch

from adallava.bench import BenchSettings
from adallava.bench.models import random_llava, random_prompt
from adallava.bench.timing import interleaved, set_up
from adallava.cost import full_loads, prefill_flops
from adallava.hosts.model import AdaptiveVLM
from adallava.hosts.visual import select_images
from adallava.results import ResultRow, provenance
from adallava.selection import parse_selector

SELECTIONS = (
    "none",
    "prumerge",
    "prumerge+",
    "fastv:ratio=0.25",
    "fastv:ratio=0.5",
    "fastv:ratio=0.75",
    "uniform:ratio=0.75",
    "uniform:ratio=0.5",
    "uniform:ratio=0.25",
    "uniform:ratio=0.0625",
)
TEXT_TOKENS = 48


@torch.no_grad()
def measure(settings: BenchSettings) -> list[ResultRow]:
    """One row per selector: tokens of the first and the last layer, median ms, and both ratios to no selection."""
    device, dtype = set_up(settings)
    vlm = AdaptiveVLM(random_llava(settings.model, device, dtype), None).eval()
    inputs = random_prompt(vlm.model, TEXT_TOKENS, settings.seed)
    things = {text: _prefill(vlm, text, inputs) for text in SELECTIONS}
    times = interleaved(things, settings.rounds, device, settings.seed)
    whole = prefill_flops(vlm.spec, full_loads(vlm.spec), inputs["input_ids"].shape[1])
    rows = []
    for text in SELECTIONS:
        tokens = _tokens(vlm, text, inputs)
        metrics = {
            "tokens_first_layer": tokens[0],
            "tokens_last_layer": tokens[-1],
            "median_ms": times[text].median,
            "time_ratio": times[text].ratio(times["none"]),
            "llm_flops_ratio": prefill_flops(vlm.spec, full_loads(vlm.spec), tokens) / whole,
            "ms": list(times[text].ms),
        }
        config = {"model": settings.model, "token_selection": text, "text_tokens": TEXT_TOKENS, "batch": 1}
        origin = provenance(device=device, dtype=dtype, seed=settings.seed)
        rows.append(ResultRow("selection", metrics, {**config, "rounds": settings.rounds}, origin))
    return rows


def _prefill(vlm: AdaptiveVLM, text: str, inputs: dict[str, torch.Tensor]) -> Callable[[], object]:
    chosen = parse_selector(text)

    def run() -> object:
        vlm.token_selection = chosen
        return vlm(**inputs, use_cache=True, logits_to_keep=1).logits

    return run


def _tokens(vlm: AdaptiveVLM, text: str, inputs: dict[str, torch.Tensor]) -> list[int]:
    """Prompt tokens that each layer processes."""
    vlm.token_selection = parse_selector(text)
    if vlm.token_selection.place == "tower":
        shortened, _ = select_images(vlm.model, inputs, vlm.token_selection)
        return [int(shortened["attention_mask"].sum())] * vlm.spec.num_layers
    state = vlm.request_state(torch.zeros(1, dtype=torch.long))
    vlm(**inputs, ada_state=state)
    assert state.cut is not None
    return state.cut.lengths(inputs["attention_mask"])[0]
