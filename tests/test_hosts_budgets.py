"""Budgets in FLOPs on real (tiny) models: what the answer cost stays within, for its own length and selection."""

import math

import pytest

from adallava.cli.run import as_dict
from adallava.cost import most_flops
from adallava.errors import BudgetError
from adallava.hosts.model import AdaptiveVLM, Request
from matrix import IMAGES, options
from tiny import processor, tiny_base, tiny_vlm

SELECTIONS = ("none", "fastv:layer=2,ratio=0.75", "fastv:layer=1,rank=3", "uniform:count=5")
QUESTION = "how many sevens are there ?"


def ask(vlm, budget, question=QUESTION, images=IMAGES[0]):
    return vlm.generate(images, question, budget=budget, **options("llava"))


@pytest.mark.parametrize("variant", ["L", "H"])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_largest_k_within_the_budget(variant, selection):
    vlm = tiny_vlm("llava", variant)
    vlm.token_selection = selection
    lengths = ask(vlm, "100%").layer_tokens
    bounds = most_flops(vlm.spec, vlm.adaptive_config, lengths)
    for k in (0, 1, len(bounds) - 1):
        exact = ask(vlm, f"{math.ceil(bounds[k])} FLOPs")
        assert exact.layer_tokens == lengths
        assert exact.budget.k == exact.plan.k[0] == k
        assert exact.cost.prefill_flops <= math.ceil(bounds[k])
        if k:
            less = ask(vlm, f"{math.ceil(bounds[k]) - 1} FLOPs")
            assert less.budget.k == k - 1
    with pytest.raises(BudgetError, match=r"is infeasible: the minimum for this input is .*3 of 6 layers always run"):
        ask(vlm, f"{math.ceil(bounds[0]) - 1} FLOPs")


def test_a_longer_prompt_gets_less_of_the_model_for_the_same_flops():
    vlm = tiny_vlm()
    enough = f"{int(ask(vlm, '100%').cost.prefill_flops)} FLOPs"
    assert ask(vlm, enough).plan.k == [3]
    assert ask(vlm, enough, "what is left of the red seven and above the star ?").plan.k[0] < 3
    assert ask(vlm, enough, images=None).plan.k == [3]


def test_mixed_budgets_in_one_batch_are_those_of_single_requests():
    vlm = tiny_vlm(variant="H")
    vlm.token_selection = "fastv:layer=2,ratio=0.5"
    whole = ask(vlm, "100%").cost.prefill_flops
    budgets = ["100%", f"{0.9 * whole:.0f} FLOPs", "70%", f"{2 * whole / 1e6:.3f} MFLOPs"]
    questions = [QUESTION, "how many ?", "which of the red ones is a seven ?", QUESTION]
    requests = [Request(q, IMAGES[i % 3], budget=b) for i, (q, b) in enumerate(zip(questions, budgets, strict=True))]
    together = vlm.generate_batch(requests, **options("llava"))
    for request, answer in zip(requests, together, strict=True):
        alone = vlm.generate_batch([request], **options("llava"))[0]
        assert (answer.text, answer.plan, answer.budget, answer.cost) == (
            alone.text,
            alone.plan,
            alone.budget,
            alone.cost,
        )
        if answer.budget.budget.unit == "flops":
            assert answer.cost.prefill_flops <= float(answer.budget.budget.flops)


def test_the_answer_and_its_json_show_the_budget():
    vlm = tiny_vlm()
    answer = ask(vlm, "2 GFLOPs")
    assert str(answer.budget.budget) == "2 GFLOPs" and answer.plan.k == [3]
    assert as_dict("tiny", vlm, answer, True)["budget"] == "2 GFLOPs"


def test_base_models():
    vlm = AdaptiveVLM(tiny_base(), processor())
    answer = ask(vlm, "2 GFLOPs")
    assert answer.budget is None and answer.text == ask(vlm, "100%").text
    with pytest.raises(BudgetError, match="minimum for this input is .*a base model always runs whole"):
        ask(vlm, "5 kFLOPs")
    with pytest.raises(BudgetError, match="for a base model"):
        ask(vlm, "60%")


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("-1 GFLOPs", "not above 0"),
        ("5 TFLOP/s", "is a rate"),
        ("5 QFLOPs", "not a budget"),
        ("1 kFLOPs", "infeasible"),
    ],
)
def test_bad_budgets(budget, message):
    with pytest.raises(BudgetError, match=message):
        ask(tiny_vlm(), budget)


def test_what_a_selector_does_not_tell_is_taken_as_kept(monkeypatch):
    """A selector of one's own may decide its count late: then the budget counts every token, and still holds."""
    from adallava.selection.fastv import FastV

    vlm = tiny_vlm()
    vlm.token_selection = "fastv:layer=2,ratio=0.75"
    lengths = [ask(vlm, "100%").layer_tokens[0]] * 6
    bounds = most_flops(vlm.spec, vlm.adaptive_config, lengths)
    kept = FastV.kept
    monkeypatch.setattr(FastV, "keep", lambda self, a, image: _keep(a, image, kept(self, image.sum(-1))))
    monkeypatch.delattr(FastV, "kept")
    assert ask(vlm, f"{int(bounds[2]) - 1} FLOPs").plan.k == [1]
    assert ask(vlm, f"{int(bounds[2])} FLOPs").plan.k == [2]


def _keep(attention, image, count):
    from adallava.selection.fastv import keep_mask

    return keep_mask(attention, image, count)
