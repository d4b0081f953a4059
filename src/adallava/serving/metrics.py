"""What a server counts, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from adallava.serving.engine import Engine
from adallava.serving.jobs import Begun, Ended

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_SHARES = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)


class Metrics:
    """The counters of one server, in a registry of their own."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("adallava_requests", "Requests by how they ended", "outcome")
        self.tokens = self._counter("adallava_tokens", "Tokens of prompts and answers", "kind")
        self.flops = self._counter("adallava_prefill_flops", "FLOPs of prefills")
        self.missed = self._counter("adallava_objective_missed", "First tokens later than the objective")
        self.first_token = self._histogram("adallava_first_token_seconds", "From arrival to the first token")
        self.queue = self._histogram("adallava_queue_seconds", "From arrival to the prefill")
        self.whole = self._histogram("adallava_request_seconds", "From arrival to the last token")
        self.step = self._histogram("adallava_step_seconds", "One decoding step of a batch")
        self.share = self._histogram("adallava_plan_share", "Share of the switches that a request ran", _SHARES)
        for name, about, read in (
            ("adallava_waiting", "Requests that wait", lambda: engine.load.waiting),
            ("adallava_decoding", "Requests that decode", lambda: engine.load.decoding),
            ("adallava_kv_bytes", "Bytes reserved for keys and values", lambda: engine.load.kv_bytes),
        ):
            Gauge(name, about, registry=self.registry).set_function(read)
        self.objective_ms = engine.governor.objective_ms
        engine.on_step = lambda rows, ms: self.step.observe(ms / 1e3)

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(name, about, labels, registry=self.registry)

    def _histogram(self, name: str, about: str, buckets: Sequence[float] = _SECONDS) -> Histogram:
        return Histogram(name, about, buckets=buckets, registry=self.registry)

    def begun(self, event: Begun, automatic: bool) -> None:
        """Note a first token."""
        self.tokens.labels("prompt").inc(event.prompt_tokens)
        self.flops.inc(event.cost.prefill_flops)
        self.first_token.observe(event.first_token_ms / 1e3)
        self.queue.observe(event.queue_ms / 1e3)
        self.share.observe(event.plan.fraction[0])
        if automatic and self.objective_ms is not None and event.first_token_ms > self.objective_ms:
            self.missed.inc()

    def ended(self, event: Ended) -> None:
        """Note a whole answer."""
        self.requests.labels("answered").inc()
        self.tokens.labels("answer").inc(event.new_tokens)
        self.whole.observe(event.total_ms / 1e3)

    def failed(self, outcome: str) -> None:
        """Note a request without an answer: refused, infeasible, cancelled, failed."""
        self.requests.labels(outcome).inc()

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)
