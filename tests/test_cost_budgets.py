"""Budgets in FLOPs: k for one input, so that no plan of k switches goes over."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adallava.budget import Budget
from adallava.config import AdaptiveConfig
from adallava.cost import LLAVA_1_5_7B, ModelSpec, full_loads, most_flops, prefill_flops, resolve_budget
from adallava.cost.paper import switch_counts
from adallava.errors import BudgetError, PlanError


def config_of(spec, variant, prefix=None, heads_per_switch=8):
    return AdaptiveConfig(
        variant=variant,
        num_layers=spec.num_layers,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        hidden_size=spec.hidden_size,
        prefix_layers=prefix or spec.num_layers // 2,
        heads_per_switch=heads_per_switch,
    )


SEVEN = {variant: config_of(LLAVA_1_5_7B, variant) for variant in "LH"}


@st.composite
def cases(draw):
    """A model, its config, lengths per layer, and a plan: switches on in each tail layer."""
    kv_heads = draw(st.sampled_from([2, 4, 8]))
    layers = draw(st.integers(2, 8))
    spec = ModelSpec(16, draw(st.integers(1, 40)), layers, 8, kv_heads, 2, 10, gated_mlp=draw(st.booleans()))
    variant = draw(st.sampled_from("LH"))
    config = config_of(spec, variant, draw(st.integers(1, layers - 1)), draw(st.sampled_from([8 // kv_heads, 8])))
    tokens = draw(st.lists(st.integers(1, 60), min_size=layers, max_size=layers))
    if draw(st.booleans()):  # the usual case: one length behind the prefix
        tokens = sorted(tokens, reverse=True)[: config.prefix_layers] + [tokens[-1]] * config.tail_layers
    on = draw(
        st.lists(st.integers(0, config.switches_per_layer), min_size=config.tail_layers, max_size=config.tail_layers)
    )
    return spec, config, tokens, on


def flops_of(spec, config, tokens, on):
    heads = config.num_heads // config.switches_per_layer
    return prefill_flops(spec, [config.num_heads] * config.prefix_layers + [heads * n for n in on], tokens)


@settings(deadline=None, max_examples=60)
@given(cases())
def test_no_plan_of_k_switches_exceeds_the_bound(case):
    spec, config, tokens, on = case
    bounds = most_flops(spec, config, tokens)
    assert len(bounds) == config.max_k + 1
    assert bounds == sorted(bounds)
    assert flops_of(spec, config, tokens, on) <= bounds[sum(on)] * (1 + Fraction(1, 10**12))
    assert float(bounds[-1]) == pytest.approx(prefill_flops(spec, full_loads(spec), tokens), rel=1e-12)


@settings(deadline=None, max_examples=60)
@given(cases(), st.fractions(min_value=0, max_value=Fraction(11, 10)))
def test_a_budget_holds_for_every_plan_and_one_switch_more_may_break_it(case, share):
    spec, config, tokens, on = case
    flops = max(Fraction(1), share * Fraction(prefill_flops(spec, full_loads(spec), tokens)))
    bounds = most_flops(spec, config, tokens)
    try:
        k = resolve_budget(Budget(flops, "flops"), config, spec, tokens).k
    except BudgetError:
        assert bounds[0] > flops
        return
    assert bounds[k] <= flops
    assert k == config.max_k or bounds[k + 1] > flops
    if sum(on) <= k:
        assert flops_of(spec, config, tokens, on) <= float(flops) * (1 + 1e-12)


@pytest.mark.parametrize("variant", ["L", "H"])
def test_the_bound_is_reached_where_all_lengths_are_one(variant):
    config = SEVEN[variant]
    for k in (0, 1, 5, config.max_k - 1, config.max_k):
        spread = prefill_flops(LLAVA_1_5_7B, switch_counts(config, k), 645)
        assert most_flops(LLAVA_1_5_7B, config, 645)[k] == spread
        assert resolve_budget(Budget(Fraction(spread), "flops"), config, LLAVA_1_5_7B, 645).k == k
        packed = prefill_flops(LLAVA_1_5_7B, switch_counts(config, k, packed=True), 645)
        assert packed == spread if variant == "L" else packed <= spread <= 1.001 * packed


@pytest.mark.parametrize(
    ("budget", "tokens", "k"),
    [
        ("5.1 TFLOPs", 645, 3),  # 19 layers cost 5.092
        ("5.09 TFLOPs", 645, 2),
        ("5.1T", 644, 3),
        ("8.576 TFLOPs", 645, 16),
        ("8.5759 TFLOPs", 645, 15),
        ("100T", 645, 16),
        ("5.1 TFLOPs", [645] * 2 + [357] * 30, 16),  # FastV: 4.935 for all layers
        ("4.3 TFLOPs", [645] * 2 + [357] * 30, 11),
    ],
)
def test_seven_b(budget, tokens, k):
    resolved = resolve_budget(Budget.parse(budget), SEVEN["L"], LLAVA_1_5_7B, tokens)
    assert (resolved.k, str(resolved.budget)) == (k, str(Budget.parse(budget)))
    assert resolved.fraction_used == Fraction(16 + k, 32)


def test_a_share_does_not_depend_on_the_input():
    for tokens in (1, 645, [645] * 32):
        assert resolve_budget(Budget.parse("60%"), SEVEN["H"], LLAVA_1_5_7B, tokens).k == 12


@pytest.mark.parametrize("variant", ["L", "H"])
def test_infeasible(variant):
    message = (
        r"budget 1 TFLOPs is infeasible: the minimum for this input is 4.289 TFLOPs \(16 of 32 layers always run; "
        r"645 tokens; .*paper convention\)\. Ask for at least '4.289 TFLOPs'"
    )
    with pytest.raises(BudgetError, match=message):
        resolve_budget(Budget.parse("1T"), SEVEN[variant], LLAVA_1_5_7B, 645)
    assert resolve_budget(Budget.parse("4.289 TFLOPs"), SEVEN[variant], LLAVA_1_5_7B, 645).k == 0


def test_base_models():
    assert resolve_budget(Budget.parse("100%"), None, LLAVA_1_5_7B, 645) is None
    assert resolve_budget(Budget.parse("8.58T"), None, LLAVA_1_5_7B, 645) is None
    with pytest.raises(BudgetError, match="minimum for this input is 8.576 TFLOPs .a base model always runs whole"):
        resolve_budget(Budget.parse("8T"), None, LLAVA_1_5_7B, 645)
    with pytest.raises(BudgetError, match="60% for a base model"):
        resolve_budget(Budget.parse("60%"), None, LLAVA_1_5_7B, 645)


def test_a_config_of_another_model():
    with pytest.raises(PlanError, match="config has 32 layers of 32 heads, the model 2 of 8"):
        most_flops(ModelSpec(16, 16, 2, 8, 8, 2, 10), SEVEN["L"], 10)
