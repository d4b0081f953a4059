"""Budgets in milliseconds on real (tiny) models, with profiles made up so that every time is known beforehand."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig

from adallava.budget import Budget
from adallava.cost.calibration import DeviceProfile, Measured, Measurement, StageModel
from adallava.cost.forecast import Forecaster
from adallava.cost.work import DECODE, PREFILL, TAIL, prefill_work
from adallava.errors import BudgetError, ImageError, ProfileError, ResultExistsError
from adallava.evaluation.samples import SampleFile
from adallava.hosts import model
from adallava.hosts.answer import Stopwatch
from adallava.hosts.budgets import Batch, Looks, how_often
from adallava.hosts.model import AdaptiveVLM, Request
from adallava.hosts.profiles import FOLDER_VARIABLE, fingerprint, profile_path
from adallava.hosts.threads import CoreMeter
from matrix import IMAGES, options
from tiny import processor, tiny_base, tiny_vlm

QUESTION = "how many sevens are there ?"
# A day's time for the prefix and an hour for each layer on: what requests here really take changes nothing.
FIRST, EACH = 86_400_000.0, 3_600_000.0
WIDE = {"tokens": (1, 10_000), "rows": (1, 8), "images": (0, 8)}


def stage(names, fixed, each, extent=WIDE):
    coefficients = {name: {"fixed": fixed, "layer on": each}.get(name, 0.0) for name in names}
    return StageModel(coefficients, (), (1.25,), extent, 20, 20, 0.02)


def profile_of(vlm, **changes):
    made = DeviceProfile("tiny", fingerprint(vlm), stage(PREFILL, FIRST, EACH), None, stage(DECODE, 100.0, 10.0))
    return replace(made, **changes)


@pytest.fixture
def vlm(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(CoreMeter, "others", lambda self: 0.0)  # whatever else runs beside the tests
    made = tiny_vlm()
    made.profiles.use(profile_of(made))
    return made


def upper(k):
    return 1.25 * (FIRST + k * EACH)


def ask(vlm, budget, **more):
    return vlm.generate(IMAGES[0], QUESTION, budget=budget, **options("llava", **more))


@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_the_largest_k_whose_bound_fits(vlm, k):
    answer = ask(vlm, f"{upper(k) + 60_000} ms")  # a minute for the preparation, which counts too
    assert answer.budget.k == answer.plan.k[0] == k
    assert answer.budget.forecast.ms == pytest.approx(FIRST + k * EACH, abs=60_000)
    assert answer.budget.forecast.upper_ms == pytest.approx(upper(k), abs=60_000)
    assert answer.budget.forecast.remark is None
    if k:
        assert ask(vlm, f"{upper(k) - 1} ms").budget.k == k - 1


@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_time_per_token(vlm, k):
    answer = ask(vlm, f"{1.25 * (100 + 10 * k) + 0.001:.3f} ms/token")
    assert answer.budget.k == answer.plan.k[0] == k
    assert answer.budget.forecast.ms == pytest.approx(100 + 10 * k)
    assert str(answer.budget.budget).endswith("ms/token")


def test_what_is_infeasible_names_the_minimum(vlm):
    with pytest.raises(BudgetError, match=r"budget 80 ms is infeasible: the minimum on this device for this input is"):
        ask(vlm, "80 ms")
    with pytest.raises(BudgetError, match=r"is 130 ms/token \(3 of 6 layers always run; 74 tokens\). Ask for at least"):
        ask(vlm, "80 ms/token")
    named = r"2 requests together, \d+ tokens"
    with pytest.raises(BudgetError, match=named):
        vlm.generate_batch([Request(QUESTION, IMAGES[0], budget="80 ms"), Request(QUESTION)], **options("llava"))


def test_asking_for_the_named_minimum_is_enough(vlm):
    for unit in ("ms", "ms/token"):
        with pytest.raises(BudgetError) as caught:
            ask(vlm, f"80 {unit}")
        least = str(caught.value).split("Ask for at least '")[1].split("'")[0]
        assert ask(vlm, least).budget.k == 0


def test_a_base_model_runs_whole_or_not_at_all():
    base = AdaptiveVLM(tiny_base(), processor())
    base.profiles.use(profile_of(base))
    assert ask(base, f"{upper(0) + 60_000} ms").budget is None
    with pytest.raises(BudgetError, match="a base model always runs whole"):
        ask(base, "1 s")


def test_a_batch_gets_one_k_that_keeps_all_its_times_and_leaves_shares_alone(vlm):
    budgets = ["60%", f"{upper(3) + 60_000} ms", f"{upper(2) + 60_000} ms", "50%"]
    requests = [Request(QUESTION, IMAGES[i % 3], budget=b) for i, b in enumerate(budgets)]
    answers = vlm.generate_batch(requests, **options("llava"))
    # Two rows with two layers each would touch 3 * (1 - 1/9) layers, more than the third budget pays for.
    assert [answer.budget.k for answer in answers] == [0, 1, 1, 0]
    assert answers[0].budget.forecast is None
    for row in (1, 2):
        assert answers[row].budget.forecast.ms == pytest.approx(FIRST + 5 / 3 * EACH, abs=60_000)
    requests[0] = Request(QUESTION, IMAGES[0], budget="100%")
    with pytest.raises(BudgetError, match="is infeasible.*4 requests together"):
        vlm.generate_batch(requests, **options("llava"))


def test_the_time_that_went_by_before_counts():
    vlm = tiny_vlm()
    clock = Forecaster(profile_of(vlm))
    budget = Budget.parse(f"{upper(2) + 1} ms")
    for elapsed, k in ((0.0, 2), (2.0, 1), (1.25 * EACH, 1), (1.25 * EACH + 2, 0)):
        batch = Batch([[20] * 6], images=1, elapsed_ms=elapsed)
        assert Looks([budget], vlm.adaptive_config, vlm.spec, batch, clock).resolved[0].k == k


@pytest.mark.parametrize("again", [False, True])
def test_one_slow_request_refuses_nobody_on_a_device_quicker_than_its_profile(vlm, again):
    """Who is refused teaches nothing, so that it would stay so."""
    stages = {"prefill": stage(PREFILL, BEFORE + HEAD, EACH), "tail": stage(TAIL, HEAD, EACH) if again else None}
    clock = Forecaster(profile_of(vlm, **stages))
    batch, work = Batch([[20] * 6], images=1), prefill_work(vlm.adaptive_config, [[20] * 6], [0], 1)
    least = clock.prefill(work)
    for share in (0.5,) * 8 + (1.5,):
        clock.observe(Measured(Measurement(work, share * least.ms)))
    budget = Budget.parse(f"{0.8 * least.upper_ms} ms")
    looks = Looks([budget], vlm.adaptive_config, vlm.spec, batch, clock, often="each layer")
    assert looks.resolved[0].forecast.remark is None


def test_a_busy_device_gets_the_least_and_a_remark_and_recovers(vlm):
    clock = Forecaster(vlm.profiles.get(vlm, vlm.token_selection, "").profile)
    batch = Batch([[20] * 6], images=1)

    def resolve():
        budgets = [Budget.parse(f"{upper(3) + 1} ms")]
        return Looks(budgets, vlm.adaptive_config, vlm.spec, batch, clock).resolved[0]

    work = prefill_work(vlm.adaptive_config, batch.lengths, [3], 1)
    assert resolve().k == 3
    for _ in range(8):
        clock.observe(Measured(Measurement(work, 3 * clock.profile.prefill.predict_ms(work))))
    assert resolve().k == 0
    remark = resolve().forecast.remark
    assert "takes 3.0 times as long" in remark and remark.endswith("the budget may be exceeded")
    for _ in range(30):
        clock.observe(Measured(Measurement(work, clock.profile.prefill.predict_ms(work))))
    assert (resolve().k, resolve().forecast.remark) == (3, None)


BEFORE, HEAD = 3.5 * EACH, 0.5 * EACH  # until the plan is decided, and after the last layer
BUDGET = BEFORE + 1.25 * (HEAD + 2.5 * EACH)  # for two layers and a half; for one, by the bound of the whole prefill


@pytest.fixture
def looking_twice(vlm, monkeypatch):
    """A model of which it is told how long the prefix took: whatever ``passed["ms"]`` says."""
    stages = {"prefill": stage(PREFILL, BEFORE + HEAD, EACH), "tail": stage(TAIL, HEAD, EACH)}
    vlm.profiles.use(profile_of(vlm, **stages))
    passed = {"ms": BEFORE}
    monkeypatch.setattr(Stopwatch, "decided", lambda self: passed["ms"])
    monkeypatch.setattr(model, "how_often", lambda device, mode: "twice")
    vlm.passed = passed
    return vlm


@pytest.mark.parametrize(
    ("late_ms", "k", "remark"),
    [(0.0, 2, None), (-2 * EACH, 3, None), (1.5 * EACH, 1, None), (9 * EACH, 0, "the budget may be exceeded")],
)
def test_k_is_what_is_left_when_the_prefix_has_run(looking_twice, late_ms, k, remark):
    vlm = looking_twice
    vlm.passed["ms"] += late_ms
    answer = ask(vlm, f"{BUDGET} ms")
    assert (answer.budget.k, answer.plan.k[0]) == (k, k)
    assert answer.budget.forecast.ms == pytest.approx(vlm.passed["ms"] + HEAD + k * EACH)
    assert answer.budget.forecast.upper_ms == pytest.approx(vlm.passed["ms"] + 1.25 * (HEAD + k * EACH))
    assert answer.budget.forecast.remark == remark


def test_the_latency_token_says_what_is_likely_to_be_left(looking_twice, monkeypatch):
    vlm, said = looking_twice, []
    encode = vlm.scheduler.encode
    monkeypatch.setattr(vlm.scheduler, "encode", lambda k: said.append(k.tolist()) or encode(k))
    ask(vlm, f"{BUDGET} ms")
    ask(vlm, f"{10 * EACH} ms")
    ask(vlm, f"{1.25 * 4 * EACH + 60_000} ms")
    assert said == [[2], [3], [0]]


def test_a_second_look_leaves_shares_and_times_per_token_alone(looking_twice):
    vlm = looking_twice
    budgets = ["60%", f"{BUDGET} ms", "126 ms/token", "50%"]
    requests = [Request(QUESTION, IMAGES[i % 3], budget=b) for i, b in enumerate(budgets)]
    answers = vlm.generate_batch(requests, **options("llava"))
    assert [answer.budget.k for answer in answers] == [0, 0, 0, 0]
    assert answers[2].budget.forecast.ms == pytest.approx(100)
    requests[2] = Request(QUESTION, IMAGES[0], budget="1000 ms/token")
    vlm.passed["ms"] -= 10 * EACH
    assert [answer.budget.k for answer in vlm.generate_batch(requests, **options("llava"))] == [0, 3, 3, 0]


def test_a_plan_that_was_given_stays(looking_twice):
    vlm = looking_twice
    plan = ask(vlm, f"{8.8 * EACH} ms").plan
    vlm.passed["ms"] += 9 * EACH
    answer = ask(vlm, f"{8.8 * EACH} ms", plan=plan)
    assert (answer.plan, answer.budget.k) == (plan, 3)


def test_an_answer_after_a_second_look_is_that_of_its_k_with_the_token_of_the_first(looking_twice):
    vlm = looking_twice
    vlm.passed["ms"] -= 9 * EACH
    answer = ask(vlm, f"{BUDGET} ms")
    again = ask(vlm, "100%", plan=answer.plan)
    assert answer.plan.k[0] == 3  # all layers, whatever the token says
    assert again.cost == answer.cost
    assert answer.timing.decided_ms is None  # nobody noted when: the test told


class Clock:
    """A stopwatch that shows what it is told, one time after the other."""

    def __init__(self, *times):
        self.times = [time * EACH for time in times]

    def decided(self):
        return self.times.pop(0)

    passed_ms = decided


# Expected and bounded by, for 0 to 3 layers to come: 0.5, 1.5, 2.5, 3.5 and 0.625, 1.875, 3.125, 4.375, in layers.
@pytest.mark.parametrize(
    ("left", "asked", "late", "allowed"),
    [
        (4.4, 2, 0.0, [3, 2, 1]),  # time for everything, as foretold
        (4.15, 2, 0.0, [3, 2, 1]),  # likely so: the upper bound of two layers holds, and of the third the forecast
        (4.1, 3, 0.0, [2, 2, 1]),  # the last one was left out at first, and there is time for it
        (4.4, 3, 1.3, [3, 1, 0]),  # the first layer took longer
        (4.4, 3, 3.9, [3, 0, 0]),
        (1.9, 3, 0.0, [1, 0, 0]),
        (1.8, 1, 0.0, [0, 0, 0]),
        (0.5, 3, 0.0, [0, 0, 0]),  # too late for anything
    ],
)
def test_layers_to_come_make_up_for_those_that_ran(vlm, left, asked, late, allowed):
    """Each layer takes what it should, but for the first, which is late; of all that it may run, one runs at a time."""
    stages = {"prefill": stage(PREFILL, BEFORE + HEAD, EACH), "tail": stage(TAIL, HEAD, EACH)}
    clock = Forecaster(profile_of(vlm, **stages))
    decided, deciding = 7.9 - left, 0.2  # of the 0.5, which is over then
    first = decided + deciding + (allowed[0] > 0) + late
    watch = Clock(decided, decided + deciding, first, first + (allowed[1] > 0))
    budget = Budget.parse(f"{7.9 * EACH} ms")
    looks = Looks(
        [budget], vlm.adaptive_config, vlm.spec, Batch([[20] * 6], images=1), clock, watch, often="each layer"
    )
    told = [looks(3, [asked])[0]]
    promise = looks.resolved[0].forecast
    looks.decided()
    for layer in (4, 5):
        told.append(looks(layer, [max(0, told[-1] - 1)])[0])
    assert told == allowed
    assert looks.resolved[0].k == sum(each > 0 for each in allowed)
    assert looks.resolved[0].forecast == promise, "what was promised when the plan was decided stays"
    assert (promise.upper_ms <= budget.ms) == (promise.remark is None) == (left >= 0.625)


@pytest.fixture
def looking_often(looking_twice, monkeypatch):
    """The same model, looking before every layer, when it is as late as ``vlm.late["ms"]`` says."""
    late, calls = {"ms": 0.0}, []

    def passed_ms(watch):
        calls.append(watch)
        deciding = calls.count(watch) == 1
        return looking_twice.passed["ms"] + (0.0 if deciding else late["ms"])

    monkeypatch.setattr(model, "how_often", lambda device, mode: "each layer")
    monkeypatch.setattr(Stopwatch, "passed_ms", passed_ms)
    looking_twice.late, looking_twice.calls = late, calls
    return looking_twice


@pytest.mark.parametrize("late", [False, True])
def test_a_plan_follows_the_clock_layer_by_layer(looking_often, late):
    vlm = looking_often
    vlm.late["ms"] = 9 * EACH if late else -9 * EACH
    answer = ask(vlm, f"{BUDGET} ms", min_new_tokens=3)
    assert len(vlm.calls) == 3, "when it is decided, and before the two layers after that, of the prompt alone"
    assert answer.plan.layer_on[0, 4:].tolist() == [not late] * 2
    assert answer.budget.k == answer.plan.k[0]
    assert ask(vlm, "100%", plan=answer.plan).cost == answer.cost
    vlm.calls.clear()
    assert ask(vlm, "50%").plan.k == [0] and not vlm.calls, "a share needs no clock"


@pytest.mark.parametrize("other", [f"{BUDGET} ms", "1000 ms/token"])
def test_several_rows_with_budgets_in_time_keep_one_k(looking_often, other):
    vlm = looking_often
    vlm.late["ms"] = -9 * EACH
    requests = [Request(QUESTION, IMAGES[i], budget=b) for i, b in enumerate(["50%", f"{BUDGET} ms", other])]
    answers = vlm.generate_batch(requests, **options("llava"))
    assert not vlm.calls, "the clock is looked at when the plan is decided, and not layer by layer"
    assert answers[1].plan.k == answers[2].plan.k == [answers[1].budget.k] == [answers[2].budget.k]


def test_other_rows_keep_their_plans_layer_by_layer(looking_often):
    vlm = looking_often
    vlm.late["ms"] = 99 * EACH
    requests = [Request(QUESTION, IMAGES[i], budget=b) for i, b in enumerate(["83%", "100%", f"{20 * EACH} ms"])]
    answers = vlm.generate_batch(requests, **options("llava"))
    alone = [vlm.generate_batch([request], **options("llava"))[0] for request in requests[:2]]
    assert [answer.text for answer in answers[:2]] == [answer.text for answer in alone]
    assert [answer.plan for answer in answers[:2]] == [answer.plan for answer in alone]
    assert answers[2].plan.layer_on[0, 3:].tolist() == [True, False, False]
    assert answers[2].budget.k == answers[2].plan.k[0] == 1


def test_who_looks_how_often():
    cpu = torch.device("cpu")
    assert [how_often(cpu, mode) for mode in ("learned", "random", "static")] == ["each layer", "twice", "twice"]
    assert how_often(torch.device("cuda"), "learned") == "twice"


def test_an_input_outside_the_measured_range_is_flagged(vlm):
    narrow = {**WIDE, "images": (0, 1)}
    vlm.profiles.use(profile_of(vlm, prefill=stage(PREFILL, FIRST, EACH, narrow)))
    answer = vlm.generate(IMAGES, QUESTION, budget=f"{upper(3) + 60_000} ms", **options("llava"))
    assert answer.budget.forecast.remark == "outside the measured range: 3 images, measured 0 to 1"


def test_requests_teach_the_forecaster_and_shares_do_too(vlm):
    clock = vlm.profiles.get(vlm, vlm.token_selection, "")
    for _ in range(7):
        ask(vlm, "100%")
    assert clock.prefill(clock_work(vlm)).ms < 0.001 * FIRST  # a request takes no day
    assert clock.prefill(clock_work(vlm)).ms > 0


def test_what_was_foretold_is_told_beside_what_was_measured(vlm):
    vlm.profiles.use(profile_of(vlm), correct=False)
    full, less = ask(vlm, "100%", min_new_tokens=3).foretold, ask(vlm, f"{upper(1) + 60_000} ms", min_new_tokens=3)
    assert full.first_token.ms == pytest.approx(FIRST + 3 * EACH, abs=60_000)
    assert full.token.ms == pytest.approx(100 + 3 * 10)
    assert less.foretold.first_token.ms == pytest.approx(less.budget.forecast.ms, abs=60_000)
    assert less.foretold.token.ms == pytest.approx(100 + 10)
    assert ask(vlm, "100%", max_new_tokens=1).foretold.token is None
    assert ask(vlm, "100%", num_beams=2).foretold is None
    vlm.profiles.use(None)
    assert ask(vlm, "100%").foretold is None


def test_a_sample_file_has_both(vlm, tmp_path):
    vlm.profiles.use(profile_of(vlm), correct=False)
    file = SampleFile(tmp_path / "new" / "samples.jsonl", {"model": "tiny", "budget": "67%"})
    answer = ask(vlm, "67%", min_new_tokens=3)
    file.add({"task": "pope", "doc_id": 4}, answer, 2)
    file.add({"task": "pope", "doc_id": 5}, ImageError("no picture"), 2)
    good, bad = map(json.loads, file.path.read_text().splitlines())
    assert good["predicted_first_token_ms"] == pytest.approx(FIRST + EACH, abs=60_000)
    assert good["predicted_first_token_upper_ms"] == pytest.approx(upper(1), abs=60_000)
    assert good["predicted_ms_per_token"] == pytest.approx(100 + 10)
    assert good["first_token_ms"] == answer.timing.answered_ms and good["ms_per_token"] > 0
    assert good["layers_on"] == answer.plan.layer_on[0].nonzero().flatten().tolist()
    assert (good["k"], good["failed"], good["doc_id"], good["budget"], good["batch_rows"]) == (1, False, 4, "67%", 2)
    assert bad["error"] == "ImageError: no picture" and bad["failed"] and "text" not in bad
    with pytest.raises(ResultExistsError, match="name another"):
        SampleFile(file.path, {})


def clock_work(vlm):
    return prefill_work(vlm.adaptive_config, [[79] * 6], [3], 1)


@pytest.mark.parametrize(
    "more",
    [
        {"num_beams": 2},
        {"num_return_sequences": 2, "do_sample": True},
        {"generation_config": GenerationConfig(num_beams=2)},
    ],
)
def test_beams_have_no_time(vlm, more):
    with pytest.raises(BudgetError, match="with beams or several answers"):
        ask(vlm, "80 s", **more)
    assert ask(vlm, "100%", **more).text is not None


def test_nor_have_beams_that_the_model_itself_asks_for():
    vlm = tiny_vlm()
    vlm.profiles.use(profile_of(vlm))
    vlm.model.generation_config.num_beams = 2
    with pytest.raises(BudgetError, match="with beams or several answers"):
        ask(vlm, "80 s")


def test_without_a_profile_the_command_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "none"))
    with pytest.raises(ProfileError, match=r"budget 80 ms needs a device profile.*adallava calibrate MODEL.*'60%'"):
        ask(tiny_vlm(), "80 ms")


def test_a_kept_profile_is_found_and_refused_where_it_does_not_hold(vlm, monkeypatch):
    profile_of(vlm).save(profile_path(fingerprint(vlm)))
    fresh = tiny_vlm()
    assert ask(fresh, f"{upper(1) + 60_000} ms").budget.k == 1
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    with pytest.raises(ProfileError, match=f"threads was {threads}, now it is {threads + 1}"):
        ask(fresh, "80 s")
    with pytest.raises(ProfileError, match="threads was"):
        ask(tiny_vlm(), "80 s")


def test_a_profile_that_does_not_hold_foretells_nothing(vlm):
    vlm.profiles.use(None)
    other = profile_of(vlm, fingerprint={**fingerprint(vlm), "torch": "1.0"})
    other.save(profile_path(fingerprint(vlm)))
    with pytest.raises(ProfileError, match="torch"):
        ask(vlm, "80 s")
    assert ask(vlm, "100%").foretold is None


def test_a_profile_holds_for_one_token_selection(vlm):
    profile_of(vlm).save(profile_path(fingerprint(vlm)))
    fresh = tiny_vlm()
    with pytest.raises(ProfileError, match="needs a device profile of this model, and there is none at"):
        ask(fresh, "80 s", token_selection="fastv")
    fresh.profiles.use(profile_of(vlm))
    with pytest.raises(ProfileError, match="token selection was none, now it is fastv"):
        ask(fresh, "80 s", token_selection="fastv")
    fresh.token_selection = "uniform:count=5"
    fresh.profiles.use(profile_of(fresh))
    answer = ask(fresh, f"{upper(2) + 60_000} ms")
    assert (answer.budget.k, answer.timing.selection_ms > 0) == (2, True)


def test_models_of_other_sizes_or_switches_have_other_profiles():
    prints = [fingerprint(made)["model"] for made in (tiny_vlm(), tiny_vlm(variant="H"), tiny_vlm(layers=8))]
    assert len({*prints, fingerprint(AdaptiveVLM(tiny_base(), processor()))["model"]}) == 4
    assert fingerprint(tiny_vlm())["model"] == prints[0]
