"""The governor: with made-up times, who gets how much of the model, and who is refused."""

import time

import pytest

from adallava.budget import Budget
from adallava.cost.work import DECODE, PREFILL
from adallava.errors import BudgetError, ConfigError
from adallava.hosts.prompts import Request, to_prompt
from adallava.hosts.stepping import prepare
from adallava.serving import engine as engine_module
from adallava.serving import governor as module
from adallava.serving.engine import Engine
from adallava.serving.governor import Governor
from adallava.serving.jobs import Job, Limits, OverloadedError
from adallava.serving.speech import Sampling
from test_hosts_profiles import WIDE, profile_of, stage
from tiny import tiny_vlm

FIRST, EACH = 100.0, 10.0
"""Milliseconds of a prefill with nothing on, and of each layer that is on; bounds are 1.25 times as much."""
STEP = 2.0


@pytest.fixture
def vlm():
    made = tiny_vlm()
    prefill, decode = stage(PREFILL, FIRST, EACH, WIDE), stage(DECODE, STEP, 0.0, WIDE)
    made.profiles.use(profile_of(made, prefill=prefill, decode=decode), correct=False)
    return made


def job(vlm, ago_ms=0.0, **more):
    made = Job(to_prompt(Request("what is there ?")), Sampling(more.pop("tokens", 8)), lambda event: None, **more)
    made.prepared = prepare(vlm, made.prompt, made.sampling.max_new_tokens)
    made.arrived = time.perf_counter() - ago_ms / 1e3
    return made


def bound(k):
    return 1.25 * (FIRST + k * EACH)


def k_of(governor, decision):
    return decision.budget.resolve(governor.config).k


def test_alone_a_request_gets_what_the_objective_allows(vlm):
    for k in (0, 1, 2, 3):
        governor = Governor(vlm, bound(k) + 5)
        assert k_of(governor, governor.decide(job(vlm), [], 0)) == k
    assert k_of(governor := Governor(vlm, 1000.0), governor.decide(job(vlm), [], 0)) == 3
    late = Governor(vlm, 50.0).decide(job(vlm), [], 0)
    assert late.remark.startswith("late: k = 0")


def test_those_who_wait_get_their_share(vlm, monkeypatch):
    monkeypatch.setattr(module, "_RESERVE", 0.0)
    governor = Governor(vlm, 2.5 * bound(3))
    assert k_of(governor, governor.decide(job(vlm), [job(vlm)], 0)) == 3
    governor = Governor(vlm, 2 * bound(1) + 5)
    assert k_of(governor, governor.decide(job(vlm), [job(vlm)], 0)) == 1
    assert k_of(governor, governor.decide(job(vlm), [job(vlm, ago_ms=30)], 0)) == 0
    assert k_of(governor, governor.decide(job(vlm, ago_ms=30), [], 0)) == 3
    # A part of the objective is for those who are about to come.
    monkeypatch.setattr(module, "_RESERVE", 0.1)
    governor = Governor(vlm, 2 * bound(3) + 5)
    assert k_of(governor, governor.decide(job(vlm), [job(vlm)], 0)) < 3
    # Between two prefills everybody who decodes has a step.
    tight = Governor(vlm, bound(2) + 1)
    assert [k_of(tight, tight.decide(job(vlm), [], rows)) for rows in (0, 4)] == [2, 1]


def test_a_rate_that_could_not_be_kept_up_gets_less(vlm):
    governor = Governor(vlm, 10_000.0)
    now = time.perf_counter()
    each = 1.05 * FIRST / module._MOST_BUSY / 1e3  # of which the busy part is between k = 0 and k = 1
    for number in range(9):
        governor.arrived(now - (8 - number) * each)
    assert governor.rate == pytest.approx(1 / each, rel=0.2)
    assert k_of(governor, governor.decide(job(vlm), [], 0)) == 0
    for _ in range(32):
        governor.arrived(now - 100)
    assert k_of(governor, governor.decide(job(vlm), [], 0)) == 3


def test_what_goes_by_beside_the_model_is_learned(vlm):
    governor = Governor(vlm, 10_000.0)
    for number in range(module._CYCLES):
        assert (governor.drag == 1.0) == (number < module._FEW)
        governor.decide(job(vlm), [], 1)
        # Half as long again as prefill and step are foretold, but for one pause.
        governor.passed(1.5 * (FIRST + 3 * EACH + STEP) if number != 7 else 60_000.0)
    assert governor.drag == pytest.approx(1.5)
    objective = 2 * bound(0) + 2 * STEP
    assert Governor(vlm, objective).wait_ms(job(vlm), [job(vlm)], 1) <= 30
    governor.objective_ms = objective
    assert governor.wait_ms(job(vlm), [job(vlm)], 1) == pytest.approx(0.5 * objective, abs=30)
    governor.decide(job(vlm), [], 1)
    governor.passed(1.5 * (FIRST + 3 * EACH + STEP))
    assert governor.drag == pytest.approx(1.5), "what was learned is not learned again on top"
    for _ in range(module._CYCLES):
        governor.decide(job(vlm), [], 0)  # alone: taken in any case, and a slow hour is forgotten
        governor.passed(60_000.0)
    assert governor.drag == 1.0


