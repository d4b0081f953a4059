"""The budgets of a batch: what each request's budget buys, for the length that its own prompt has in each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adallava.budget import Budget, ResolvedBudget
from adallava.config import AdaptiveConfig
from adallava.cost import ModelSpec, resolve_budget
from adallava.hosts.visual import Selector


def resolve_budgets(
    budgets: Sequence[Budget],
    config: AdaptiveConfig | None,
    model: Any,
    inputs: dict[str, Any],
    selector: Selector,
) -> list[ResolvedBudget | None]:
    """What each budget buys; None for a base model (``config`` None). ``BudgetError`` names what is below its minimum.

    inputs: ``input_ids`` and ``attention_mask`` [B, T] of the prompts, shortened by what was selected before the
        decoder, without latency tokens.
    """
    spec = ModelSpec.from_config(model.config)
    lengths = prompt_lengths(model, spec.num_layers, inputs, selector, int(config is not None))
    return [resolve_budget(budget, config, spec, row) for budget, row in zip(budgets, lengths, strict=True)]


def prompt_lengths(
    model: Any, layers: int, inputs: dict[str, Any], selector: Selector, latency: int
) -> list[list[int]]:
    """Tokens that each layer will process, [B][layers], before any is ranked.

    How many tokens a selector inside the decoder drops is known from how many there are; one that does not say it
    (``kept``) is taken to drop none, so that a budget holds in any case. latency: latency tokens of a prompt.
    """
    totals = (inputs["attention_mask"].sum(-1) + latency).tolist()
    count = getattr(selector, "kept", None)
    if selector.place != "decoder" or count is None:
        return [[total] * layers for total in totals]
    visual = (inputs["input_ids"] == model.config.image_token_id).sum(-1)
    dropped = (visual - count(visual)).tolist()
    return [[t] * selector.layer + [t - d] * (layers - selector.layer) for t, d in zip(totals, dropped, strict=True)]
