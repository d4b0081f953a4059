"""AdaLLaVA: one vision-language model that runs at any compute or latency budget.

The public names are imported on first use, so that ``import adallava`` and the command line start without loading
torch and transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adallava.bench.calibrate import calibrate
    from adallava.budget import Budget
    from adallava.config import AdaptiveConfig
    from adallava.hosts.model import AdaptiveVLM
    from adallava.plan import ExecutionPlan

__version__ = "0.1.0"
__all__ = ["AdaptiveConfig", "AdaptiveVLM", "Budget", "ExecutionPlan", "__version__", "calibrate"]

_HOMES = {
    "AdaptiveConfig": "adallava.config",
    "AdaptiveVLM": "adallava.hosts.model",
    "Budget": "adallava.budget",
    "ExecutionPlan": "adallava.plan",
    "calibrate": "adallava.bench.calibrate",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
