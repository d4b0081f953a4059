"""``adallava run``: one question, one answer, and what it cost."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from adallava.budget import Budget, Forecast
from adallava.cli.show import check_question, drawing_of, kept_text, plan_legend, plan_text, warn_unknown_words
from adallava.errors import ConfigError
from adallava.hosts.answer import Answer
from adallava.hosts.images import load_image
from adallava.hosts.model import AdaptiveVLM
from adallava.plots.units import flops_text, ms_text, share_text
from adallava.selection import describe_selector, parse_selector

# The first request of a process is slow for reasons that have nothing to do with the budget. A quick one is asked
# twice and the second time is told; a slow one is not worth the wait.
_REPEAT_BELOW_MS = 3000


@dataclass(frozen=True)
class RunOptions:
    """What ``adallava run`` was asked for."""

    images: tuple[str, ...]
    question: str
    budget: str
    model: str
    max_new_tokens: int
    token_selection: str | None


def run(asked: RunOptions, as_json: bool) -> None:
    """Load the model, ask, and print the answer with plan, FLOPs and times; see ``adallava run --help``."""
    allowed = Budget.parse(asked.budget)  # before the model is loaded: a typing error is told at once
    check_question(asked.question)
    if asked.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens is {asked.max_new_tokens}, expected 1 or more.")
    if asked.token_selection is not None:
        parse_selector(asked.token_selection)
    pictures = [load_image(image) for image in asked.images]
    vlm = AdaptiveVLM.from_pretrained(asked.model, token_selection=asked.token_selection)
    options: dict[str, Any] = {"budget": allowed, "max_new_tokens": asked.max_new_tokens, "do_sample": False}
    if allowed.timed:  # a process pays for its first request what no budget in time allows for
        vlm.generate(pictures, asked.question, max_new_tokens=1, do_sample=False)
    answer = vlm.generate(pictures, asked.question, **options)
    warm = answer.timing.total_ms < _REPEAT_BELOW_MS
    if warm:
        answer = vlm.generate(pictures, asked.question, **options)
    warn_unknown_words(vlm, asked.question, Console(stderr=True))
    if as_json:
        print(json.dumps(as_dict(asked.model, vlm, answer, warm), indent=2))
    else:
        _show(vlm, answer, warm)


def as_dict(model: str, vlm: AdaptiveVLM, answer: Answer, warm: bool) -> dict[str, Any]:
    """Return an answer as plain data; FLOPs are of the prefill, ``plan`` is None for a base model.

    "prompt_tokens" are those before any are dropped and without the latency token, "layer_tokens" those that each
    layer processed, with it.
    """
    plan, cost, timing = answer.plan, answer.cost, answer.timing
    forecast = None if answer.budget is None else answer.budget.forecast
    return {
        "answer": answer.text,
        "model": model,
        "budget": "100%" if answer.budget is None else str(answer.budget.budget),
        "used_frac": 1.0 if answer.budget is None else float(answer.budget.fraction_used),
        "plan": None if plan is None else plan.to_dict()["rows"][0],
        "plan_text": None if plan is None else plan.describe(),
        "prefill_flops": cost.prefill_flops,
        "base_prefill_flops": cost.base_prefill_flops,
        "flops_frac": cost.frac,
        "flops_convention": cost.convention,
        "forecast": None if forecast is None else dataclasses.asdict(forecast),
        "prepare_ms": timing.prepare_ms,
        "first_token_ms": timing.first_token_ms,
        "total_ms": timing.total_ms,
        "warm": warm,
        "token_selection": describe_selector(vlm.token_selection),
        "prompt_tokens": answer.prompt_tokens,
        "layer_tokens": answer.layer_tokens,
        "new_tokens": timing.new_tokens,
    }


def _show(vlm: AdaptiveVLM, answer: Answer, warm: bool) -> None:
    console = Console(highlight=False)
    cost, timing, drawing = answer.cost, answer.timing, drawing_of(vlm, answer)
    console.print(Text(answer.text or "(empty answer)", style="bold" if answer.text else "dim"))
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    unit = "layers" if drawing.per_layer == 1 else "switches"
    used = "a base model runs whole" if answer.budget is None else f"budget {answer.budget.budget}"
    table.add_row("plan", Text.assemble(plan_text(drawing), f"  {drawing.count} {unit} on, {used}"))
    if answer.plan is not None:
        table.add_row("", Text.assemble(plan_legend([drawing]), style="dim"))
    if vlm.token_selection.name != "none":
        table.add_row("visual tokens", f"{describe_selector(vlm.token_selection)}, {kept_text(answer)}")
    table.add_row(
        "FLOPs",
        f"{flops_text(cost.prefill_flops)} of {flops_text(cost.base_prefill_flops)}, {share_text(cost.frac)} "
        f"(prefill, {cost.convention} convention)",
    )
    if answer.budget is not None and (foretold := answer.budget.forecast) is not None:
        table.add_row("forecast", forecast_text(answer.budget.budget, foretold))
    tokens = f"{timing.new_tokens} token{'s' if timing.new_tokens != 1 else ''}"
    remark = "measured warm" if warm else "measured cold: the first request of a process is slower"
    table.add_row(
        "time",
        f"{ms_text(timing.first_token_ms)} to the first token, {ms_text(timing.total_ms)} in all ({tokens}; {remark}), "
        f"after {ms_text(timing.prepare_ms)} of preparation",
    )
    console.print(table)


def forecast_text(budget: Budget, foretold: Forecast) -> str:
    """Say what a request with a budget in milliseconds was foretold."""
    what = "a token" if budget.unit == "ms/token" else "to the first token, preparation included"
    remark = f"; {foretold.remark}" if foretold.remark else ""
    return f"{ms_text(foretold.ms)} {what}, at most {ms_text(foretold.upper_ms)} in 95 % of cases{remark}"
