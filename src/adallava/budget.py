"""``Budget``: the share of the base model's compute that a caller allows, and the k that it buys.

The arithmetic is exact. A budget is a ``fractions.Fraction`` and ``k = floor(total * fraction) - prefix`` is computed
in integers, because floor of a rounded product loses or gains whole switches: in bf16 a budget can buy 45 switches
where 44 are meant, and even in fp32 some k/total do not map back to k.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from adallava.config import AdaptiveConfig
from adallava.errors import BudgetError

# A float within this many units in the last place of a fraction with a small denominator means that fraction:
# 0.6 means 3/5 and 0.1 + 0.2 means 3/10. Such fractions lie at least 2**-32 apart, so the choice is never ambiguous.
_SNAP_ULPS = 4
_SNAP_DENOMINATOR = 2**16
_MAX_TEXT = 64
_DECIMAL = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
_PERCENT = re.compile(rf"({_DECIMAL})\s*%")
_PLAIN = re.compile(_DECIMAL)
_RATIO = re.compile(r"([0-9]+)/([0-9]+)")
_WITH_UNIT = re.compile(rf"{_DECIMAL}\s*((?:[kKMGTP]?FLOPs?)|ns|us|ms|s|seconds?)", re.IGNORECASE)
_EXPECTED = "Expected a share of the full model's compute: '60%', 0.6 or '3/5', above 0 and at most 100%."


@dataclass(frozen=True, order=True)
class Budget:
    """A share of the base model's prefill compute, in (0, 1], held exactly.

    ``Budget.parse`` reads what users write; ``resolve`` turns it into k for one model; ``of_k`` is the inverse.
    """

    fraction: Fraction

    def __post_init__(self) -> None:
        """Raise ``BudgetError`` unless the fraction is a ``Fraction`` in (0, 1]."""
        if not isinstance(self.fraction, Fraction):
            raise BudgetError(f"Budget holds a Fraction, got {self.fraction!r}. Use Budget.parse({self.fraction!r}).")
        if not 0 < self.fraction <= 1:
            raise BudgetError(f"budget {percent(self.fraction)} is out of range. {_EXPECTED}")

    @classmethod
    def parse(cls, value: object) -> Budget:
        """Read a budget: "60%", 0.6, "0.6", "3/5", ``Fraction``, 1 (everything) or another ``Budget``.

        Text is read exactly. A float means the fraction with a small denominator that it was rounded from, where
        there is one, so that k/total means k switches for every total up to 65536; otherwise its exact binary value.
        Raises ``BudgetError`` for anything else, naming the value, what was expected and what to write instead.
        """
        if isinstance(value, Budget):
            return value
        if isinstance(value, str):
            return cls(_checked(_parse_text(value), value))
        if isinstance(value, bool):
            raise BudgetError(f"budget {value!r} is a truth value. {_EXPECTED}")
        if isinstance(value, float):
            if not math.isfinite(value):
                raise BudgetError(f"budget {value!r} is not a finite number. {_EXPECTED}")
            return cls(_checked(_snap(value), value))
        if isinstance(value, int | Fraction):
            return cls(_checked(Fraction(value), value))
        raise BudgetError(
            f"budget {value!r} has type {type(value).__name__}. {_EXPECTED} Pass text, a Python float or a Fraction; "
            "a number in lower precision than a Python float may have lost a switch already."
        )

    @classmethod
    def of_k(cls, config: AdaptiveConfig, k: int) -> Budget:
        """Return the smallest budget that buys k switches beyond the prefix, for k from 0 to ``config.max_k``."""
        if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k <= config.max_k:
            raise BudgetError(f"k is {k!r}, expected a whole number from 0 to {config.max_k} for this model.")
        return cls(Fraction(config.prefix_switches + k, config.total_switches))

    def resolve(self, config: AdaptiveConfig, *, clamp: bool = False) -> ResolvedBudget:
        """Return what this budget buys on the model of ``config``: ``k = floor(total * fraction) - prefix``.

        clamp: give k = 0 for a budget below the always-running prefix, as the released research code does.
            Otherwise such a budget raises ``BudgetError``: the model would exceed it.
        """
        total, prefix = config.total_switches, config.prefix_switches
        affordable = total * self.fraction.numerator // self.fraction.denominator
        if affordable < prefix and not clamp:
            minimum = Fraction(prefix, total)
            unit = "layers" if config.variant == "L" else "switches"
            raise BudgetError(
                f"budget {self} is below the minimum of this model, {percent(minimum)} ({prefix} of {total} {unit} "
                f"always run). Ask for at least '{percent(minimum)}'."
            )
        return ResolvedBudget(budget=self, k=max(0, affordable - prefix), prefix_switches=prefix, total_switches=total)

    def __float__(self) -> float:
        """Return the fraction as the nearest float."""
        return float(self.fraction)

    def __str__(self) -> str:
        """Return text that ``parse`` reads back exactly: "60%", or "7/12" where no short percentage is exact."""
        hundredths = self.fraction * 10_000
        return percent(self.fraction) if hundredths.denominator == 1 else str(self.fraction)


@dataclass(frozen=True)
class ResolvedBudget:
    """What a budget buys on one model."""

    budget: Budget
    """What was asked for."""
    k: int
    """Switches on beyond the prefix."""
    prefix_switches: int
    """Switches that always run."""
    total_switches: int
    """Switches of the whole model."""

    @property
    def switches_on(self) -> int:
        """Switches that run, the prefix included."""
        return self.prefix_switches + self.k

    @property
    def fraction_used(self) -> Fraction:
        """Share of the model that runs: at most ``budget.fraction``, unless the budget was clamped."""
        return Fraction(self.switches_on, self.total_switches)


def parse_budgets(text: str) -> list[Budget]:
    """Read a comma-separated list such as "100%,85%,60%", in its order; raise ``BudgetError`` for an empty one."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise BudgetError(f"budgets {text!r} has an empty entry. Write a list such as '100%,85%,60%'.")
    return [Budget.parse(part) for part in parts]


