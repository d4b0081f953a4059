"""What the engine works on: a job, the limits it must keep, and the events that tell how it goes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from adallava.budget import Budget, ResolvedBudget
from adallava.cost import Cost
from adallava.errors import AdaLlavaError, ConfigError
from adallava.hosts.prompts import Prompt
from adallava.hosts.stepping import Prepared
from adallava.plan import ExecutionPlan
from adallava.serving.speech import Sampling


class OverloadedError(AdaLlavaError, RuntimeError):
    """The server cannot take a request now; ``retry_after_s`` says when it may."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class StoppedError(AdaLlavaError, RuntimeError):
    """The server is stopping or has stopped."""


@dataclass(frozen=True)
class Limits:
    """What a server holds and does at most."""

    rows: int = 8
    """Requests that decode together."""
    queue: int = 64
    """Requests that wait."""
    prompt_tokens: int = 8192
    new_tokens: int = 1024
    kv_bytes: int = 2 * 2**30
    """Keys and values of all requests that decode."""
    timeout_s: float = 120.0
    """From a request's arrival to the end of its answer."""

    def __post_init__(self) -> None:
        """Check the values; raise ``ConfigError``."""
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
                raise ConfigError(f"the limit {name} is {value!r}, expected more than 0.")


@dataclass(frozen=True)
class Begun:
    """A request was prefilled."""

    plan: ExecutionPlan
    budget: ResolvedBudget
    cost: Cost
    prompt_tokens: int
    queue_ms: float
    """From arrival to the start of the prefill."""
    first_token_ms: float
    """From arrival to the first token."""
    predicted_ms: float | None
    """What ``first_token_ms`` was foretold to be when the prefill began; None without a device profile."""
    remark: str | None = None


@dataclass(frozen=True)
class Said:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True)
class Ended:
    """The whole answer is there."""

    text: str
    reason: str
    """"stop" or "length"."""
    new_tokens: int
    total_ms: float
    """From arrival."""


@dataclass(frozen=True)
class Failed:
    """There will be no more of the answer."""

    error: Exception


Event = Begun | Said | Ended | Failed


@dataclass
class Job:
    """A request on its way. ``sink`` is called with each event, on the engine's thread; it must return at once."""

    prompt: Prompt
    sampling: Sampling
    sink: Callable[[Event], None]
    budget: Budget | None = None
    """None: the governor decides."""
    deadline_ms: float | None = None
    """For the whole answer, from arrival."""
    arrived: float = field(default_factory=time.perf_counter)
    cancelled: threading.Event = field(default_factory=threading.Event)
    prepared: Prepared | None = None

    @property
    def elapsed_ms(self) -> float:
        """Since it arrived."""
        return 1e3 * (time.perf_counter() - self.arrived)

    def cancel(self) -> None:
        """Say that nobody waits for the answer any more."""
        self.cancelled.set()
