"""A plan as a row of switches, for the terminal and for a page.

The layers of the prefix are set apart, because they are no switches: they always run. With variant H a layer is not
just on or off; it is drawn with as much filled as runs of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from adallava.plan import ExecutionPlan

ON, OFF, BAR = "■", "□", "│"
_WIDTH, _GAP, _HEIGHT = 13, 3, 20


@dataclass(frozen=True)
class PlanDrawing:
    """What is drawn of one plan: the prefix, and for each layer after it how many of its switches are on."""

    prefix: int
    """Layers that always run."""
    tail: tuple[int, ...] = ()
    """Switches on in each layer after the prefix."""
    per_layer: int = 1
    """Switches of a layer: 1 for variant L."""

    @classmethod
    def of(cls, plan: ExecutionPlan) -> PlanDrawing:
        """Take a plan of one row."""
        on = tuple(plan.switches_on[0].tolist())
        return cls(plan.config.prefix_layers, on, plan.config.switches_per_layer)

    @classmethod
    def whole(cls, layers: int) -> PlanDrawing:
        """Take a base model, which has no switches."""
        return cls(layers)

    @property
    def count(self) -> str:
        """Say how much runs: "7/12" layers for L, "28/48" switches for H."""
        prefix = self.prefix * self.per_layer
        return f"{prefix + sum(self.tail)}/{prefix + len(self.tail) * self.per_layer}"

    def marks(self) -> list[str]:
        """One mark per layer after the prefix: ■ on, □ off, or the number of its switches that are on."""
        return [OFF if on == 0 else ON if on == self.per_layer else _digit(on) for on in self.tail]

    def text(self) -> str:
        """One line, such as "■■■■■■│■□■■□□"."""
        return ON * self.prefix + (BAR + "".join(self.marks()) if self.tail else "")

    def svg(self) -> str:
        """One inline SVG, coloured by the classes prefix, on and off of the page."""
        parts, x = [], 0
        for _ in range(self.prefix):
            parts.append(_box("prefix", x, 0, _HEIGHT))
            x += _WIDTH + _GAP
        x += 3 * _GAP if self.tail else 0
        for on in self.tail:
            parts.append(_box("off", x, 0, _HEIGHT))
            if on:
                height = _HEIGHT * on / self.per_layer  # filled from below
                parts.append(_box("on", x, _HEIGHT - height, height))
            x += _WIDTH + _GAP
        label = f"{self.count} {'layers' if self.per_layer == 1 else 'switches'} on: {self.text()}"
        return (
            f'<svg class="plan" role="img" width="{x - _GAP}" height="{_HEIGHT}" viewBox="0 0 {x - _GAP} {_HEIGHT}">'
            f"<title>{label}</title>{''.join(parts)}</svg>"
        )


def _box(kind: str, x: float, y: float, height: float) -> str:
    # Half a pixel inside, so that the outline of an empty switch is not cut off.
    return f'<rect class="{kind}" x="{x + 0.5:g}" y="{y + 0.5:g}" width="{_WIDTH - 1}" height="{height - 1:g}" rx="2"/>'


def _digit(on: int) -> str:
    return str(on) if on < 10 else "+"
