"""``adallava cost``: what a plan costs on paper, beside the full model. No weights are read and no model is made."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from adallava.budget import Budget, ResolvedBudget
from adallava.cli.cost_model import CostModel, find_model
from adallava.cost import (
    MME_TEXT_TOKENS,
    PRUMERGE_VISUAL_TOKENS,
    STRICT,
    CostError,
    Estimate,
    PromptTokens,
    Setting,
    estimate,
    full_loads,
    resolve_budget,
)
from adallava.cost.paper import switch_counts
from adallava.errors import ConfigError
from adallava.plots.units import bytes_text, flops_text, ms_text, share_text

_INFERRED_FROM = 576


@dataclass(frozen=True)
class CostOptions:
    """What ``adallava cost`` was asked for, apart from how it is run (``Setting``)."""

    model: str
    budget: str
    variant: str | None
    tokens: int | None
    text_tokens: int | None
    visual_tokens: int | None
    token_selection: str
    with_vision: bool


def cost(asked: CostOptions, setting: Setting, as_json: bool) -> None:
    """Print the cost of a budget on a model; see ``adallava cost --help``."""
    allowed = Budget.parse(asked.budget)
    model = find_model(asked.model, asked.variant)
    prompt, whole = _prompts(asked, model)
    if asked.with_vision and model.spec.vision is None:
        raise CostError(f"the sizes of {model.name}'s vision tower are not known. Leave out --with-vision.")
    resolved = resolve_budget(allowed, model.adaptive, model.spec, prompt.layers(model.spec.num_layers))
    assert resolved is not None
    result = _Result(model, resolved, prompt, whole, setting, asked)
    if as_json:
        print(json.dumps(result.as_dict(), indent=2))
    else:
        _show(result)


# -- the prompt -------------------------------------------------------------------------------------------------------


def _prompts(asked: CostOptions, model: CostModel) -> tuple[PromptTokens, PromptTokens]:
    """The prompt, and the same prompt with all visual tokens, which the full model sees."""
    if asked.tokens is not None and asked.text_tokens is not None:
        raise CostError(f"--tokens {asked.tokens} and --text-tokens {asked.text_tokens} are both given. Set one.")
    chosen = _selector(asked.token_selection, model)
    image = model.spec.vision.num_patches if model.spec.vision is not None else None
    visual = _visual(asked, chosen, image)
    if visual is None:
        if asked.tokens is None or chosen is not None:
            raise CostError(
                f"{model.name} takes pictures at their own size, so the number of visual tokens is not known. Pass "
                "--visual-tokens" + (", or all of the prompt with --tokens." if chosen is None else ".")
            )
        visual = 0
    text = MME_TEXT_TOKENS if asked.text_tokens is None else asked.text_tokens
    if asked.tokens is not None:
        text = asked.tokens - visual - 1
        if text < 0:
            raise CostError(
                f"--tokens is {asked.tokens}, but {visual} visual tokens and the latency token are among them. Pass "
                f"{visual + 1} or more, or --visual-tokens."
            )
    prompt = PromptTokens(text, visual)
    # All visual tokens of the image, where these are what the selector chose from.
    whole = replace(prompt, visual=image) if image is not None and _at_tower(chosen) else prompt
    if chosen is not None and chosen.place == "decoder":
        import torch

        prompt = replace(prompt, cut_layer=chosen.layer, kept=int(chosen.kept(torch.tensor([visual]))))
    return prompt, whole


def _at_tower(chosen: Any) -> bool:
    return chosen is not None and chosen.place == "tower"


def _selector(text: str, model: CostModel) -> Any:
    """The selector, None for "none"; checked as the model itself would check it."""
    if text == "none":
        return None
    from adallava.selection import parse_selector

    chosen = parse_selector(text)
    prefix, vision = model.adaptive.prefix_layers, model.spec.vision
    if chosen.place == "decoder" and chosen.layer > prefix:
        raise ConfigError(
            f"token selection {text!r} drops tokens before layer {chosen.layer}, but this model always runs its first "
            f"{prefix} layers only. Choose a layer from 1 to {prefix}."
        )
    if chosen.place == "tower" and chosen.reads_attention and vision is not None and not vision.class_token:
        raise ConfigError(
            f"token selection {text!r} reads where the CLS token looks, but the vision tower of {model.name} has none. "
            "Use 'fastv', 'random', 'uniform' or 'none'."
        )
    return None if chosen.name == "none" else chosen


def _visual(asked: CostOptions, chosen: Any, image: int | None) -> int | None:
    """Visual tokens that enter the decoder; None if they are not known."""
    if asked.visual_tokens is not None:
        return asked.visual_tokens
    if image is None or not _at_tower(chosen):
        return image
    from adallava.selection.common import kept_count

    if chosen.name in ("random", "uniform"):
        return kept_count(image, chosen.count, chosen.ratio)
    if chosen.name == "prumerge" and chosen.ratio is not None:
        kept = kept_count(image, None, chosen.ratio)
        return kept + (kept < image)  # one more token stands for all that were dropped
    if image == _INFERRED_FROM and chosen.ratio is None:
        return PRUMERGE_VISUAL_TOKENS[chosen.name]
    raise CostError(
        f"how many tokens {chosen.name} keeps depends on the picture. Say how many enter the decoder with "
        "--visual-tokens."
    )


# -- the answer -------------------------------------------------------------------------------------------------------


class _Result:
    """The cost of the plan, of the cheapest placement of its switches, and of the full model."""

    def __init__(
        self,
        model: CostModel,
        resolved: ResolvedBudget,
        prompt: PromptTokens,
        whole: PromptTokens,
        setting: Setting,
        asked: CostOptions,
    ) -> None:
        self.model, self.resolved, self.prompt, self.whole = model, resolved, prompt, whole
        self.setting, self.asked = setting, asked
        spec, config = model.spec, model.adaptive
        self.heads = switch_counts(config, resolved.k)
        self.ours = estimate(spec, self.heads, prompt, setting)
        self.packed = estimate(spec, switch_counts(config, resolved.k, packed=True), prompt, setting)
        self.base = estimate(spec, full_loads(spec), whole, setting)

    @property
    def unit(self) -> str:
        return "layers" if self.model.adaptive.variant == "L" else "head groups"

    def total_flops(self, one: Estimate) -> float:
        """Prefill, and the vision tower where it was asked for; they are added only in the strict convention."""
        return one.prefill.flops + ((one.vision_flops or 0) if self.asked.with_vision else 0)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        config, resolved, prompt = self.model.adaptive, self.resolved, self.prompt
        return {
            "model": self.model.name,
            "variant": config.variant,
            "switches_assumed": self.model.assumed,
            "budget": str(resolved.budget),
            "k": resolved.k,
            "units_on": resolved.switches_on,
            "units_total": resolved.total_switches,
            "unit": self.unit,
            "prefix_layers": config.prefix_layers,
            "heads_on": self.heads,
            "placement": "spread evenly" if self._placement_matters() else "any",
            "token_selection": self.asked.token_selection,
            "tokens": {"total": prompt.total, **asdict(prompt)},
            "layer_tokens": prompt.layers(self.model.spec.num_layers),
            "setting": asdict(self.setting),
            "flops_convention": self.setting.convention,
            "bytes_and_time_convention": "paper",
            "cost": self._numbers(self.ours),
            "cost_packed": self._numbers(self.packed),
            "base": {"tokens": {"total": self.whole.total, **asdict(self.whole)}, **self._numbers(self.base)},
            "prefill_flops_frac": self.ours.prefill.flops / self.base.prefill.flops,
        }

    def _numbers(self, one: Estimate) -> dict[str, Any]:
        numbers = asdict(one)
        del numbers["convention"]
        vision = numbers.pop("vision_flops")
        if self.asked.with_vision:
            numbers["vision_flops_strict"] = vision
            if self.setting.convention == STRICT:
                numbers["prefill_and_vision_flops"] = self.total_flops(one)
        return numbers

    def _placement_matters(self) -> bool:
        return self.packed.prefill != self.ours.prefill


def _show(result: _Result) -> None:
    console = Console(highlight=False)
    model, resolved, config = result.model, result.resolved, result.model.adaptive
    always = f"{config.prefix_layers} layers always" if config.variant == "H" else f"{config.prefix_layers} always"
    console.print(
        f"{model.name}, variant {config.variant}, budget {resolved.budget}: {resolved.switches_on} of "
        f"{resolved.total_switches} {result.unit} on ({always}, {resolved.k} of {config.max_k} switches)",
        style="bold",
        soft_wrap=True,
    )
    console.print(_prompt_line(result), soft_wrap=True)
    console.print(_table(result))
    for line in _notes(result):
        console.print(line, style="dim", soft_wrap=True)


def _prompt_line(result: _Result) -> str:
    prompt, setting = result.prompt, result.setting
    parts = [f"{prompt.visual} visual", f"{prompt.text} text", f"{prompt.latency} latency"]
    if result.asked.tokens is not None and result.model.spec.vision is None and not prompt.visual:
        parts = ["latency token included"]
    line = f"prompt: {prompt.total} tokens ({', '.join(parts)})"
    if prompt.kept is not None:
        line += f"; {prompt.kept} visual tokens from layer {prompt.cut_layer} on"
    how = [f"batch {setting.batch}", setting.device, "flash attention" if setting.flash else "unfused attention"]
    if setting.tensor_parallel > 1:
        how.append(f"each of {setting.tensor_parallel} devices")
    return f"{line}; {', '.join(how)}"


def _table(result: _Result) -> Table:
    ours, base = result.ours, result.base
    alone = result.resolved.k == result.model.adaptive.max_k and result.prompt == result.whole
    table = Table(box=None, padding=(0, 2), pad_edge=False)
    table.add_column("")
    table.add_column("")
    table.add_column("full model", justify="right")
    if not alone:
        table.add_column(f"at {result.resolved.budget}", justify="right")
        table.add_column("share", justify="right")

    def row(stage: str, what: str, of_base: float, of_ours: float, text: Any) -> None:
        cells = [text(of_base)] if alone else [text(of_base), text(of_ours), share_text(of_ours / of_base)]
        table.add_row(stage, what, *cells)

    for stage, one, whole in (("prefill", ours.prefill, base.prefill), ("decode step", ours.decode, base.decode)):
        row(stage, f"FLOPs ({result.setting.convention})", whole.flops, one.flops, flops_text)
        if stage == "prefill" and result.asked.with_vision and base.vision_flops and ours.vision_flops is not None:
            row("", "vision FLOPs (strict)", base.vision_flops, ours.vision_flops, flops_text)
            if result.setting.convention == STRICT:
                row("", "both", result.total_flops(base), result.total_flops(ours), flops_text)
        row("", "memory traffic", whole.traffic_bytes, one.traffic_bytes, bytes_text)
        row("", "roofline time", whole.time_ms, one.time_ms, _time_text)
    row("memory", "weights read", base.weight_bytes, ours.weight_bytes, bytes_text)
    row("", "KV cache of the prompt", base.kv_cache_bytes, ours.kv_cache_bytes, bytes_text)
    row("", "footprint", base.footprint_bytes, ours.footprint_bytes, bytes_text)
    return table


def _time_text(ms: float) -> str:
    return ms_text(ms) if ms >= 0.1 else f"{1e3 * ms:.1f} µs"


def _notes(result: _Result) -> list[str]:
    asked, setting = result.asked, result.setting
    notes = []
    if result.ours.prefill != result.packed.prefill:
        packed = result.packed.prefill
        notes.append(
            "for head groups spread evenly over the layers; packed into few layers: "
            f"{flops_text(packed.flops)}, {_time_text(packed.time_ms)}."
        )
    if asked.token_selection.partition(":")[0] in PRUMERGE_VISUAL_TOKENS and asked.visual_tokens is None:
        notes.append(
            "how many tokens PruMerge keeps depends on the picture; this number was inferred from the paper, see "
            "--visual-tokens."
        )
    if result.model.assumed and asked.variant is None:
        notes.append("switches are cut by default: the first half of the layers always runs. See --variant.")
    if result.resolved.budget.unit == "flops" and setting.convention == STRICT:
        notes.append("budgets in FLOPs are always in the paper convention.")
    if setting.tensor_parallel > 1:
        notes.append("per device: matrices, heads and lm_head are split; all-reduces between devices are not counted.")
    notes.append("roofline times are no measurements. Conventions: docs/costs.md.")
    return notes
