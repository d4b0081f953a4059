"""Budget: what may be written, what it means, and budget -> k -> budget."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adallava.budget import Budget, flops_at_least, parse_budgets
from adallava.config import AdaptiveConfig
from adallava.errors import AdaLlavaError, BudgetError


def config_l(num_layers=8, prefix_layers=4):
    return AdaptiveConfig(
        variant="L", num_layers=num_layers, num_heads=4, num_kv_heads=4, hidden_size=8, prefix_layers=prefix_layers
    )


def config_h(num_layers=32, heads=32, heads_per_switch=8, prefix_layers=16):
    return AdaptiveConfig(
        variant="H",
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=heads,
        hidden_size=8,
        prefix_layers=prefix_layers,
        heads_per_switch=heads_per_switch,
    )


@st.composite
def configs(draw):
    layers = draw(st.integers(2, 100))
    prefix = draw(st.integers(1, layers - 1))
    if draw(st.booleans()):
        return config_l(layers, prefix)
    heads = draw(st.sampled_from([4, 8, 32, 40]))
    return config_h(layers, heads, draw(st.sampled_from([1, 2, 4])), prefix)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("60%", Fraction(3, 5)),
        (" 62.5 % ", Fraction(5, 8)),
        ("0.6", Fraction(3, 5)),
        (".6", Fraction(3, 5)),
        ("3/5", Fraction(3, 5)),
        (0.6, Fraction(3, 5)),
        (0.1 + 0.2, Fraction(3, 10)),
        (np.float64(0.6), Fraction(3, 5)),
        (Fraction(3, 5), Fraction(3, 5)),
        (Budget(Fraction(3, 5)), Fraction(3, 5)),
        (1, Fraction(1)),
        ("1", Fraction(1)),
        (1.0, Fraction(1)),
        ("100%", Fraction(1)),
        (2**-40 * 1.0000001, Fraction(2**-40 * 1.0000001)),  # no short fraction is near: the exact binary value
    ],
)
def test_parse(value, expected):
    assert Budget.parse(value).fraction == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "nan is not a finite number"),
        (float("inf"), "inf is not a finite number"),
        (0, "0 is not above 0"),
        (-0.5, "-0.5 is not above 0"),
        ("-5%", "'-5%' is not above 0"),
        (1.5, "1.5 is more than the whole model"),
        (60, "60 is more than the whole model.*Did you mean '60%'"),
        ("60", "'60' is more than the whole model.*Did you mean '60%'"),
        ("101%", "'101%' is more than the whole model"),
        (True, "True is a truth value"),
        ("abc", "'abc' is not a budget.*Expected a share.*'60%'"),
        ("", "'' is not a budget"),
        ("1/0", "'1/0' is not a budget"),
        ("nan", "'nan' is not a budget"),
        ("9" * 10_000, "10000 characters"),
        (None, "None has type NoneType"),
        (np.float32(0.7), "has type float32.*lower precision"),
        ("5 TFLOP/s", r"is a rate \(TFLOP/s\); a budget is an amount"),
        ("0 TFLOPs", "'0 TFLOPs' is not above 0"),
        ("-5 GFLOPs", "'-5 GFLOPs' is not above 0"),
        ("0.5 FLOPs", "0.5 FLOPs is out of range"),
        ("1e99 TFLOPs", r"1e\+111 FLOPs is out of range"),
        ("1e999 TFLOPs", "is not a budget"),
        ("5 XFLOPs", "'5 XFLOPs' is not a budget"),
        ("TFLOPs", "'TFLOPs' is not a budget"),
        ("5,1 TFLOPs", "is not a budget"),
        ("5t", "'5t' is not a budget"),
        ("0 ms", "'0 ms' is not above 0"),
        ("-1 ms/token", "'-1 ms/token' is not above 0"),
        ("2000000 s", r"2e\+09 ms is out of range"),
        ("80 minutes", "'80 minutes' is not a budget"),
        ("ms", "'ms' is not a budget"),
        ("80 ms/image", "is not a budget"),
    ],
)
def test_parse_errors(value, message):
    with pytest.raises(BudgetError, match=message) as caught:
        Budget.parse(value)
    assert isinstance(caught.value, AdaLlavaError)
    assert isinstance(caught.value, ValueError)


def test_constructor_checks_too():
    with pytest.raises(BudgetError, match=r"Use Budget.parse\(0.6\)"):
        Budget(0.6)
    with pytest.raises(BudgetError, match="out of range"):
        Budget(Fraction(3, 2))


@pytest.mark.parametrize(
    ("budget", "k"), [(0.5, 0), (0.5625, 0), (0.625, 1), (0.75, 2), (0.85, 2), (0.875, 3), (1.0, 4), ("0.3", 0)]
)
def test_table_of_the_released_code(budget, k):
    """The k that the released code computes for 8 layers with a prefix of 4."""
    assert Budget.parse(budget).resolve(config_l(), clamp=True).k == k


def test_below_the_minimum():
    message = "budget 30% is below the minimum of this model, 50% (12 of 24 layers always run). Ask for at least '50%'."
    with pytest.raises(BudgetError) as caught:
        Budget.parse("30%").resolve(config_l(24, 12))
    assert str(caught.value) == message
    assert Budget.parse("30%").resolve(config_l(24, 12), clamp=True).fraction_used == Fraction(1, 2)


@given(configs())
def test_the_minimum_an_error_names_is_enough(config):
    with pytest.raises(BudgetError) as caught:
        Budget.parse(1e-6).resolve(config)
    named = str(caught.value).rpartition("at least '")[2].rstrip("'.")
    assert Budget.parse(named).resolve(config).k == 0


@given(configs(), st.data())
def test_budget_k_budget(config, data):
    k = data.draw(st.integers(0, config.max_k))
    budget = Budget.of_k(config, k)
    for same in (budget, float(budget), str(budget)):
        resolved = Budget.parse(same).resolve(config)
        assert resolved.k == k
        assert resolved.switches_on == config.prefix_switches + k
        assert resolved.fraction_used == budget.fraction
    less = Budget(budget.fraction - Fraction(1, 10**9))
    assert less.resolve(config, clamp=True).k == max(0, k - 1)


def test_every_float_share_up_to_4096_is_exact():
    for total in [*range(1, 200), 1000, 4095, 4096]:
        for on in range(1, total + 1):
            assert Budget.parse(on / total).fraction == Fraction(on, total)


@given(st.fractions(min_value=Fraction(1, 10**6), max_value=1), configs())
def test_a_budget_is_never_exceeded(fraction, config):
    resolved = Budget(fraction).resolve(config, clamp=True)
    assert 0 <= resolved.k <= config.max_k
    assert resolved.fraction_used <= max(fraction, Fraction(config.prefix_switches, config.total_switches))


def test_more_budget_never_buys_less():
    ks = [Budget(Fraction(n, 1000)).resolve(config_h(), clamp=True).k for n in range(1, 1001)]
    assert ks == sorted(ks)
    assert (ks[0], ks[-1]) == (0, 64)


def test_of_k_out_of_range():
    for k in (-1, 65, True, 1.0):
        with pytest.raises(BudgetError, match="expected a whole number from 0 to 64"):
            Budget.of_k(config_h(), k)


@pytest.mark.parametrize(
    ("text", "flops", "written"),
    [
        ("5.1 TFLOPs", 5_100_000_000_000, "5.1 TFLOPs"),
        ("5.1T", 5_100_000_000_000, "5.1 TFLOPs"),
        (" 850 GFLOPs ", 850_000_000_000, "850 GFLOPs"),
        ("850gflop", 850_000_000_000, "850 GFLOPs"),
        ("1200M", 1_200_000_000, "1.2 GFLOPs"),
        ("2e9 FLOPs", 2_000_000_000, "2 GFLOPs"),
        ("3k", 3000, "3 KFLOPs"),
        ("12.5 FLOPs", Fraction(25, 2), "12.5 FLOPs"),
        ("0.001 PFLOPs", 10**12, "1 TFLOPs"),
    ],
)
def test_flops(text, flops, written):
    budget = Budget.parse(text)
    assert (budget.unit, budget.flops, str(budget)) == ("flops", flops, written)
    assert Budget.parse(budget) is budget


@given(st.integers(1, 10**20), st.integers(0, 6))
def test_flops_are_read_back_exactly_and_rounded_up_in_advice(n, decimals):
    budget = Budget(Fraction(n, 10**decimals), "flops") if n >= 10**decimals else Budget(Fraction(n), "flops")
    assert Budget.parse(str(budget)) == budget
    advice = Budget.parse(flops_at_least(budget.flops))
    assert budget.flops <= advice.flops <= max(budget.flops * Fraction(1001, 1000), budget.flops + 1)


def test_flops_and_shares_are_not_mixed():
    flops, share = Budget.parse("5 TFLOPs"), Budget.parse("60%")
    with pytest.raises(BudgetError, match="5 TFLOPs is in FLOPs, and the share.*write a share such as '60%'"):
        flops.resolve(config_l())
    for refused in (lambda: flops.fraction, lambda: float(flops)):
        with pytest.raises(BudgetError, match="is in FLOPs"):
            refused()
    with pytest.raises(BudgetError, match="60% is a share. Write FLOPs"):
        _ = share.flops
    with pytest.raises(TypeError):
        _ = flops < share
    assert flops < Budget.parse("6T") and flops != share
    with pytest.raises(BudgetError, match="got 'hours'"):
        Budget(Fraction(1), "hours")


@pytest.mark.parametrize(
    ("text", "ms", "unit", "written"),
    [
        ("80 ms", 80, "ms", "80 ms"),
        ("80ms", 80, "ms", "80 ms"),
        ("0.08 s", 80, "ms", "80 ms"),
        ("2 seconds", 2000, "ms", "2000 ms"),
        ("1500 us", Fraction(3, 2), "ms", "1.5 ms"),
        (" 30.25 MS ", Fraction(121, 4), "ms", "30.25 ms"),
        ("30 ms/token", 30, "ms/token", "30 ms/token"),
        ("0.03 s per token", 30, "ms/token", "30 ms/token"),
    ],
)
def test_times(text, ms, unit, written):
    budget = Budget.parse(text)
    assert (budget.ms, budget.unit, str(budget), budget.timed) == (ms, unit, written, True)
    assert Budget.parse(written) == budget


def test_times_are_neither_shares_nor_flops():
    first, each = Budget.parse("80 ms"), Budget.parse("80 ms/token")
    with pytest.raises(BudgetError, match="is in milliseconds, and the share of the model that it buys"):
        float(first)
    with pytest.raises(BudgetError, match="is in milliseconds per token. Write FLOPs"):
        _ = each.flops
    with pytest.raises(BudgetError, match="60% is a share. Write a time"):
        _ = Budget.parse("60%").ms
    with pytest.raises(TypeError):
        _ = first < each
    assert first < Budget.parse("81 ms") and first != each


def test_text_and_order():
    assert [str(b) for b in parse_budgets("100%, 85%,60%")] == ["100%", "85%", "60%"]
    assert str(Budget.parse("1/3")) == "1/3"
    assert str(Budget.parse("62.25%")) == "62.25%"
    assert Budget.parse("60%") < Budget.parse("85%")
    assert float(Budget.parse("60%")) == 0.6
    with pytest.raises(BudgetError, match="has an empty entry"):
        parse_budgets("100%,,60%")
