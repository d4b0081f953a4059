"""The engine: requests that share its steps get what they would get alone; what goes wrong with one stays with it."""

import threading
import time
from dataclasses import replace

import pytest
import torch

from adallava.budget import Budget
from adallava.errors import BudgetError, ConfigError, PromptError
from adallava.hosts.prompts import Request, to_prompt
from adallava.hosts.stepping import prepare
from adallava.mini.questions import DESCRIBE
from adallava.mini.scenes import sample_scene, to_image
from adallava.serving.engine import Engine
from adallava.serving.jobs import Begun, Ended, Failed, Job, Limits, OverloadedError, Said, StoppedError
from adallava.serving.speech import Sampling, Speech
from matrix import requests
from tiny import tiny_vlm

WAIT = 60


class Told:
    """A sink that keeps everything, and can be waited for."""

    def __init__(self, on_event=None):
        self.events, self.over, self.on_event = [], threading.Event(), on_event

    def __call__(self, event):
        self.events.append(event)
        if self.on_event is not None:
            self.on_event(event)
        if isinstance(event, Ended | Failed):
            self.over.set()

    def end(self):
        assert self.over.wait(WAIT), f"it did not end: {self.events}"
        return self.events[-1]

    @property
    def begun(self):
        return next(event for event in self.events if isinstance(event, Begun))

    @property
    def text(self):
        return "".join(event.text for event in self.events if isinstance(event, Said))


def job(request, told, **more):
    sampling = Sampling(**{"max_new_tokens": 6, **more})
    return Job(to_prompt(request), sampling, told, Budget.parse(request.budget))


def ask(engine, request, **more):
    told = Told()
    engine.submit(job(request, told, **more))
    return told


def mini_requests(count):
    budgets = ("100%", "85%", "70%", "60%", "50%")
    pictures = [to_image(sample_scene("test", 7, i)) for i in range(count)]
    words = ("How many sevens are there?", "what is there ?", "What color is the star?")
    return [Request(words[i % 3], pictures[i], budget=budgets[i % 5]) for i in range(count)]


@pytest.fixture(scope="module", params=["mini-L", "mini-H"])
def mini(request):
    from adallava.hosts.model import AdaptiveVLM

    return AdaptiveVLM.from_pretrained(request.param, dtype=torch.float32)


def test_requests_together_answer_as_alone(mini):
    asked = mini_requests(9)
    with Engine(mini, Limits(rows=4)) as engine:
        told = [ask(engine, request, max_new_tokens=24) for request in asked]
        ends = [one.end() for one in told]
    for request, one, end in zip(asked, told, ends, strict=True):
        alone = mini.generate_batch([request], max_new_tokens=24)[0]
        assert isinstance(end, Ended) and end.text == alone.text == one.text
        assert one.begun.plan == alone.plan and one.begun.cost == alone.cost
        assert one.begun.prompt_tokens == alone.prompt_tokens
        assert 0 <= one.begun.queue_ms <= one.begun.first_token_ms <= end.total_ms
    assert engine.load.decoding == engine.load.kv_bytes == 0


@pytest.mark.parametrize("variant", ["L", "H"])
def test_any_host_can_be_served(variant):
    for host in ("llava-gqa", "qwen2-vl", "paligemma"):
        vlm = tiny_vlm(host, variant)
        with Engine(vlm) as engine:
            told = [ask(engine, request) for request in requests(host)]
            assert all(isinstance(one.end(), Ended) for one in told)


def test_earlier_deadlines_go_first(mini, monkeypatch):
    order = []
    engine = Engine(mini, Limits(rows=1))
    wanted = {"none": None, "late": 90_000.0, "soon": 10_000.0}
    for name, within in wanted.items():
        told = Told(lambda event, name=name: order.append(name) if isinstance(event, Begun) else None)
        one = job(mini_requests(1)[0], told)
        # A time that no device profile is needed for, because the order is all that it is for here.
        monkeypatch.setattr(engine, "_due", lambda one, within=within: one.arrived + (within or 120_000.0) / 1e3)
        engine.submit(one)
    with engine:
        deadline = time.monotonic() + WAIT
        while len(order) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert order == ["soon", "late", "none"]


