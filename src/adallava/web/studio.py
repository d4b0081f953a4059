"""What the demo page does, without the page: foresee, answer, measure, and put a server under load.

One model at a time does one thing at a time: pages share the models, and times would mean nothing otherwise.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

import numpy as np
from PIL import Image

from adallava.bench.calibrate import CalibrationSettings, calibrate
from adallava.bench.load import OBJECTIVE_OVER_IDLE, Asked, capacity_of, idle_ms, poisson, questions, run
from adallava.budget import Budget, ResolvedBudget
from adallava.cost import Cost
from adallava.errors import AdaLlavaError, ConfigError, ProfileError
from adallava.hosts.load import load
from adallava.hosts.looking import look
from adallava.hosts.model import Request
from adallava.hosts.prompts import to_prompt
from adallava.hosts.stepping import prepare
from adallava.hosts.threads import apart, running_on
from adallava.plan import ExecutionPlan
from adallava.serving.engine import Engine
from adallava.serving.jobs import Begun, Ended, Event, Failed, Job, Said
from adallava.serving.speech import Sampling

LONGEST = 64
"""Tokens of an answer."""
CALIBRATION_SECONDS = 15.0
_EVERY_S = 0.5
_COMPARE_S, _MOST_ROUNDS = 2.0, 7


@dataclass(frozen=True)
class Foreseen:
    """What a budget buys for a picture and a question, before anything is answered."""

    plan: ExecutionPlan
    budget: ResolvedBudget
    cost: Cost
    attention: np.ndarray | None
    """[side, side], shares of the latency token's attention on the picture; None where patches make no square."""


@dataclass(frozen=True)
class Told:
    """An answer as it grows, and what was measured of it."""

    text: str
    begun: Begun | None = None
    ended: Ended | None = None


@dataclass(frozen=True)
class Times:
    """What was measured of a request's repetitions: medians, in ms."""

    repetitions: int
    first_ms: float
    before_ms: float
    """Of the first token's time, what went before the model: tokenizing, and the picture made ready."""
    whole_ms: float
    each_ms: float | None
    """Of a token after the first; None where there was none."""
    foretold_ms: float | None

    @classmethod
    def of(cls, told: Sequence[Told]) -> Times:
        """The medians of whole answers."""
        done = [(one.begun, one.ended) for one in told if one.begun is not None and one.ended is not None]
        each = [(e.total_ms - b.first_token_ms) / (e.new_tokens - 1) for b, e in done if e.new_tokens > 1]
        foretold = [b.predicted_ms for b, _ in done if b.predicted_ms is not None]
        return cls(
            len(done),
            median(b.first_token_ms for b, _ in done),
            median(b.queue_ms for b, _ in done),
            median(e.total_ms for _, e in done),
            median(each) if each else None,
            median(foretold) if foretold else None,
        )


@dataclass
class Strain:
    """One run of a server under load, as it goes."""

    policy: str
    objective_ms: float
    rate: float
    """Requests a second."""
    asked: Sequence[Asked] = field(default_factory=list)


