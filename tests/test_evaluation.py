"""One task of the mini benchmark: scores, failures, plan counts; and the statistics of plans."""

import dataclasses
import weakref
from collections import Counter

import numpy as np
import pytest
import torch

from adallava.budget import Budget
from adallava.config import AdaptiveConfig
from adallava.cost import plan_loads
from adallava.cost.flops import prefill_flops
from adallava.cost.roofline import prefill_time_ms
from adallava.evaluation import minibench
from adallava.evaluation.answering import Answering
from adallava.evaluation.minibench import LONGEST, TaskSettings, max_new_tokens, run_task
from adallava.evaluation.modes import PlanMode
from adallava.evaluation.plans import PlanCounts
from adallava.evaluation.tasks import TaskRun
from adallava.hosts.model import AdaptiveVLM, Request
from adallava.mini.questions import FAMILIES, benchmark
from adallava.mini.scenes import sample_scene, to_image
from adallava.plan import ExecutionPlan
from adallava.selection.baselines import Random
from tiny import processor, tiny_base, tiny_vlm


def settings(task="open", budget="67%", mode="learned", limit=6, batch_size=64):
    chosen = None if mode is None else PlanMode.parse(mode)
    return TaskSettings(task, Budget.parse(budget), chosen, 0, limit, batch_size)


@pytest.fixture(scope="module")
def vlm():
    return tiny_vlm()


def oracle(vlm, task, monkeypatch, wrong=()):
    """Make a model answer right, but for the questions whose numbers are in ``wrong``."""
    right = [item.question.answer for item in benchmark(task, 0, 20)]
    texts = iter(["nonsense" if number in wrong else answer for number, answer in enumerate(right)])
    real = vlm.generate_batch

    def generate_batch(requests, **kwargs):
        return [dataclasses.replace(answer, text=next(texts)) for answer in real(requests, **kwargs)]

    monkeypatch.setattr(vlm, "generate_batch", generate_batch)


@pytest.mark.parametrize("task", FAMILIES)
def test_right_and_wrong_answers(vlm, task, monkeypatch):
    oracle(vlm, task, monkeypatch, wrong={1})
    run = run_task(vlm, settings(task, limit=5, batch_size=2))
    assert run.scores == [1, 0, 1, 1, 1]
    assert run.failures == []
    assert run.plans.counts.total() == 5
    assert run.flops_fracs == pytest.approx([4 / 6] * 5, abs=0.01)


@pytest.mark.parametrize("task", FAMILIES)
def test_every_right_answer_fits(vlm, task):
    tokenizer = processor().tokenizer
    longest = max(len(tokenizer(i.question.answer)["input_ids"]) - 1 for i in benchmark(task, 0, 300))
    assert longest < max_new_tokens(vlm, task)
    assert set(LONGEST[task].split()) <= set(tokenizer.get_vocab())


def test_costs_are_means_over_the_answers(vlm):
    run = TaskRun.of(vlm)
    picture = to_image(sample_scene("test", 0, 0))
    answers = [vlm.generate(picture, "how many ?", budget=budget, max_new_tokens=2) for budget in ("100%", "67%")]
    for answer in answers:
        run.add_cost(answer)
    run.scores = [1.0, 0.0]
    told = run.metrics()
    spec, tokens = vlm.spec, answers[0].layer_tokens
    for name, cost in (("prefill_flops", prefill_flops), ("roofline_ms", prefill_time_ms)):
        each = [cost(spec, plan_loads(spec, answer.plan, 0), tokens) for answer in answers]
        assert each[1] < each[0] and told[name] == pytest.approx(sum(each) / 2)


def test_batches_ask_what_single_requests_ask(vlm):
    calls = []
    together = run_task(vlm, settings(batch_size=4), calls.append)
    alone = run_task(vlm, settings(batch_size=1))
    assert calls == [4, 2]
    assert (together.scores, together.plans) == (alone.scores, alone.plans)


def test_random_plans_repeat(vlm):
    first, again = (run_task(vlm, settings(mode="random", limit=12)) for _ in range(2))
    assert first.plans == again.plans
    assert first.plans.statistics()["distinct"] > 1
    assert run_task(vlm, settings(mode="static")).plans.statistics()["distinct"] == 1


def test_a_base_model_has_no_plans():
    run = run_task(AdaptiveVLM(tiny_base(), processor()), settings(budget="100%", mode=None, limit=3))
    assert run.plans is None
    assert run.flops_fracs == [1, 1, 1]


