"""``ExecutionPlan``: which switches are on, for each sample of a batch.

A plan is checked when it is made, so that whoever holds one may rely on it: the prefix is on, an L layer is on or off
as a whole, an H layer has as many attention as MLP columns on and a whole number of switches. It lives on the CPU,
because the decisions it drives -- which layers run, on which rows -- are taken by the host program; a plan on the
accelerator would cost one synchronisation per layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adallava.config import AdaptiveConfig
from adallava.errors import PlanError

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, eq=False)
class ExecutionPlan:
    """The gates of a batch: bool [B, L, 2, G], axis 2 being 0 attention and 1 MLP, G ``config.groups``.

    The tensor is copied to the CPU; treat it as read-only. Raises ``PlanError`` for gates that are no plan of
    ``config``. Plans compare by value and support ``&``, ``|`` and ``-`` on their tails (the prefix stays on), each a
    ``PlanError`` where the result is no plan, which can happen with variant H.
    """

    gates: Tensor
    config: AdaptiveConfig

    def __post_init__(self) -> None:
        """Copy the gates to the CPU and check them."""
        _check_tensor(self.gates, self.config)
        object.__setattr__(self, "gates", self.gates.detach().to("cpu", copy=True))
        _check_rows(self.gates, self.config)

    # -- making plans -----------------------------------------------------------------------------------------------

    @classmethod
    def from_switches(cls, switches: Tensor, config: AdaptiveConfig) -> ExecutionPlan:
        """Make a plan of variant L from its tail: bool [B, N-P], true where the layer runs."""
        if config.variant != "L":
            raise PlanError(f"from_switches is for variant L, got {config.variant}. Pass gates to ExecutionPlan.")
        if switches.dtype != torch.bool or switches.dim() != 2 or switches.shape[1] != config.tail_layers:
            raise PlanError(f"switches are {_shape(switches)}, expected bool [B, {config.tail_layers}].")
        return cls(expand_tail(switches[:, :, None, None].expand(-1, -1, 2, config.groups), config), config)

    @classmethod
    def full(cls, config: AdaptiveConfig, batch: int = 1) -> ExecutionPlan:
        """Return the plan that runs everything, on ``batch`` rows."""
        return cls(torch.ones(batch, config.num_layers, 2, config.groups, dtype=torch.bool), config)

    @classmethod
    def cat(cls, plans: Sequence[ExecutionPlan]) -> ExecutionPlan:
        """Return one plan with the rows of several plans of the same model."""
        if not plans:
            raise PlanError("cat of no plans. Pass at least one ExecutionPlan.")
        for plan in plans[1:]:
            plans[0]._check_same_model(plan)
        return cls(torch.cat([plan.gates for plan in plans]), plans[0].config)

    # -- reading ----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Return the number of rows B."""
        return int(self.gates.shape[0])

    def __iter__(self) -> Iterator[ExecutionPlan]:
        """Yield each row as a plan of its own."""
        return (self.row(i) for i in range(len(self)))

    @property
    def tail(self) -> Tensor:
        """Gates after the prefix: bool [B, N-P, 2, G]."""
        return self.gates[:, self.config.prefix_layers :]

    @property
    def switches_on(self) -> Tensor:
        """Switches on in each tail layer: int64 [B, N-P], from 0 to ``config.switches_per_layer``."""
        return self.tail[:, :, 0].sum(-1) // self.config.groups_per_switch

    @property
    def k(self) -> list[int]:
        """Switches on beyond the prefix, for each row."""
        return self.switches_on.sum(-1).tolist()

    def left_from(self, layer: int) -> list[int]:
        """Switches on beyond the prefix in ``layer`` and those after it, for each row."""
        first = max(0, layer - self.config.prefix_layers)
        return [sum(row[first:]) for row in self._counts]

    @functools.cached_property
    def _counts(self) -> list[list[int]]:
        """``switches_on`` as plain numbers: asked before every layer of a request with a budget in time."""
        return self.switches_on.tolist()

    @property
    def fraction(self) -> list[float]:
        """Share of the model's switches that are on, prefix included, for each row."""
        return [(self.config.prefix_switches + k) / self.config.total_switches for k in self.k]

    @property
    def layer_on(self) -> Tensor:
        """Whether a layer runs at all: bool [B, L]."""
        return self.gates.flatten(2).any(-1)

    @property
    def layer_full(self) -> Tensor:
        """Whether a layer runs in full: bool [B, L]."""
        return self.gates.flatten(2).all(-1)

    # -- rows -------------------------------------------------------------------------------------------------------

    def row(self, index: int) -> ExecutionPlan:
        """Return row ``index`` (negative counts from the end) as a plan of one row."""
        if not -len(self) <= index < len(self):
            raise PlanError(f"row {index} of a plan with {len(self)} rows. Pass {-len(self)} to {len(self) - 1}.")
        return ExecutionPlan(self.gates[index][None], self.config)

    def select(self, index: Tensor | Sequence[int]) -> ExecutionPlan:
        """Return the rows named by ``index`` (int64 [B']), in that order; rows may repeat, as beams do."""
        return ExecutionPlan(self.gates[torch.as_tensor(index, device="cpu").long()], self.config)

    def repeat_interleave(self, n: int) -> ExecutionPlan:
        """Return a plan with every row repeated ``n`` times in a row, as Hugging Face expands beams."""
        return ExecutionPlan(self.gates.repeat_interleave(n, dim=0), self.config)

    # -- algebra ----------------------------------------------------------------------------------------------------

    def __and__(self, other: ExecutionPlan) -> ExecutionPlan:
        """Return what both plans run."""
        return self._combine(other, torch.logical_and)

    def __or__(self, other: ExecutionPlan) -> ExecutionPlan:
        """Return what either plan runs."""
        return self._combine(other, torch.logical_or)

    def __sub__(self, other: ExecutionPlan) -> ExecutionPlan:
        """Return what this plan runs and ``other`` does not, and the prefix."""
        return self._combine(other, lambda a, b: a & ~b)

    def __eq__(self, other: object) -> bool:
        """Return whether both have the same gates and the same config."""
        if not isinstance(other, ExecutionPlan):
            return NotImplemented
        return self.config == other.config and torch.equal(self.gates, other.gates)

    __hash__ = None  # type: ignore[assignment]  # compared by the value of a tensor

    def overlap(self, other: ExecutionPlan) -> list[float]:
        """Return the Jaccard index of the tails for each row: shared / either; 1.0 where both tails are empty."""
        self._check_same_rows(other)
        both = (self.tail & other.tail).flatten(1).sum(-1)
        either = (self.tail | other.tail).flatten(1).sum(-1)
        return torch.where(either > 0, both / either.clamp(min=1), 1.0).tolist()

    def _combine(self, other: ExecutionPlan, operation: Callable[[Tensor, Tensor], Tensor]) -> ExecutionPlan:
        if not isinstance(other, ExecutionPlan):
            return NotImplemented
        self._check_same_rows(other)
        return ExecutionPlan(expand_tail(operation(self.tail, other.tail), self.config), self.config)

    def _check_same_model(self, other: ExecutionPlan) -> None:
        if self.config != other.config:
            raise PlanError(f"plans of two models: {self.config} and {other.config}. Combine plans of one model.")

    def _check_same_rows(self, other: ExecutionPlan) -> None:
        self._check_same_model(other)
        if len(self) != len(other):
            raise PlanError(f"plans with {len(self)} and {len(other)} rows. Use repeat_interleave or select first.")

    # -- writing ----------------------------------------------------------------------------------------------------

    def describe(self) -> str:
        """Return one line per row, such as "L 7/12 layers: ######|.#....": the prefix, then the tail.

        L shows a tail layer as "#" or "."; H as a digit, the number of its switches on (letters from 10, "+" from 36).
        """
        return "\n".join(self._describe_row(on) for on in self.switches_on.tolist())

    def _describe_row(self, on: list[int]) -> str:
        config = self.config
        if config.variant == "L":
            unit, marks = "layers", ["#" if n else "." for n in on]
        else:
            unit, marks = "switches", [_DIGITS[n] if n < len(_DIGITS) else "+" for n in on]
        count = f"{config.prefix_switches + sum(on)}/{config.total_switches}"
        return f"{config.variant} {count} {unit}: {'#' * config.prefix_layers}|{''.join(marks)}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON: the config, and for each row its tail.

        A row is a list with one text per tail layer, the attention columns, "/", and the MLP columns: "1100/0110".
        """
        rows = [["/".join(_bits(half) for half in layer) for layer in row] for row in self.tail.tolist()]
        return {"config": self.config.to_dict(), "rows": rows}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ExecutionPlan:
        """Inverse of ``to_dict``; raise ``PlanError`` for rows that are no plan of the config in it."""
        if not isinstance(data, dict) or set(data) != {"config", "rows"}:
            raise PlanError(f"expected a mapping with 'config' and 'rows' as to_dict writes it, got {data!r:.200}.")
        config = AdaptiveConfig.from_dict(data["config"])
        for text in (text for row in data["rows"] for text in row):
            if (
                not isinstance(text, str)
                or len(text) != 2 * config.groups + 1
                or set(text.replace("/", "", 1)) - set("01")
            ):
                raise PlanError(f"tail layer {text!r}, expected {config.groups} digits 0 or 1, '/', and as many again.")
        halves = [[[list(map(int, half)) for half in text.split("/")] for text in row] for row in data["rows"]]
        try:
            tail = torch.tensor(halves, dtype=torch.bool).reshape(len(halves), config.tail_layers, 2, config.groups)
        except (RuntimeError, ValueError) as error:
            raise PlanError(
                f"every row needs {config.tail_layers} tail layers ({error}). Write it with to_dict."
            ) from error
        return cls(expand_tail(tail, config), config)


def expand_tail(tail: Tensor, config: AdaptiveConfig) -> Tensor:
    """Put the prefix, all ones, before tail gates: [B, N-P, 2, G] -> [B, L, 2, G] of the same dtype and device."""
    prefix = tail.new_ones(tail.shape[0], config.prefix_layers, 2, config.groups)
    return torch.cat([prefix, tail], dim=1)


def _check_tensor(gates: Tensor, config: AdaptiveConfig) -> None:
    expected = f"bool [B, {config.num_layers}, 2, {config.groups}]"
    if not isinstance(gates, Tensor) or gates.dtype != torch.bool:
        raise PlanError(f"gates are {_shape(gates)}, expected {expected}. Convert 0/1 gates with gates > 0.5.")
    if gates.dim() != 4 or gates.shape[1:] != (config.num_layers, 2, config.groups):
        raise PlanError(
            f"gates are {_shape(gates)}, expected {expected}: {config.num_layers} layers, attention and MLP, and one "
            "column per key/value head. Use the config of the model that the gates are for."
        )


def _check_rows(gates: Tensor, config: AdaptiveConfig) -> None:
    if not gates[:, : config.prefix_layers].all():
        row, layer = _first(~gates[:, : config.prefix_layers].flatten(2).all(-1))
        raise PlanError(
            f"row {row} switches off part of layer {layer}, but the first {config.prefix_layers} layers always run. "
            "Set the gates of the prefix to true."
        )
    tail = gates[:, config.prefix_layers :]
    if config.variant == "L":
        uneven = tail.flatten(2).any(-1) != tail.flatten(2).all(-1)
        if uneven.any():
            row, layer = _first(uneven)
            raise PlanError(
                f"row {row} has layer {layer + config.prefix_layers} on in part, but variant L switches whole layers. "
                "Set all gates of a layer alike, or use a variant H model."
            )
        return
    counts = tail.sum(-1)  # [B, N-P, 2]
    step = config.groups_per_switch
    wrong = (counts[..., 0] != counts[..., 1]) | (counts[..., 0] % step != 0)
    if wrong.any():
        row, layer = _first(wrong)
        attention, mlp = counts[row, layer].tolist()
        raise PlanError(
            f"row {row}, layer {layer + config.prefix_layers} has {attention} attention and {mlp} MLP columns on, "
            f"expected equal numbers that are multiples of {step} (one switch)."
        )


def _first(wrong: Tensor) -> tuple[int, int]:
    row, layer = wrong.nonzero()[0].tolist()
    return row, layer


def _bits(columns: list[bool]) -> str:
    return "".join("1" if on else "0" for on in columns)


def _shape(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return f"a {type(value).__name__}"
