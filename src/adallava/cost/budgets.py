"""From a budget to k, for one input: a share of the model directly, FLOPs through the cost of every k.

FLOPs depend on the length of the input and on how many visual tokens are kept, layer by layer. They also depend on the
plan, which is decided only while the input is processed, and a little on where its switches lie: variant H pays the
norms and adds of each layer that runs in part. So k is the largest for which *no* plan goes over the budget.
"""

from __future__ import annotations

from fractions import Fraction

from adallava.budget import Budget, ResolvedBudget, flops_at_least
from adallava.config import AdaptiveConfig
from adallava.cost.flops import Tokens, layer_flops, prefill_flops
from adallava.cost.load import LayerLoad, full_loads
from adallava.cost.spec import ModelSpec
from adallava.errors import BudgetError, PlanError


def resolve_budget(
    budget: Budget, config: AdaptiveConfig | None, spec: ModelSpec, tokens: Tokens
) -> ResolvedBudget | None:
    """Return what ``budget`` buys for one input; None for a base model (``config`` None), which always runs whole.

    tokens: prompt length with visual and latency tokens, for all layers or for each one, as in ``prefill_flops``.
    Raises ``BudgetError`` when the budget is below what always runs; for FLOPs it names the minimum of this input.
    """
    if budget.timed:
        raise BudgetError(
            f"budget {budget} buys what this device makes of it, which cannot be computed. Calibrated models take it "
            "(generate(), 'adallava run'); here, write a share such as '60%' or FLOPs such as '5.1 TFLOPs'."
        )
    if config is None:
        _check_base(budget, spec, tokens)
        return None
    if budget.unit == "share":
        return budget.resolve(config)
    costs = most_flops(spec, config, tokens)
    affordable = [k for k, flops in enumerate(costs) if flops <= budget.flops]
    if not affordable:
        what = f"{config.prefix_layers} of {config.num_layers} layers always run"
        raise _infeasible(budget, costs[0], what, tokens)
    return ResolvedBudget(budget, affordable[-1], config.prefix_switches, config.total_switches)


def most_flops(spec: ModelSpec, config: AdaptiveConfig, tokens: Tokens) -> list[Fraction]:
    """Return, for each k from 0 to ``config.max_k``, FLOPs of a prefill that no plan of k switches exceeds.

    For variant L, and where all switchable layers have one length, a plan of k switches has exactly these FLOPs: any
    for L, the one that spreads its switches over most layers for H. Arguments and errors as for ``resolve_budget``;
    ``PlanError`` for a config of another model.
    """
    if (config.num_layers, config.num_heads) != (spec.num_layers, spec.num_heads):
        raise PlanError(
            f"the config has {config.num_layers} layers of {config.num_heads} heads, the model {spec.num_layers} of "
            f"{spec.num_heads}. Use the config of this model."
        )
    lengths = [tokens] * spec.num_layers if isinstance(tokens, int) else list(tokens)
    prefix, each = config.prefix_layers, config.switches_per_layer
    always: list[int | LayerLoad] = [*full_loads(spec)[:prefix], *([0] * config.tail_layers)]
    least = Fraction(prefill_flops(spec, always, lengths))  # also checks the lengths
    parts = [_affine(spec, each, length) for length in lengths[prefix:]]
    # What a switch costs, and what a layer costs as soon as it has one: the dearest first, whoever has them.
    switches = sorted((part[1] for part in parts for _ in range(each)), reverse=True)
    fixed = sorted((part[0] for part in parts), reverse=True)
    bounds = [least]
    for k, switch in enumerate(switches):
        bounds.append(bounds[-1] + switch + (fixed[k] if k < len(fixed) else 0))
    return bounds


def _affine(spec: ModelSpec, switches: int, tokens: int) -> tuple[Fraction, Fraction]:
    """FLOPs of a layer with n > 0 of its switches on are first + n * second."""
    share = Fraction(1, switches)
    one = Fraction(layer_flops(spec, LayerLoad(spec.num_heads // switches, share), tokens))
    if switches == 1:
        return Fraction(0), one
    each = (Fraction(layer_flops(spec, full_loads(spec)[0], tokens)) - one) / (switches - 1)
    return one - each, each


def _check_base(budget: Budget, spec: ModelSpec, tokens: Tokens) -> None:
    if budget.unit == "share":
        if budget.fraction != 1:
            raise BudgetError(f"budget {budget} for a base model, which always runs whole. Ask for '100%'.")
    elif (whole := Fraction(prefill_flops(spec, full_loads(spec), tokens))) > budget.flops:
        raise _infeasible(budget, whole, "a base model always runs whole", tokens)


def _infeasible(budget: Budget, least: Fraction, why: str, tokens: Tokens) -> BudgetError:
    need = flops_at_least(least)
    length = tokens if isinstance(tokens, int) else max(tokens)
    return BudgetError(
        f"budget {budget} is infeasible: the minimum for this input is {need} ({why}; {length} tokens; FLOPs of the "
        f"prefill, paper convention). Ask for at least '{need}', or for a share such as '60%'."
    )
