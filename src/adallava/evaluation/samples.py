"""The side file of an evaluation: one line per sample with what it cost, what it took, and the plan that it ran."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from adallava.errors import ResultExistsError
from adallava.evaluation.plans import PlanCounts
from adallava.hosts.answer import Answer


class SampleFile:
    """A JSONL file that is written sample by sample; a line is whole or, after a kill, the last one."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        """Start a new file; ``about`` goes into every line. ``ResultExistsError`` for one that exists."""
        if path.exists():
            raise ResultExistsError(f"{path} exists. Sample files are kept: name another, or move it away.")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self.path, self.about = path, about

    def add(self, which: dict[str, Any], answer: Answer | Exception, rows: int) -> None:
        """Add a sample; which: its task and number. rows: requests that were answered together with it."""
        told = {"error": f"{type(answer).__name__}: {answer}"} if isinstance(answer, Exception) else record(answer)
        line = {**which, **self.about, "failed": isinstance(answer, Exception), "batch_rows": rows, **told}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")


def record(answer: Answer) -> dict[str, Any]:
    """An answer as plain data: text, plan, FLOPs of the prefill, measured and foretold times.

    Times are those of the batch. "plan" is the key of ``PlanCounts``, "layers_on" the numbers of the layers of which
    anything ran; both None for a base model. Foretold times are None where the device is not calibrated.
    """
    plan, cost, timing, foretold = answer.plan, answer.cost, answer.timing, answer.foretold
    first = None if foretold is None else foretold.first_token
    step = None if foretold is None else foretold.token
    return {
        "text": answer.text,
        "k": None if plan is None else plan.k[0],
        "plan": None if plan is None else PlanCounts.key_of(plan),
        "layers_on": None if plan is None else [i for i, on in enumerate(plan.layer_on[0].tolist()) if on],
        "prefill_flops": cost.prefill_flops,
        "base_prefill_flops": cost.base_prefill_flops,
        "flops_frac": cost.frac,
        "flops_convention": cost.convention,
        "prompt_tokens": answer.prompt_tokens,
        "layer_tokens": answer.layer_tokens,
        "first_token_ms": timing.answered_ms,
        "ms_per_token": timing.ms_per_token,
        "total_ms": timing.prepare_ms + timing.total_ms,
        "predicted_first_token_ms": None if first is None else first.ms,
        "predicted_first_token_upper_ms": None if first is None else first.upper_ms,
        "predicted_ms_per_token": None if step is None else step.ms,
    }
