"""Several copies of the server behind one address: a Ray Serve deployment, which routes, restarts and scales them.

Each copy is a process with a model, an engine and a governor of its own. Ray's router sends a request to the copy with
the fewer requests going on; when there are more copies to be had, it starts them by the mean of that number.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adallava.errors import ConfigError

NAME = "adallava"
_GOING_ON_PER_REPLICA = 2.0
_LOOK_BACK_S, _UP_DELAY_S, _DOWN_DELAY_S = 10.0, 5.0, 120.0
_FINISH_S = 30.0
_HEALTH_S = 2.0


@dataclass(frozen=True)
class Replicas:
    """How many copies there are: from ``least`` to ``most``, by load where they differ."""

    least: int
    most: int

    @classmethod
    def parse(cls, text: str) -> Replicas:
        """Read "2", or "1:4" for what the load asks for; ``ConfigError`` for anything else."""
        parts = text.split(":")
        if not 1 <= len(parts) <= 2 or not all(part.isascii() and part.isdigit() for part in parts):
            raise ConfigError(f"--ray is {text!r}, expected a number of replicas, such as 2, or a range such as 1:4.")
        least, most = int(parts[0]), int(parts[-1])
        if not 1 <= least <= most <= 1024:
            raise ConfigError(f"--ray is {text!r}, expected 1 replica or more, the fewest first, such as 1:4.")
        return cls(least, most)

    def scaling(self) -> dict[str, Any]:
        """What Ray Serve is told.

        It scales by the requests that go on in a replica (waiting and decoding, as the router counts them), averaged
        over ten seconds. The target is low because a governor answers crowding with less of the model: at two at a
        time, every other request gets less than it could.
        """
        if self.least == self.most:
            return {"num_replicas": self.least}
        return {
            "autoscaling_config": {
                "min_replicas": self.least,
                "max_replicas": self.most,
                "target_ongoing_requests": _GOING_ON_PER_REPLICA,
                "look_back_period_s": _LOOK_BACK_S,
                "upscale_delay_s": _UP_DELAY_S,
                "downscale_delay_s": _DOWN_DELAY_S,
            }
        }


def deployment(made: Mapping[str, Any], replicas: Replicas) -> Any:
    """The application of ``launch.application(**made)`` as a Ray Serve application, for ``serve.run``."""
    from ray import serve

    limits = made["limits"]
    on_gpu = str(made.get("device") or "").startswith("cuda")

    def build() -> Any:
        from adallava.serving.launch import application

        return application(**made)

    @serve.ingress(build)
    class Server:
        """One replica. Ray asks whether it works, and starts another one if not."""

        def check_health(self) -> None:
            app: Any = self._asgi_app  # type: ignore[attr-defined]
            if not app.state.engine.alive:
                raise RuntimeError("the engine has stopped.")

    made_of: Any = serve.deployment(
        name=NAME,
        # The engine bounds its queue and refuses what is too much itself; what Ray held back would wait unseen.
        max_ongoing_requests=2 * (limits["rows"] + limits["queue"]),
        graceful_shutdown_timeout_s=_FINISH_S,
        health_check_period_s=_HEALTH_S,
        ray_actor_options={"num_cpus": made.get("threads") or 1, "num_gpus": 1 if on_gpu else 0},
        **replicas.scaling(),
    )
    return made_of(Server).bind()


def run_replicas(made: Mapping[str, Any], replicas: Replicas, host: str, port: int) -> None:
    """Serve until SIGINT or SIGTERM; what is going on is finished then. Joins the cluster in $RAY_ADDRESS, if any."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("replicas need Ray Serve, which is not installed: pip install 'adallava[ray]'")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray import serve

    over = threading.Event()
    ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.WARNING)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: over.set())
    try:
        serve.start(http_options={"host": host, "port": port})
        serve.run(deployment(made, replicas), name=NAME, route_prefix="/")
        over.wait()
    finally:
        serve.shutdown()
        ray.shutdown()