def test_the_queue_and_memory_are_bounded(mini):
    request = mini_requests(1)[0]
    engine = Engine(mini, Limits(rows=1, queue=2))
    ask(engine, request), ask(engine, request)
    with pytest.raises(OverloadedError, match="2 requests are waiting") as refused:
        ask(engine, request)
    assert refused.value.retry_after_s >= 1
    small = Engine(mini, Limits(kv_bytes=1000))
    with pytest.raises(PromptError, match="would not fit this server's 1,000 bytes"):
        ask(small, request)
    with pytest.raises(PromptError, match="this server allows 50"):
        ask(Engine(mini, Limits(prompt_tokens=50)), request)
    with pytest.raises(PromptError, match="this server allows 4"):
        ask(Engine(mini, Limits(new_tokens=4)), request)
    # Room for one and a half: they go one after the other, and both come to an end.
    one = engine._reserved(engine._queue[0][-1])
    most = []
    with Engine(mini, Limits(kv_bytes=one * 3 // 2)) as narrow:
        narrow.on_step = lambda rows, ms: most.append(rows)
        told = [ask(narrow, request, max_new_tokens=6) for _ in range(3)]
        assert all(isinstance(each.end(), Ended) for each in told)
    assert max(most, default=1) == 1


def test_a_batch_is_reserved_as_long_as_its_longest_row(mini):
    engine, reserved = Engine(mini, Limits()), []
    engine._ends = frozenset()  # all answers are as long as they may be
    engine.on_step = lambda rows, ms: reserved.append((rows, engine.load.kv_bytes, held_by(engine)))
    asked = [Request("star " * words, budget="100%") for words in (150, 5, 5, 5)]
    told = [ask(engine, each, max_new_tokens=9, temperature=2.0, seed=n) for n, each in enumerate(asked)]
    with engine:
        for each in told:
            each.end()
    assert max(rows for rows, *_ in reserved) >= 2
    assert all(held <= kept for _, kept, held in reserved), "what is reserved is never less than what is held"


def held_by(engine):
    """Bytes of keys and values of the tokens in the batch, without room for those to come."""
    return sum(
        layer.keys.nbytes + layer.values.nbytes for layer in engine._joined.cache.layers if layer.keys is not None
    )


def test_whoever_left_the_queue_frees_their_place(mini):
    request = mini_requests(1)[0]
    engine = Engine(mini, Limits(queue=2))
    gone = [job(request, Told()) for _ in range(2)]
    for each in gone:
        engine.submit(each)
    gone[1].cancel()  # not the first of the queue
    ask(engine, request)
    assert isinstance(gone[1].sink.events[-1].error, InterruptedError)
    assert engine.load.waiting == 2


def test_an_engine_that_fails_leaves_nobody_waiting(mini, monkeypatch):
    with Engine(mini, Limits()) as engine:
        monkeypatch.setattr(engine, "_leave", lambda: 1 / 0)
        told = [ask(engine, request) for request in mini_requests(3)[:1]]
        assert isinstance(told[0].end().error, ZeroDivisionError)
        engine._thread.join(WAIT)
        assert not engine.alive
        with pytest.raises(StoppedError):
            ask(engine, mini_requests(1)[0])


def test_a_temperature_near_zero_takes_the_likeliest():
    speech = Speech(Sampling(temperature=5e-38), lambda tokens: "", frozenset())
    assert speech.choose(torch.tensor([1.0, 20.0, 19.0])) == 1


def test_what_is_cancelled_or_late_makes_room(mini):
    asked = mini_requests(3)
    with Engine(mini, Limits(rows=1)) as engine:
        first = Told()
        gone = job(asked[0], first, max_new_tokens=1000)
        gone.sampling = Sampling(1000, temperature=2.0, seed=1)
        first.on_event = lambda event: gone.cancel() if isinstance(event, Begun) else None
        engine.submit(gone)
        second = ask(engine, asked[1])
        assert isinstance(first.end().error, InterruptedError)
        assert isinstance(second.end(), Ended)
    slow = Engine(mini, Limits(timeout_s=0.05))
    waited = ask(slow, asked[2])
    time.sleep(0.1)
    with slow:
        assert isinstance(waited.end().error, TimeoutError)


def test_a_step_that_fails_costs_only_who_was_in_it(mini, monkeypatch):
    from adallava.serving import engine as module

    asked = [replace(request, question=DESCRIBE) for request in mini_requests(4)]
    real, failed = module.step, []

    def step(vlm, joined, tokens):
        if len(tokens) > 1 and not failed:
            failed.append(len(tokens))
            raise RuntimeError("out of memory")
        return real(vlm, joined, tokens)

    monkeypatch.setattr(module, "step", step)
    engine = Engine(mini, Limits(rows=2))
    told = [ask(engine, request, max_new_tokens=8) for request in asked]
    with engine:
        ends = [one.end() for one in told]
        again = ask(engine, asked[0]).end()
    lost = [end for end in ends if isinstance(end, Failed)]
    assert 1 <= len(lost) <= 2 and all("out of memory" in str(end.error) for end in lost)
    assert isinstance(again, Ended)


def test_a_prefill_that_fails_costs_only_its_own(mini, monkeypatch):
    from adallava.serving import engine as module

    asked, real = mini_requests(3), module.start

    def start(vlm, prepared, budget, elapsed):
        if budget == Budget.parse("85%"):
            raise RuntimeError("broken")
        return real(vlm, prepared, budget, elapsed)

    monkeypatch.setattr(module, "start", start)
    with Engine(mini) as engine:
        ends = [one.end() for one in [ask(engine, request) for request in asked]]
    assert [isinstance(end, Failed) for end in ends] == [False, True, False]


@pytest.mark.parametrize("finish", [True, False])
def test_stopping_ends_everything(mini, finish):
    engine = Engine(mini, Limits(rows=2))
    told = [ask(engine, request, max_new_tokens=12) for request in mini_requests(6)]
    engine.start()
    engine.stop(finish=finish)
    ends = [one.end() for one in told]
    if finish:
        assert all(isinstance(end, Ended) for end in ends)
    else:
        assert any(isinstance(end, Failed) and isinstance(end.error, StoppedError) for end in ends)
    assert not engine.alive
    with pytest.raises(StoppedError):
        ask(engine, mini_requests(1)[0])


def test_budgets_that_cannot_be_are_refused_at_once(mini, tmp_path, monkeypatch):
    monkeypatch.setenv("ADALLAVA_PROFILES", str(tmp_path))
    engine, request = Engine(mini), mini_requests(1)[0]
    with pytest.raises(BudgetError, match="minimum"):
        ask(engine, Request(request.question, request.images, budget="10%"))
    with pytest.raises(BudgetError, match="no objective"):
        engine.submit(Job(to_prompt(request), Sampling(), Told()))
    assert engine.load.waiting == 0


def test_a_base_model_is_not_served():
    from adallava.hosts.model import AdaptiveVLM

    with pytest.raises(ConfigError, match="base model"):
        Engine(AdaptiveVLM.from_pretrained("mini-base"))


# -- one answer -------------------------------------------------------------------------------------------------------


def speak(pieces, **options):
    """An answer whose tokens are numbers of pieces of text; what was shown after each, and the answer."""
    speech = Speech(Sampling(**options), lambda tokens: "".join(pieces[token] for token in tokens), frozenset({99}))
    shown = []
    for token in [*range(len(pieces)), 99]:
        shown.append(speech.say(token))
        if speech.finish_reason is not None:
            break
    assert "".join(shown) == speech.text
    return shown, speech


def test_text_is_shown_when_it_is_certain():
    shown, speech = speak(["one", " two", "\N{REPLACEMENT CHARACTER}", " three"])
    assert shown[:3] == ["one", " two", ""] and speech.finish_reason == "stop"
    shown, speech = speak(["a ", "EN", "D", " b"], stop=("END",))
    assert (speech.text, speech.finish_reason) == ("a", "stop") and "E" not in "".join(shown)
    shown, speech = speak(["a E", "N", "x"], stop=("END",))
    assert speech.text == "a ENx" and shown[0] in ("a", "a ")
    _, speech = speak(["a", " b", " c"], max_new_tokens=2)
    assert (speech.text, speech.finish_reason) == ("a b", "length")


def test_tokens_are_drawn_as_asked():
    logits = torch.tensor([3.0, 2.9, -1.0, -50.0])

    def draw(count=200, **options):
        speech = Speech(Sampling(**options), str, frozenset())
        return [speech.choose(logits) for _ in range(count)]

    assert set(draw()) == {0}
    assert draw(temperature=1.0, seed=5) == draw(temperature=1.0, seed=5) != draw(temperature=1.0, seed=6)
    assert {0, 1} <= set(draw(temperature=1.0, seed=1)) <= {0, 1, 2}
    assert set(draw(temperature=1.0, top_p=0.9, seed=1)) == {0, 1}
    assert set(draw(temperature=1.0, top_p=0.1, seed=1)) == {0}


@pytest.mark.parametrize("wrong", [{"max_new_tokens": 0}, {"temperature": 3}, {"top_p": 0}, {"stop": ("",)}])
def test_sampling_that_cannot_be(wrong):
    with pytest.raises(PromptError, match=next(iter(wrong)).replace("new_", "")):
        Sampling(**wrong)


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"timeout_s": -1}, {"queue": "many"}])
def test_limits_that_cannot_be(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Limits(**wrong)


def test_only_the_engine_computes_on_several_threads(monkeypatch):
    before, vlm, seen = torch.get_num_threads(), tiny_vlm(), {}

    def preparing(*args):
        seen["prepare"] = torch.get_num_threads()
        return prepare(*args)

    monkeypatch.setattr("adallava.serving.engine.prepare", preparing)
    vlm.model.register_forward_pre_hook(lambda *_: seen.setdefault("prefill", torch.get_num_threads()))
    torch.set_num_threads(3)
    try:
        with Engine(vlm) as engine:
            ask(engine, requests("llava")[0]).end()
        assert seen == {"prepare": 1, "prefill": 3}
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
