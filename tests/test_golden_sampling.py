"""Parity with recordings of the released research code: sampling, its gradient, and greedy selection.

golden/sampling holds, for random logits and recorded noise, the sample, the gradient of a random linear function of
it and the greedy selection; and the frequencies of many draws.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adallava.config import AdaptiveConfig
from adallava.scheduling.sampling import greedy_gates, sample_gates

GOLDEN = Path(__file__).parent / "golden" / "sampling"
META = json.loads((GOLDEN / "sampling.json").read_text())
TENSORS = load_file(GOLDEN / "sampling.safetensors")
SAMPLES = META["L"] + META["H"]
EVALS = META["eval"]
OFFICIAL_PARTS = {"layer": "layer", "attention": "attn", "mlp": "mlp"}


def test_all_recordings_are_used():
    assert (len(SAMPLES), len(EVALS)) == (12, 32)


def config_of(logits, rank=None):
    """A config whose tail is the recorded logits, behind a prefix of one layer."""
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
        tau=META["tau"],
    )


def as_recorded(gates, config):
    """[B, L, 2, G] -> the recorded layout: [B, tail] for L, [B, tail, 2 * G] for H."""
    tail = gates[:, 1:]
    return tail[:, :, 0, 0] if config.variant == "L" else tail.flatten(2)


def replay(key):
    def noise(part, pick, shape):
        if f"{key}.exp_noise" in TENSORS:
            exponential = TENSORS[f"{key}.exp_noise"][pick]
        else:
            exponential = TENSORS[f"{key}.exp_{OFFICIAL_PARTS[part]}.{pick}"]
        assert shape == (1, exponential.numel())
        return -exponential.log()[None]

    return noise


@pytest.mark.parametrize("case", SAMPLES, ids=lambda case: case["key"])
def test_sample_gradient_and_greedy(case):
    key = case["key"]
    recorded = TENSORS[f"{key}.logits"]
    config = config_of(recorded, case.get("rank"))
    logits = recorded.flatten()[None].clone().requires_grad_()
    k = torch.tensor([case["n"]])

    sample = as_recorded(sample_gates(logits, k, config, noise=replay(key)), config)[0]
    torch.testing.assert_close(sample.detach(), TENSORS[f"{key}.sample"], atol=1e-6, rtol=0)
    assert set(sample.detach().unique().tolist()) <= {0.0, 1.0}

    (sample * TENSORS[f"{key}.c"]).sum().backward() if case["n"] else None
    gradient = torch.zeros_like(logits) if logits.grad is None else logits.grad
    torch.testing.assert_close(gradient.view_as(recorded), TENSORS[f"{key}.grad"], atol=1e-6, rtol=0)

    greedy = as_recorded(greedy_gates(logits, k, config), config)[0]
    assert torch.equal(greedy.float(), TENSORS[f"{key}.eval_sample"])


def test_rows_of_a_batch_do_not_touch_each_other():
    """The four-layer H recordings with their noise in one batch, each row with its own k."""
    cases = [case for case in META["H"] if case["key"] in ("H0", "H4")]  # the same rank
    config = config_of(TENSORS["H0.logits"], 4)
    logits = torch.stack([TENSORS[f"{case['key']}.logits"].flatten() for case in cases]).requires_grad_()
    k = torch.tensor([case["n"] for case in cases])

    def noise(part, pick, shape):
        return torch.cat([replay("H0")(part, pick, (1, *shape[1:])), torch.full((1, *shape[1:]), 1e9)])

    sample = as_recorded(sample_gates(logits, k, config, noise=noise), config)
    sum((sample[i] * TENSORS[f"{case['key']}.c"]).sum() for i, case in enumerate(cases)).backward()
    for i, case in enumerate(cases):
        assert torch.equal(sample[i].detach(), TENSORS[f"{case['key']}.sample"])
        torch.testing.assert_close(logits.grad[i].view(4, 16), TENSORS[f"{case['key']}.grad"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", EVALS, ids=lambda case: case["key"])
def test_greedy(case):
    logits = TENSORS[f"{case['key']}.logits"]
    config = config_of(logits, case.get("rank"))
    gates = greedy_gates(logits.flatten()[None], torch.tensor([case["n"]]), config)
    assert torch.equal(as_recorded(gates, config)[0].float(), TENSORS[f"{case['key']}.sample"])


def test_tie_takes_the_lower_layer():
    logits = torch.zeros(4)  # the recording is of four equal logits
    selected = as_recorded(greedy_gates(logits[None], torch.tensor([2]), config_of(logits)), config_of(logits))[0]
    assert selected.tolist() == META["tie"]


def test_underflow_of_probabilities_does_not_matter():
    case = META["underflow_fp32"]
    logits = torch.tensor(case["logits"])
    k = torch.tensor([case["n"]])
    selected = as_recorded(greedy_gates(logits[None], k, config_of(logits)), config_of(logits))[0]
    assert selected.tolist() == case["sample"]


def test_near_ties_follow_the_logits_not_half_precision():
    """The one recording we do not follow: the released code ties on fp16 probabilities and takes the lower index."""
    case = META["near_tie_fp16"]
    logits = torch.tensor(case["logits"], dtype=torch.float16)
    k = torch.tensor([case["n"]])
    selected = as_recorded(greedy_gates(logits[None], k, config_of(logits)), config_of(logits))[0]
    assert selected.int().argmax() == case["argmax_of_logits"]
    assert selected.tolist() != case["sample"]


def frequencies(logits, n, rank, draws):
    config = config_of(logits, rank)
    batch = logits.flatten().expand(draws, -1)
    k = torch.full((draws,), n)
    generator = torch.Generator().manual_seed(0)
    selected = as_recorded(sample_gates(batch, k, config, generator=generator), config).flatten(1) > 0.5
    rows, counts = selected.unique(dim=0, return_counts=True)
    return {tuple(row.int().tolist()): count for row, count in zip(rows, counts.tolist(), strict=True)}


def test_frequencies_are_plackett_luce():
    case, draws = META["frequency"], 40_000
    counts = frequencies(torch.tensor(case["logits"]), case["n"], None, draws)
    chi2 = 0.0
    for entry in case["table"]:
        expected = draws * entry["plackett_luce_exact"]
        picked = tuple(int(i in entry["set"]) for i in range(case["K"]))
        chi2 += (counts.pop(picked, 0) - expected) ** 2 / expected
    assert not counts, "sets that the exact distribution does not have"
    assert chi2 < 43.8, "0.1 % point of chi-squared with 19 degrees of freedom"


def test_frequencies_of_heads():
    case, draws = META["frequency_H"], 40_000
    counts = frequencies(torch.tensor(case["logits"]), case["n"], case["rank"], draws)
    assert len(case["table"]) == 51
    for bits, recorded in case["table"].items():
        ours = counts.pop(tuple(map(int, bits)), 0) / draws
        error = (recorded * (1 - recorded) * (1 / draws + 1 / case["draws"])) ** 0.5
        assert abs(ours - recorded) < 4.5 * error, bits
    assert not counts, "sets that the recording never saw"
