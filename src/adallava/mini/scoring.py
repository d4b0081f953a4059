"""Scorers of the mini benchmark: exact match, and F1 over the named things for descriptions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from adallava.mini.questions import Question


def normalise(text: str) -> str:
    """Lower case, no final stop, single spaces."""
    return " ".join(text.lower().replace(".", " ").split())


def score(question: Question, answer: str) -> float:
    """Score an answer in [0, 1]: exact match, or F1 of the (place, colour, kind) phrases of a description."""
    if question.family != "description":
        return float(normalise(answer) == normalise(question.answer))
    wanted, given = (Counter(p.strip() for p in normalise(t).split(",")) for t in (question.answer, answer))
    return 2 * (wanted & given).total() / (wanted.total() + given.total())


def mean_and_interval(scores: Sequence[float], z: float = 1.96) -> tuple[float, float]:
    """Mean and the half width of its 95 % confidence interval (normal approximation from the sample variance).

    Where every score is the same the variance says nothing, so the half width is at least that of one odd answer.
    """
    n = len(scores)
    if n == 0:
        raise ValueError("no scores: evaluate at least one question")
    mean = sum(scores) / n
    variance = sum((s - mean) ** 2 for s in scores) / max(n - 1, 1)
    rare = 1 / (n + 1)
    return mean, z * math.sqrt(max(variance, rare * (1 - rare)) / n)