class Studio:
    """The models of a page, loaded once."""

    def __init__(self, names: Sequence[str]) -> None:
        """Load the models; ``ConfigError`` for one without a scheduler."""
        self.models = apart(lambda: {name: load(name, token_selection="none") for name in dict.fromkeys(names)})
        for name, vlm in self.models.items():
            if vlm.adaptive_config is None:
                raise ConfigError(f"{name} is a base model, which has no budgets. Name adaptive ones, such as mini-L.")
        self._busy = threading.Lock()
        self._sustained: dict[str, tuple[float, float]] = {}

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._busy.acquire(timeout=60):
            raise ConfigError("another run is going on. Wait for it to end.")
        try:
            yield
        finally:
            self._busy.release()

    # -- budgets ------------------------------------------------------------------------------------------------------

    def least(self, name: str) -> float:
        """The smallest share that a model can run at."""
        return float(self.models[name].reachable_budgets()[0].fraction)

    def times(self, name: str, image: Image.Image, question: str) -> tuple[float, float] | None:
        """Milliseconds to the first token, foretold at the least and at all of the model; None if never measured."""
        vlm = self.models[name]
        if not self.calibrated(name):
            return None
        forecaster = vlm.profiles.get(vlm, vlm.token_selection, "in ms")
        assert vlm.adaptive_config is not None
        began = time.perf_counter()
        with running_on(1):
            prepared = prepare(vlm, to_prompt(Request(question, image)), LONGEST)
        elapsed = 1e3 * (time.perf_counter() - began)
        least, most = (
            forecaster.prefill(prepared.work(vlm, k), elapsed).upper_ms for k in (0, vlm.adaptive_config.max_k)
        )
        return least, most

    def calibrated(self, name: str) -> bool:
        """Whether budgets in milliseconds work."""
        vlm = self.models[name]
        try:
            vlm.profiles.get(vlm, vlm.token_selection, "in ms")
        except ProfileError:
            return False
        return True

    def calibrate(self, name: str, progress: Callable[[float], None] = lambda _: None) -> None:
        """Measure this device for a model, so that budgets in milliseconds work; the profile is kept."""
        with self._alone():
            settings = CalibrationSettings(CALIBRATION_SECONDS)
            apart(lambda: calibrate(self.models[name], name, settings, progress=progress))

    # -- one question -------------------------------------------------------------------------------------------------

    def foresee(self, name: str, image: Image.Image, question: str, budget: str) -> Foreseen:
        """Decide the plan, and see what the latency token looks at; ``BudgetError`` for what cannot be."""
        vlm = self.models[name]
        with self._alone():
            seen = apart(lambda: look(vlm, image, question, budget=budget, max_new_tokens=1, do_sample=False))
        answer = seen.answer
        assert answer.plan is not None and answer.budget is not None
        with contextlib.suppress(ConfigError):
            return Foreseen(answer.plan, answer.budget, answer.cost, seen.on_picture())
        return Foreseen(answer.plan, answer.budget, answer.cost, None)

    def answer(self, name: str, image: Image.Image, question: str, budget: str | Budget) -> Iterator[Told]:
        """The answer, piece by piece, the last with all times."""
        events, over = queue.Queue[Event](), threading.Event()

        def hear(event: Event) -> None:
            events.put(event)
            if isinstance(event, Ended | Failed):
                over.set()

        def go() -> None:
            job = Job(to_prompt(Request(question, image)), Sampling(LONGEST), hear, Budget.parse(budget))
            try:
                with self._alone(), Engine(self.models[name]) as engine:
                    engine.submit(job)
                    over.wait()
            except Exception as error:  # whatever it is, the page waits for it
                hear(Failed(error))

        # On a thread, here and in ``strain``: a page that is closed leaves its generators where they are, for good.
        threading.Thread(target=go, daemon=True).start()
        told = Told("")
        while told.ended is None:
            match events.get():
                case Begun() as begun:
                    told = replace(told, begun=begun)
                case Said(text):
                    told = replace(told, text=told.text + text)
                case Ended() as ended:
                    told = replace(told, text=ended.text, ended=ended)
                case Failed(error):
                    raise error
            yield told

    def compare(self, name: str, image: Image.Image, question: str, k: int) -> tuple[Times, Times]:
        """Median times of k switches and of the whole model, measured in turns for as long as a reader waits."""
        config = self.models[name].adaptive_config
        assert config is not None, "checked when the page was made"
        budgets, runs = (Budget.of_k(config, k), Budget.of_k(config, config.max_k)), (list[Told](), list[Told]())
        until = time.perf_counter() + _COMPARE_S
        for number in range(1 + _MOST_ROUNDS):
            for wanted, told in zip(budgets, runs, strict=True):
                told.append(list(self.answer(name, image, question, wanted))[-1])
            if number and time.perf_counter() > until:
                break
        ours, theirs = (Times.of(told[1:]) for told in runs)  # the first of each warmed up
        return ours, theirs

    # -- load ---------------------------------------------------------------------------------------------------------

    def sustained(self, name: str) -> tuple[float, float]:
        """Requests a second that the whole model answers, and the objective in ms; measured once, as is the device."""
        if name not in self._sustained:
            if not self.calibrated(name):
                self.calibrate(name)
            with self._alone():
                vlm = self.models[name]
                objective = OBJECTIVE_OVER_IDLE * idle_ms(vlm, questions(20, 0))
                self._sustained[name] = capacity_of(vlm, questions(60, 1)), objective
        return self._sustained[name]

    def strain(self, name: str, times: float, seconds: float, policy: str, budget: Budget | None) -> Iterator[Strain]:
        """Random questions at ``times`` what the whole model sustains; budget None leaves them to the governor."""
        capacity, objective = self.sustained(name)
        rate = times * capacity
        asked = questions(max(1, round(rate * seconds)), seed=1)
        strain, failed, over = Strain(policy, objective, rate, asked), list[Exception](), threading.Event()

        def go() -> None:
            try:
                with self._alone():
                    vlm = self.models[name]
                    # A fresh forecaster, which has learned nothing of the run before.
                    vlm.profiles.use(vlm.profiles.get(vlm, vlm.token_selection, "in ms").profile)
                    run(vlm, asked, budget, objective, poisson(len(asked), rate, seed=1), over=over)
            except AdaLlavaError as error:
                failed.append(error)

        thread = threading.Thread(target=go, daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                yield strain
                time.sleep(_EVERY_S)
        finally:
            over.set()
        if failed:
            raise failed[0]
        yield strain
