"""Recordings of Algorithm 1: samples and gradients for given noise, and the greedy choice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from adallava.config import AdaptiveConfig
from adallava.parity.tally import Quantity, Tally
from adallava.scheduling.sampling import NoiseSource, greedy_gates, sample_gates

TOLERANCE = 1e-6
STANDARD_ERRORS = 4.5
DRAWS = 40_000
PARTS = {"layer": "layer", "attention": "attn", "mlp": "mlp"}
"""Our names of the draws of one pick of variant H -> the recorded ones."""


def replay_sampling(folder: Path, name: str) -> list[Quantity]:
    """Replay ``folder``: ``sampling.json`` and ``sampling.safetensors``."""
    meta = json.loads((folder / "sampling.json").read_text(encoding="utf-8"))
    recorded, tally = load_file(folder / "sampling.safetensors"), Tally(name)
    for case in [*meta["L"], *meta["H"]]:
        _replay(case, recorded, tally, meta["tau"])
    for case in meta["eval"]:
        key = case["key"]
        config = config_of(recorded[f"{key}.logits"], case.get("rank"), meta["tau"])
        greedy = greedy_gates(recorded[f"{key}.logits"].flatten()[None], torch.tensor([case["n"]]), config)
        wanted = recorded.get(f"{key}.eval_sample", recorded.get(f"{key}.sample"))
        if wanted is not None:
            tally.same("greedy choice", key, as_recorded(greedy, config)[0].view_as(wanted), wanted)
    for key in ("frequency", "frequency_H"):
        if key in meta:
            tally.close("set frequencies / error", key, *_frequency_errors(meta[key], meta["tau"]), STANDARD_ERRORS)
    return tally.rows()


def _frequency_errors(case: dict[str, Any], tau: float) -> tuple[Tensor, Tensor]:
    """How far our frequency of each set of switches is from the recorded one, in standard errors, and zeros."""
    logits, recorded = torch.tensor(case["logits"]), recorded_frequencies(case)
    ours = frequencies(logits, case["n"], case.get("rank"), tau)
    errors = []
    for chosen in ours.keys() | recorded.keys():
        p = recorded.get(chosen, 0.0)
        # A set that was never recorded, or never drawn, counts as if it had come up once.
        spread = max(p * (1 - p), 1 / case["draws"]) * (1 / DRAWS + 1 / case["draws"])
        errors.append((ours.get(chosen, 0.0) - p) / spread**0.5)
    found = torch.tensor(errors)
    return found, torch.zeros_like(found)


def recorded_frequencies(case: dict[str, Any]) -> dict[tuple[int, ...], float]:
    """A recorded table as set -> frequency, a set being a flag for every entry of the flattened logits."""
    if isinstance(case["table"], dict):
        return {tuple(map(int, bits)): p for bits, p in case["table"].items()}
    sets = ((entry["set"], entry["freq_200k"]) for entry in case["table"])
    return {tuple(int(i in chosen) for i in range(case["K"])): p for chosen, p in sets}


def frequencies(logits: Tensor, n: int, rank: int | None, tau: float) -> dict[tuple[int, ...], float]:
    """How often each set comes up in ``DRAWS`` draws of n switches from the logits, seed 0."""
    config = config_of(logits, rank, tau)
    k, generator = torch.full((DRAWS,), n), torch.Generator().manual_seed(0)
    gates = sample_gates(logits.flatten().expand(DRAWS, -1), k, config, generator=generator)
    rows, counts = (as_recorded(gates, config).flatten(1) > 0.5).unique(dim=0, return_counts=True)
    return {tuple(row.int().tolist()): c / DRAWS for row, c in zip(rows, counts.tolist(), strict=True)}


def _replay(case: dict[str, Any], recorded: dict[str, Tensor], tally: Tally, tau: float) -> None:
    key, k = case["key"], torch.tensor([case["n"]])
    logits = recorded[f"{key}.logits"].clone().requires_grad_()
    config = config_of(logits, case.get("rank"), tau)
    gates = sample_gates(logits.flatten()[None], k, config, noise=recorded_noise(key, recorded))
    sample = as_recorded(gates, config)[0].view_as(logits)
    tally.close("sample", key, sample, recorded[f"{key}.sample"], TOLERANCE)
    if f"{key}.grad" in recorded:
        # With k = 0 nothing is drawn and the sample hangs on no logit; the gradient is then recorded as zero.
        value = (sample * recorded[f"{key}.c"]).sum() + 0 * logits.sum()
        (gradient,) = torch.autograd.grad(value, logits)
        tally.close("straight-through gradient", key, gradient, recorded[f"{key}.grad"], TOLERANCE)
    greedy = as_recorded(greedy_gates(logits.detach().flatten()[None], k, config), config)[0]
    tally.same("greedy choice", key, greedy.view_as(logits), recorded[f"{key}.eval_sample"])


def config_of(logits: Tensor, rank: int | None, tau: float) -> AdaptiveConfig:
    """A config whose tail is what the recorded logits score, behind a prefix of one layer.

    logits: [N - P] for L, [N - P, 2 * heads] for H.
    """
    variant = "L" if logits.dim() == 1 else "H"
    heads = 4 if variant == "L" else logits.shape[1] // 2
    return AdaptiveConfig(
        variant=variant,
        num_layers=logits.shape[0] + 1,
        num_heads=heads,
        num_kv_heads=heads,
        hidden_size=8,
        prefix_layers=1,
        heads_per_switch=rank or heads,
        tau=tau,
    )


def as_recorded(gates: Tensor, config: AdaptiveConfig) -> Tensor:
    """Gates [B, L, 2, G] in the recorded layout, without the prefix: [B, N - P] for L, [B, N - P, 2 * G] for H."""
    tail = gates[:, config.prefix_layers :]
    return tail[:, :, 0, 0] if config.variant == "L" else tail.flatten(2)


def gumbel(exponential: Tensor) -> Tensor:
    """Gumbel noise from the recorded draws of Exp(1)."""
    return -exponential.log()


def recorded_noise(key: str, recorded: dict[str, Tensor]) -> NoiseSource:
    """The recorded draws of one sampling case, as noise for a batch of one."""

    def draw(part: str, pick: int, shape: tuple[int, ...]) -> Tensor:
        if f"{key}.exp_noise" in recorded:
            return gumbel(recorded[f"{key}.exp_noise"][pick])[None]
        return gumbel(recorded[f"{key}.exp_{PARTS[part]}.{pick}"])[None]

    return draw
