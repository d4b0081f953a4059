"""``PromptTokens``: how many tokens of a prompt each decoder layer processes, with and without token selection.

Selectors before the decoder (PruMerge, random, uniform) make the prompt shorter for all layers; FastV drops visual
tokens before layer K, so that the first K layers see all of it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from adallava.cost.spec import CostError

PRUMERGE_VISUAL_TOKENS = {"prumerge": 40, "prumerge+": 163}
"""Visual tokens of LLaVA-1.5's 576 that are left on average. They depend on the picture; these two numbers were
inferred from the paper's cost columns (see docs/costs.md), not measured."""
MME_TEXT_TOKENS = 67
"""Text tokens of a typical prompt: 66 on average over MME, and one more that the paper's count adds."""


@dataclass(frozen=True)
class PromptTokens:
    """The parts of a prompt, in tokens; ``CostError`` for counts that cannot be."""

    text: int
    """Everything that is not visual, without the latency token."""
    visual: int
    """Visual tokens that enter the decoder."""
    latency: int = 1
    """Latency tokens: 1, and 0 for a base model."""
    cut_layer: int | None = None
    """Layer before which FastV drops visual tokens; None where nothing is dropped inside the decoder."""
    kept: int | None = None
    """Visual tokens that stay from that layer on."""

    def __post_init__(self) -> None:
        """Check the counts."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise CostError(f"{field.name} is {value!r}, expected a whole number of 0 or more.")
        if (self.cut_layer is None) != (self.kept is None):
            raise CostError("cut_layer and kept belong together. Give both for FastV, or neither.")
        if self.kept is not None and self.kept > self.visual:
            raise CostError(f"kept is {self.kept}, more than the {self.visual} visual tokens there are.")

    @property
    def total(self) -> int:
        """Tokens that enter the decoder."""
        return self.text + self.visual + self.latency

    def layers(self, num_layers: int) -> list[int]:
        """Tokens that each layer processes."""
        if self.cut_layer is None or self.kept is None:
            return [self.total] * num_layers
        before = min(self.cut_layer, num_layers)
        return [self.total] * before + [self.total - self.visual + self.kept] * (num_layers - before)