def test_tokens_are_counted_without_the_latency_token(vlm):
    base = AdaptiveVLM(tiny_base(), processor())
    chosen = dataclasses.replace(settings(limit=3), token_selection="fastv:rank=10")
    some = run_task(vlm, chosen)
    same = run_task(base, dataclasses.replace(chosen, budget=Budget.parse(1), mode=None))
    assert some.prompt_tokens == same.prompt_tokens
    assert some.last_layer_tokens == same.last_layer_tokens == [n - 64 + 10 for n in some.prompt_tokens]
    whole = run_task(vlm, settings(limit=3))
    assert whole.last_layer_tokens == whole.prompt_tokens == some.prompt_tokens
    assert max(some.flops_fracs) < min(whole.flops_fracs)


def test_random_tokens_depend_on_the_picture_alone(vlm, monkeypatch):
    drawn, real = [], Random.select

    def select(self, patches, generators=None):
        selected = real(self, patches, generators)
        drawn.extend(tuple(indices.tolist()) for indices in selected.indices)
        return selected

    monkeypatch.setattr(Random, "select", select)
    for size in (6, 1, 4):
        run_task(vlm, dataclasses.replace(settings(batch_size=size), token_selection="random:count=9"))
    assert drawn[:6] == drawn[6:12] == drawn[12:]
    assert len(set(drawn)) == 6


def test_a_failed_sample_is_counted_and_named(vlm, monkeypatch):
    broken = [item.question.text for item in benchmark("open", 0, 6)][4]
    real = vlm.generate_batch

    def generate_batch(requests, **kwargs):
        if any(request.question == broken for request in requests):
            raise RuntimeError("out of memory")
        return real(requests, **kwargs)

    expected = run_task(vlm, settings())
    monkeypatch.setattr(vlm, "generate_batch", generate_batch)
    run = run_task(vlm, settings())
    assert run.failures == ["RuntimeError: out of memory"]
    assert run.scores == [*expected.scores[:4], 0, *expected.scores[5:]]
    assert len(run.flops_fracs) == run.plans.counts.total() == 5
    assert len(run.prompt_tokens) == len(run.last_layer_tokens) == 5


def test_a_failed_batch_holds_no_memory_while_its_halves_are_tried(vlm, monkeypatch):
    class Inputs:
        pass

    held = []

    def generate_batch(requests, **kwargs):
        inputs = Inputs()
        assert [one() for one in held] == [None] * len(held), "what failed before is still there"
        held.append(weakref.ref(inputs))
        raise RuntimeError("out of memory")

    monkeypatch.setattr(vlm, "generate_batch", generate_batch)
    told = Answering(vlm, None, "")([Request("how many ?")] * 4, {})
    assert len(held) == 7 and [str(error) for error in told] == ["out of memory"] * 4


def test_a_broken_model_is_an_error_and_no_zero(vlm, monkeypatch):
    def generate_batch(requests, **kwargs):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(vlm, "generate_batch", generate_batch)
    with pytest.raises(RuntimeError, match="no kernel image"):
        run_task(vlm, settings())


def test_decoding_is_greedy_whatever_the_checkpoint_says(vlm, monkeypatch):
    seen = {}
    real = vlm.generate_batch
    monkeypatch.setattr(vlm, "generate_batch", lambda r, **kwargs: seen.update(kwargs) or real(r, **kwargs))
    run_task(vlm, settings(limit=1))
    assert (seen["do_sample"], seen["num_beams"]) == (False, 1)
    assert seen["max_new_tokens"] == minibench.max_new_tokens(vlm, "open") == 3


@pytest.mark.parametrize("variant", ["L", "H"])
def test_plan_counts(variant):
    config = AdaptiveConfig(variant, 4, 4, 4, 32, 2, 2)
    gates = torch.ones(3, 4, 2, 4, dtype=torch.bool)
    gates[1, 3] = False  # the other two rows run everything
    counts = PlanCounts.for_config(config)
    for plan in ExecutionPlan(gates, config):
        counts.add(plan)
    statistics = counts.statistics()
    assert (statistics["distinct"], statistics["top_share"]) == (2, pytest.approx(2 / 3))
    assert statistics["layer_on_frac"] == [1, 0.6667]
    assert PlanCounts.from_dict(counts.to_dict()) == counts
    assert (counts + counts).counts.total() == 6
    if variant == "H":
        assert np.shape(statistics["column_on_frac"]) == (2, 2, 4)
    else:
        assert "column_on_frac" not in statistics


def test_plan_counts_of_thousands():
    counts = PlanCounts((6,), Counter({"fc": 1000, "00": 3000}))  # more than a byte holds
    assert counts.statistics() == {"distinct": 2, "top_share": 0.75, "layer_on_frac": [0.25] * 6}