def percent(fraction: Fraction) -> str:
    """Return a percentage with at most two decimals, rounded up so that asking for it is always enough."""
    hundredths = math.ceil(fraction * 10_000)
    sign, hundredths = ("-" if hundredths < 0 else ""), abs(hundredths)
    return f"{sign}{hundredths // 100}.{hundredths % 100:02d}".rstrip("0").rstrip(".") + "%"


def _parse_text(text: str) -> Fraction:
    word = text.strip()
    if len(word) > _MAX_TEXT:
        raise BudgetError(f"budget {word[:20]!r}... has {len(word)} characters. {_EXPECTED}")
    if match := _PERCENT.fullmatch(word):
        return Fraction(match[1]) / 100
    if _PLAIN.fullmatch(word):
        return Fraction(word)
    if (match := _RATIO.fullmatch(word)) and int(match[2]):
        return Fraction(int(match[1]), int(match[2]))
    if match := _WITH_UNIT.fullmatch(word):
        raise BudgetError(
            f"budget {text!r} is in {match[1]}, a kind of budget that is not available yet: it needs a calibrated "
            "cost model of the device. Write a share of the full model's compute instead, such as '60%'."
        )
    raise BudgetError(f"budget {text!r} is not a budget. {_EXPECTED}")


def _checked(fraction: Fraction, value: object) -> Fraction:
    if fraction <= 0:
        raise BudgetError(f"budget {value!r} is not above 0. {_EXPECTED}")
    if fraction > 1:
        # 60 is far more often a forgotten percent sign than sixty times the model.
        looks_percent = 1 < fraction <= 100 and "%" not in str(value)
        plain = str(value).strip() if isinstance(value, str | int | float) else percent(fraction / 100).rstrip("%")
        remedy = f" Did you mean '{plain}%'?" if looks_percent else ""
        raise BudgetError(f"budget {value!r} is more than the whole model (1.0 or '100%'). {_EXPECTED}{remedy}")
    return fraction


def _snap(value: float) -> Fraction:
    exact = Fraction(value)
    near = exact.limit_denominator(_SNAP_DENOMINATOR)
    return near if abs(near - exact) <= _SNAP_ULPS * Fraction(math.ulp(value)) else exact
