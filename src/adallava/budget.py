"""``Budget``: what a caller allows, a share of the base model's compute, FLOPs or milliseconds; and the k that it buys.

What FLOPs buy depends on the length of the input, which ``adallava.cost.resolve_budget`` takes, and what milliseconds
buy on the device too, which ``adallava calibrate`` measures; here they are only read and written.

The arithmetic is exact. A budget is a ``fractions.Fraction`` and ``k = floor(total * fraction) - prefix`` is computed
in integers, because floor of a rounded product loses or gains whole switches: in bf16 a budget can buy 45 switches
where 44 are meant, and even in fp32 some k/total do not map back to k.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

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
# "5.1 TFLOPs", "850 gflops", "5.1T"; a letter alone must be a capital, because 5m is no amount of compute.
_FLOPS = re.compile(rf"({_DECIMAL}(?:[eE][+-]?[0-9]{{1,2}})?)\s*(?:(?i:([kMGTP]?)FLOPs?)|([kKMGTP]))")
_RATE = re.compile(rf"{_DECIMAL}\s*([kMGTP]?FLOPs?\s*(?:/\s*s|per\s+second))", re.IGNORECASE)
# "80 ms" to the first token, "30 ms/token" for each one after it.
_TIME = re.compile(rf"({_DECIMAL})\s*(us|ms|s|sec|seconds?)(\s*/\s*token|\s+per\s+token)?", re.IGNORECASE)
_EXPECTED = (
    "Expected a share of the full model's compute: '60%', 0.6 or '3/5', above 0 and at most 100%; an amount for the "
    "prefill, such as '5.1 TFLOPs'; or a time: '80 ms' to the first token, '30 ms/token' for each one after it."
)
_SCALES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
_LEAST_FLOPS, _MOST_FLOPS = Fraction(1), Fraction(10**24)
_MS = {"us": Fraction(1, 1000), "ms": Fraction(1), "s": Fraction(1000)}
_MOST_MS = Fraction(10**9)
Unit = Literal["share", "flops", "ms", "ms/token"]
_NOUNS = {"share": "a share", "flops": "in FLOPs", "ms": "in milliseconds", "ms/token": "in milliseconds per token"}


@functools.total_ordering
@dataclass(frozen=True)
class Budget:
    """What a request may cost, held exactly: a share of the base model's prefill compute, in (0, 1], FLOPs or time.

    ``Budget.parse`` reads what users write; ``resolve`` turns a share into k for one model; ``of_k`` is the inverse.
    FLOPs are of the prefill in the paper's convention; ``adallava.cost.resolve_budget`` resolves them and shares. Time
    is in ms, from the call to the first token, or of each token after it; a calibrated model resolves it.
    """

    amount: Fraction
    unit: Unit = "share"

    def __post_init__(self) -> None:
        """Raise ``BudgetError`` unless the amount is a ``Fraction`` in the range of its unit.

        That is (0, 1] for a share, 1 to 10^24 for FLOPs, above 0 and at most 10^9 for milliseconds.
        """
        if not isinstance(self.amount, Fraction):
            raise BudgetError(f"Budget holds a Fraction, got {self.amount!r}. Use Budget.parse({self.amount!r}).")
        if self.unit not in _NOUNS:
            raise BudgetError(f"the unit of a Budget is one of {', '.join(map(repr, _NOUNS))}, got {self.unit!r}.")
        if self.unit == "flops":
            if not _LEAST_FLOPS <= self.amount <= _MOST_FLOPS:
                raise BudgetError(f"budget {float(self.amount):g} FLOPs is out of range. {_EXPECTED}")
        elif self.unit in ("ms", "ms/token"):
            if not 0 < self.amount <= _MOST_MS:
                raise BudgetError(f"budget {float(self.amount):g} {self.unit} is out of range. {_EXPECTED}")
        elif not 0 < self.amount <= 1:
            raise BudgetError(f"budget {percent(self.amount)} is out of range. {_EXPECTED}")

    @property
    def fraction(self) -> Fraction:
        """The share; ``BudgetError`` for FLOPs and milliseconds, which are another share of every input's compute."""
        if self.unit != "share":
            raise BudgetError(
                f"budget {self} is {_NOUNS[self.unit]}, and the share of the model that it buys depends on each "
                "input. Single requests take it (generate(), 'adallava run'); here, write a share such as '60%'."
            )
        return self.amount

    @property
    def flops(self) -> Fraction:
        """The FLOPs; ``BudgetError`` for another unit."""
        if self.unit != "flops":
            raise BudgetError(f"budget {self} is {_NOUNS[self.unit]}. Write FLOPs, such as '5.1 TFLOPs'.")
        return self.amount

    @property
    def ms(self) -> Fraction:
        """The milliseconds, to the first token or of each one after it; ``BudgetError`` for another unit."""
        if not self.timed:
            raise BudgetError(f"budget {self} is {_NOUNS[self.unit]}. Write a time, such as '80 ms' or '30 ms/token'.")
        return self.amount

    @property
    def timed(self) -> bool:
        """Whether it is a time, which only a calibrated model can keep."""
        return self.unit in ("ms", "ms/token")

    @classmethod
    def parse(cls, value: object) -> Budget:
        """Read a budget: "60%", 0.6, "3/5", ``Fraction``, 1 (everything), "5.1 TFLOPs", "80 ms", "30 ms/token".

        Text is read exactly. A float means the fraction with a small denominator that it was rounded from, where
        there is one, so that k/total means k switches for every total up to 65536; otherwise its exact binary value.
        Raises ``BudgetError`` for anything else, naming the value, what was expected and what to write instead.
        """
        if isinstance(value, Budget):
            return value
        if isinstance(value, str):
            if (time := _parse_time(value)) is not None:
                return cls(*time)
            flops = _parse_flops(value)
            return cls(_checked(_parse_text(value), value)) if flops is None else cls(flops, "flops")
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
        """Return what this share buys on the model of ``config``: ``k = floor(total * fraction) - prefix``.

        clamp: give k = 0 for a budget below the always-running prefix, as the released research code does.
            Otherwise such a budget raises ``BudgetError``: the model would exceed it. So does a budget in FLOPs or
            milliseconds, which buys another share for each input.
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

    def __lt__(self, other: Budget) -> bool:
        """Compare budgets of one unit; anything else is a ``TypeError``."""
        if not isinstance(other, Budget) or other.unit != self.unit:
            return NotImplemented
        return self.amount < other.amount

    def __str__(self) -> str:
        """Return text that ``parse`` reads back: "60%", "7/12" where no short percentage is, "5.1 TFLOPs", "80 ms".

        Exactly, but for FLOPs and milliseconds that no decimal is.
        """
        if self.unit == "flops":
            return _flops_text(self.amount)
        if self.timed:
            return f"{_decimal_text(self.amount)} {self.unit}"
        hundredths = self.fraction * 10_000
        return percent(self.fraction) if hundredths.denominator == 1 else str(self.fraction)


@dataclass(frozen=True)
class Forecast:
    """The time that a request was foretold, in the unit of its budget: ms to the first token, or ms of each token."""

    ms: float
    """Expected."""
    upper_ms: float
    """One-sided 95 % upper bound: what is compared with the budget."""
    remark: str | None = None
    """What makes the forecast less sure: an input outside what was measured, or a device that is busy; or None."""


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
    forecast: Forecast | None = None
    """For a budget in milliseconds: what was foretold when the plan was decided, with the time until then known."""

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


def flops_at_least(flops: float | Fraction) -> str:
    """Return FLOPs with four digits, rounded up so that asking for them is always enough: "4.328 TFLOPs"."""
    exact = Fraction(flops)
    digits = len(str(math.ceil(exact)))
    step = Fraction(10) ** (digits - 4)
    return _flops_text(math.ceil(exact / step) * step if digits > 4 else Fraction(math.ceil(exact)))


def _parse_time(text: str) -> tuple[Fraction, Unit] | None:
    """Milliseconds and their unit, or None for text that is no time."""
    word = text.strip()
    if len(word) > _MAX_TEXT or not (match := _TIME.fullmatch(word)):
        return None
    unit = match[2].lower()
    ms = Fraction(match[1]) * _MS["s" if unit[:1] == "s" else unit]
    if ms <= 0:
        raise BudgetError(f"budget {text!r} is not above 0. {_EXPECTED}")
    return ms, "ms/token" if match[3] else "ms"


def _parse_flops(text: str) -> Fraction | None:
    """FLOPs, or None for text that is no amount of FLOPs."""
    word = text.strip()
    if len(word) > _MAX_TEXT:
        return None
    if match := _RATE.fullmatch(word):
        raise BudgetError(f"budget {text!r} is a rate ({match[1]}); a budget is an amount. {_EXPECTED}")
    if not (match := _FLOPS.fullmatch(word)):
        return None
    flops = Fraction(match[1]) * _SCALES[(match[2] or match[3] or "").upper()]
    if flops <= 0:
        raise BudgetError(f"budget {text!r} is not above 0. {_EXPECTED}")
    return flops


def _flops_text(flops: Fraction) -> str:
    """FLOPs exactly, in the largest unit that they reach: "5.1 TFLOPs"; a fraction that no decimal is becomes one."""
    prefix, scale = next((p, s) for p, s in reversed(_SCALES.items()) if flops >= s)
    return f"{_decimal_text(flops / scale)} {prefix}FLOPs"


def _decimal_text(value: Fraction) -> str:
    """Exact where there is a decimal of at most 40 places, and otherwise rounded down to that."""
    digits = 0
    while value.denominator > 1 and digits < 40:
        value, digits = value * 10, digits + 1
    number = f"{math.floor(value):0{digits + 1}d}"
    whole, part = number[: len(number) - digits], number[len(number) - digits :]
    return f"{whole}.{part}" if part else whole


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