def test_what_was_asked_for_is_given(vlm):
    governor = Governor(vlm, bound(0))
    decided = governor.decide(job(vlm, budget=Budget.parse("100%")), [job(vlm)] * 5, 3)
    assert decided.budget == Budget.parse("100%") and decided.new_tokens == 8


def test_a_deadline_decides_on_layers_and_tokens(vlm):
    governor = Governor(vlm)
    each = 1.25 * STEP
    whole = job(vlm, deadline_ms=bound(3) + 8 * each + 5)
    assert (k_of(governor, made := governor.decide(whole, [], 0)), made.new_tokens) == (3, 8)
    less = job(vlm, deadline_ms=bound(1) + 8 * each + 5)
    assert (k_of(governor, made := governor.decide(less, [], 0)), made.new_tokens) == (1, 8)
    short = job(vlm, deadline_ms=bound(0) + 3 * each + 1)
    decided = governor.decide(short, [], 0)
    assert (k_of(governor, decided), decided.new_tokens) == (0, 4)
    assert decided.remark == "at most 4 of 8 tokens fit the deadline"
    with pytest.raises(BudgetError, match="deadline_ms 20 is infeasible: the minimum is 12[5-9] ms"):
        governor.check(job(vlm, deadline_ms=20.0))


def test_who_cannot_be_in_time_is_refused(vlm):
    engine = Engine(vlm, objective_ms=2 * bound(0) + 20)
    made = [Job(to_prompt(Request("what is there ?")), Sampling(4), lambda event: None) for _ in range(3)]
    engine.submit(made[0])
    engine.submit(made[1])
    with pytest.raises(OverloadedError, match="after the objective") as refused:
        engine.submit(made[2])
    assert 0 < refused.value.retry_after_s < 1


def test_objectives_that_cannot_be(vlm, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="objective is 0"):
        Governor(vlm, 0)
    monkeypatch.setenv("ADALLAVA_PROFILES", str(tmp_path))
    from adallava.errors import ProfileError

    with pytest.raises(ProfileError, match="calibrate"):
        Governor(tiny_vlm(), 100.0)


def test_those_with_budgets_of_their_own_are_not_held_to_the_objective(vlm):
    governor = Governor(vlm, 4 * bound(3))
    old = job(vlm, ago_ms=10 * bound(3), budget=Budget.parse("100%"))
    assert k_of(governor, governor.decide(job(vlm), [], 0)) == 3
    monopoly = governor.decide(job(vlm), [old], 0)
    assert k_of(governor, monopoly) == 3, monopoly.remark
    # Before it they count for what they are.
    own, least = (governor.wait_ms(job(vlm), [job(vlm, budget=Budget.parse(b))], 0) for b in ("100%", "50%"))
    assert own - least == pytest.approx(bound(3) - bound(0), abs=5)


def test_a_deadline_that_has_passed_in_the_queue_gets_a_token(vlm):
    governor = Governor(vlm)
    decision = governor.decide(job(vlm, ago_ms=1000, deadline_ms=500), [], 0)
    assert (k_of(governor, decision), decision.new_tokens) == (0, 1) and decision.remark.startswith("late")


def test_who_comes_to_an_idle_server_is_taken_whatever_is_expected(vlm):
    """Else a governor that has seen a slow moment would refuse everybody, and never see that it is over."""
    engine = Engine(vlm, objective_ms=1.0)
    made = [Job(to_prompt(Request("what is there ?")), Sampling(4), lambda event: None) for _ in range(2)]
    engine.submit(made[0])
    with pytest.raises(OverloadedError, match="after the objective"):
        engine.submit(made[1])


def test_a_full_queue_refuses_before_any_work(vlm, monkeypatch):
    engine = Engine(vlm, Limits(queue=1))
    made = [Job(to_prompt(Request("hi ?")), Sampling(4), lambda event: None, Budget.parse("100%")) for _ in range(2)]
    engine.submit(made[0])
    monkeypatch.setattr(engine_module, "prepare", None)  # which nobody may call
    with pytest.raises(OverloadedError, match="1 requests are waiting"):
        engine.submit(made[1])
