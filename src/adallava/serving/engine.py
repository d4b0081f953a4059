"""``Engine``: continuous batching of requests with different budgets, on one thread of its own.

Between any two decoding steps a new request may be prefilled and join, and one that is done, cancelled or late leaves.
Who waits is taken by deadline, then by arrival. What cannot wait is refused when it comes, never forgotten later: each
job that was accepted ends with ``Ended`` or ``Failed``.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from adallava.budget import Budget
from adallava.errors import BudgetError, PromptError
from adallava.hosts.budgets import Looks
from adallava.hosts.cache import ROOM
from adallava.hosts.joining import Joined, Row, join, part
from adallava.hosts.model import AdaptiveVLM
from adallava.hosts.prompts import Prompt
from adallava.hosts.stepping import Started, check_steps, counts_positions, prepare, start, step
from adallava.hosts.threads import asked_threads, run_on, running_on
from adallava.serving.governor import Governor
from adallava.serving.jobs import Begun, Ended, Failed, Job, Limits, OverloadedError, Said, StoppedError
from adallava.serving.speech import Speech

log = logging.getLogger("adallava.serving")
_IDLE_S = 0.5


@dataclass
class _Active:
    """A job whose answer is growing."""

    job: Job
    speech: Speech
    row: Row | None
    """What it holds; None while it is part of a batch."""
    length: int
    """Tokens of prompt and longest answer."""
    token_bytes: int
    """Of keys and values, for each token."""
    decode_ms: float = 0.0

    @property
    def token(self) -> int:
        return self.speech.tokens[-1]


@dataclass(frozen=True)
class Load:
    """How much is going on."""

    waiting: int
    decoding: int
    kv_bytes: int


class Engine:
    """Runs one adaptive model for many requests. Start it with ``start``, or use it in a ``with`` statement."""

    def __init__(self, vlm: AdaptiveVLM, limits: Limits | None = None, objective_ms: float | None = None) -> None:
        """Raise ``ConfigError`` where the model cannot be run step by step; objective_ms: see ``Governor``."""
        check_steps(vlm)
        self.vlm, self.limits = vlm.eval(), limits or Limits()
        self.governor = Governor(vlm, objective_ms)
        self.on_step: Callable[[int, float], None] = lambda rows, ms: None
        self._queue: list[tuple[float, int, Job]] = []
        self._numbers = itertools.count()
        self._changed, self._preparing = threading.Condition(), threading.Lock()
        self._active: list[_Active] = []
        self._joined: Joined | None = None
        self._prefilling: list[Job] = []
        self._stopping = self._finishing = False
        self._threads = asked_threads()
        self._thread = threading.Thread(target=self._run, name="adallava-engine", daemon=True)
        ends = vlm.model.generation_config.eos_token_id
        self._ends = frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends)

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self, finish: bool = False, timeout_s: float = 30.0) -> None:
        """Take no more jobs, and return when all have ended: by themselves (``finish``) or failed, at once."""
        with self._changed:
            self._stopping, self._finishing = True, finish
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                with self._changed:
                    self._finishing = False
                self._thread.join(timeout_s)

    @property
    def alive(self) -> bool:
        """Whether it takes jobs."""
        return self._thread.is_alive() and not self._stopping

    @property
    def load(self) -> Load:
        """What waits and runs at this moment."""
        return Load(len(self._queue), len(self._active), self._reserved())

    def submit(self, job: Job) -> None:
        """Take a job: from now on its sink is told. Everything that is wrong with it is raised here instead.

        That is ``PromptError``, ``ImageError`` or ``BudgetError`` for what can never be answered, ``OverloadedError``
        for what cannot be now, and ``StoppedError``.
        """
        self._check_open()
        if job.sampling.max_new_tokens > self.limits.new_tokens:
            raise PromptError(
                f"max_tokens is {job.sampling.max_new_tokens}, this server allows {self.limits.new_tokens}. Ask for "
                "fewer."
            )
        with self._changed:
            self._check_queue()  # before any work is done for it
        with self._preparing, running_on(1):  # the helpers are the engine's
            job.prepared = prepare(self.vlm, job.prompt, job.sampling.max_new_tokens)
        job.prompt = Prompt([])  # its pictures are not needed any more
        tokens = max(job.prepared.batch.lengths[0])
        if tokens > self.limits.prompt_tokens:
            raise PromptError(
                f"the prompt has {tokens} tokens, this server allows {self.limits.prompt_tokens}. Shorten it, or send "
                "fewer images."
            )
        self.governor.check(job)
        if job.budget is not None:
            self._check_budget(job, job.budget)
        if _kv_bytes([self._most_of(job)]) > self.limits.kv_bytes:
            raise PromptError(f"its keys and values would not fit this server's {self.limits.kv_bytes:,} bytes.")
        with self._changed:
            self._check_open()
            self._check_room(job)
            self.governor.arrived(job.arrived)
            heapq.heappush(self._queue, (self._due(job), next(self._numbers), job))
            self._changed.notify_all()

    def _check_queue(self) -> None:
        self._let_go()
        if len(self._queue) >= self.limits.queue:
            raise OverloadedError(f"{len(self._queue)} requests are waiting, no more may.", self._retry_after())

    def _check_room(self, job: Job) -> None:
        """Raise ``OverloadedError`` where the queue is full, or so long that the objective cannot be kept."""
        self._check_queue()
        due = self._due(job)
        waiting = [*self._prefilling, *(entry[-1] for entry in sorted(self._queue) if entry[0] <= due)]
        # Who comes when nobody else is here is taken, whatever is expected: a governor that refused everybody after
        # a slow moment would never learn that it is over.
        if job.budget is None and job.deadline_ms is None and (waiting or self._active):
            over = self.governor.wait_ms(job, waiting, len(self._active))
            if over > 0:
                raise OverloadedError(
                    f"its first token would come {over:.0f} ms after the objective of "
                    f"{self.governor.objective_ms:g} ms, even with the least of the model.",
                    over / 1e3,
                )

    # -- its thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        run_on(self._threads, asked=self._threads)
        try:
            self._work()
        except Exception as error:  # nothing is known to raise here, and nobody may be left waiting if it does
            log.exception("the engine has failed")
            with self._changed:
                self._stopping, self._finishing = True, False
                self._fail_all(error)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._active and not self._stopping:
                    self._changed.wait(_IDLE_S)
                if self._stopping and not self._finishing:
                    self._fail_all(StoppedError("the server is stopping."))
                if self._stopping and not self._queue and not self._active:
                    return
                job, waiting = self._next()
            began = time.perf_counter()
            if job is not None:
                self._admit(job, waiting)
                self._prefilling = []
            self._leave()
            if self._active:
                self._step()
            if job is not None:
                self.governor.passed(1e3 * (time.perf_counter() - began))

    def _next(self) -> tuple[Job | None, list[Job]]:
        """The next job to be prefilled, if there is room for it, and those behind it."""
        self._let_go()
        if not self._queue or len(self._active) >= self.limits.rows:
            return None, []
        job = self._queue[0][-1]
        if self._active and self._reserved(job) > self.limits.kv_bytes:
            return None, []
        heapq.heappop(self._queue)
        self._prefilling = [job]
        return job, [entry[-1] for entry in sorted(self._queue)]

    def _let_go(self) -> None:
        """Take out of the queue who has gone or waited for too long, wherever in it they are."""
        staying = []
        for entry in self._queue:
            job = entry[-1]
            late = job.elapsed_ms > 1e3 * self.limits.timeout_s
            if job.cancelled.is_set() or late:
                error = TimeoutError("it waited for too long.") if late else InterruptedError("cancelled")
                self._tell(job, Failed(error))
            else:
                staying.append(entry)
        if len(staying) < len(self._queue):
            self._queue = staying
            heapq.heapify(self._queue)

    def _admit(self, job: Job, waiting: list[Job]) -> None:
        """Prefill a job and let it join."""
        assert job.prepared is not None
        queued = job.elapsed_ms
        try:
            run_on(self.vlm.profiles.threads(self.vlm, self.vlm.token_selection, timed=True))
            decision = self.governor.decide(job, waiting, len(self._active))
            sampling = replace(job.sampling, max_new_tokens=decision.new_tokens)
            remark = decision.remark
            try:
                started = start(self.vlm, job.prepared, decision.budget, job.elapsed_ms)
            except BudgetError:  # it could have been kept when the job came
                least = Budget.of_k(self.governor.config, 0)
                started = start(self.vlm, job.prepared, least, job.elapsed_ms)
                remark = "late: less time is left than the least of it takes"
            speech = Speech(sampling, self._decode, self._ends)
            text = speech.say(speech.choose(started.logits))
            begun = self._begun(job, started, queued, remark)
        except Exception as error:  # whatever it is, it is this job's, and the others go on
            self._tell(job, Failed(error))
            return
        job.prepared = replace(job.prepared, inputs={}, images=None)
        self._tell(job, begun)
        if text:
            self._tell(job, Said(text))
        self._part()
        length, each = max(job.prepared.batch.last_lengths[0]), self._token_bytes(started.row.plan.k[0])
        self._active.append(_Active(job, speech, started.row, length, each))

    def _begun(self, job: Job, started: Started, queue_ms: float, remark: str | None) -> Begun:
        assert job.prepared is not None
        forecast = started.budget.forecast
        forecaster = self.vlm.profiles.in_use(self.vlm.token_selection)
        if forecast is None and forecaster is not None:
            forecast = forecaster.prefill(job.prepared.work(self.vlm, started.row.plan.k[0]), queue_ms)
        return Begun(
            started.row.plan,
            started.budget,
            started.cost,
            job.prepared.prompt_tokens,
            queue_ms,
            job.elapsed_ms,
            None if forecast is None else forecast.ms,
            remark or (None if forecast is None else forecast.remark),
        )

    def _leave(self) -> None:
        """Let go of what is done, cancelled or late."""
        staying = []
        for one in self._active:
            job, speech = one.job, one.speech
            if speech.finish_reason is not None:
                self.governor.ended(one.decode_ms)
                self._tell(job, Ended(speech.text, speech.finish_reason, len(speech.tokens), job.elapsed_ms))
            elif job.cancelled.is_set():
                self._tell(job, Failed(InterruptedError("cancelled")))
            elif job.elapsed_ms > 1e3 * self.limits.timeout_s:
                self._tell(job, Failed(TimeoutError(f"it took more than {self.limits.timeout_s:g} s.")))
            else:
                staying.append(one)
        if len(staying) < len(self._active):
            self._part()
            self._active = staying

    def _part(self) -> None:
        """Give each job in the batch its own keys and values back, because the batch will be another."""
        if self._joined is not None:
            for one, row in zip(self._active, part(self._joined), strict=True):
                one.row = row
        self._joined = None

    def _step(self) -> None:
        """One token for everybody."""
        began = time.perf_counter()
        try:
            if self._joined is None:
                rows = [one.row for one in self._active if one.row is not None]
                assert self.vlm.scheduler is not None and len(rows) == len(self._active)
                self._joined = join(rows, self.vlm.scheduler, positions=counts_positions(self.vlm))
                del rows
                for one in self._active:  # else what they held before would stay beside the batch
                    one.row = None
            logits, self._joined = step(self.vlm, self._joined, [one.token for one in self._active])
            said = self._choose(logits)
        except Exception as error:  # the batch is lost, the server is not
            log.exception("a decoding step has failed")
            for one in self._active:
                self._tell(one.job, Failed(error))
            self._active, self._joined = [], None
            return
        taken = 1e3 * (time.perf_counter() - began)
        self.on_step(len(self._active), taken)
        for one, token in zip(self._active, said, strict=True):
            one.decode_ms += taken / len(self._active)
            if text := one.speech.say(token):
                self._tell(one.job, Said(text))

    def _choose(self, logits: Tensor) -> list[int]:
        """Tokens of logits [B, V], read back from the device once where all take the likeliest."""
        if all(one.speech.sampling.temperature == 0 for one in self._active):
            return [int(token) for token in logits.argmax(-1).tolist()]
        return [one.speech.choose(row) for one, row in zip(self._active, logits, strict=True)]

    # -- little things ------------------------------------------------------------------------------------------------

    def _tell(self, job: Job, event: Begun | Said | Ended | Failed) -> None:
        try:
            job.sink(event)
        except Exception:  # whoever listened is gone
            job.cancel()

    def _fail_all(self, error: Exception) -> None:
        known = [*(entry[-1] for entry in self._queue), *self._prefilling, *(one.job for one in self._active)]
        for job in {id(job): job for job in known}.values():
            self._tell(job, Failed(error))
        self._queue.clear()
        self._active, self._prefilling, self._joined = [], [], None

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self.vlm.processor.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def _due(self, job: Job) -> float:
        """Seconds of ``time.perf_counter`` by which it wants something."""
        wanted = job.deadline_ms
        if wanted is None and job.budget is not None and job.budget.unit == "ms":
            wanted = float(job.budget.ms)
        if wanted is None:  # whatever budget it has: else those of the governor would go before it for ever
            wanted = self.governor.objective_ms
        return job.arrived + (self.limits.timeout_s if wanted is None else wanted / 1e3)

    def _retry_after(self) -> float:
        rate = self.governor.rate
        return max(1.0, len(self._queue) / rate if rate else 1.0)

    def _most_of(self, job: Job) -> tuple[int, int]:
        """A job's tokens and bytes for each, at most: what its budget buys, or everything where that comes later."""
        assert job.prepared is not None
        config, budget = self.governor.config, job.budget
        k = budget.resolve(config).k if budget is not None and budget.unit == "share" else config.max_k
        return max(job.prepared.batch.last_lengths[0]), self._token_bytes(k)

    def _token_bytes(self, k: int) -> int:
        """Bytes of keys and values for each token, at most."""
        config, spec = self.governor.config, self.vlm.spec
        layers = config.prefix_layers + k / config.switches_per_layer
        return int(layers * 2 * spec.num_kv_heads * spec.head_dim * next(self.vlm.model.parameters()).element_size())

    def _reserved(self, more: Job | None = None) -> int:
        """Bytes that all who decode, and ``more``, may come to hold."""
        rows = [(one.length, one.token_bytes) for one in list(self._active)]
        return _kv_bytes(rows if more is None else [*rows, self._most_of(more)])

    def _check_open(self) -> None:
        if self._stopping:
            raise StoppedError("the server is stopping.")

    def _check_budget(self, job: Job, budget: Budget) -> None:
        """Raise ``BudgetError`` for a budget that could not be kept if nobody else were here."""
        assert job.prepared is not None
        clock = self.vlm.profiles.get(self.vlm, self.vlm.token_selection, budget) if budget.timed else None
        Looks([budget], self.vlm.adaptive_config, self.vlm.spec, job.prepared.batch, clock)


def _kv_bytes(rows: Sequence[tuple[int, int]]) -> int:
    """Bytes that rows of (tokens, bytes for each) come to hold together: a batch is as long as its longest row."""
    return (max((tokens for tokens, _ in rows), default=0) + ROOM) * sum(each for _, each in rows)
