"""What a plain replay of golden/sampling does not show: batches, ties, half precision and the exact distribution."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from adallava.parity.sampling import DRAWS, as_recorded, config_of, frequencies, recorded_noise
from adallava.scheduling.sampling import greedy_gates, sample_gates

GOLDEN = Path(__file__).parent / "golden" / "sampling"
META = json.loads((GOLDEN / "sampling.json").read_text())
TENSORS = load_file(GOLDEN / "sampling.safetensors")
TAU = META["tau"]


def greedy(logits, n):
    config = config_of(logits, None, TAU)
    return as_recorded(greedy_gates(logits[None], torch.tensor([n]), config), config)[0]


def test_rows_of_a_batch_do_not_touch_each_other():
    """The four-layer H recordings with their noise in one batch, each row with its own k."""
    cases = [case for case in META["H"] if case["key"] in ("H0", "H4")]  # the same rank
    config = config_of(TENSORS["H0.logits"], 4, TAU)
    logits = torch.stack([TENSORS[f"{case['key']}.logits"].flatten() for case in cases]).requires_grad_()
    k = torch.tensor([case["n"] for case in cases])

    def noise(part, pick, shape):
        return torch.cat([recorded_noise("H0", TENSORS)(part, pick, (1, *shape[1:])), torch.full((1, *shape[1:]), 1e9)])

    sample = as_recorded(sample_gates(logits, k, config, noise=noise), config)
    sum((sample[i] * TENSORS[f"{case['key']}.c"]).sum() for i, case in enumerate(cases)).backward()
    for i, case in enumerate(cases):
        assert torch.equal(sample[i].detach(), TENSORS[f"{case['key']}.sample"])
        torch.testing.assert_close(logits.grad[i].view(4, 16), TENSORS[f"{case['key']}.grad"], atol=1e-6, rtol=0)


def test_tie_takes_the_lower_layer():
    assert greedy(torch.zeros(4), 2).tolist() == META["tie"]  # the recording is of four equal logits


def test_underflow_of_probabilities_does_not_matter():
    case = META["underflow_fp32"]
    assert greedy(torch.tensor(case["logits"]), case["n"]).tolist() == case["sample"]


def test_near_ties_follow_the_logits_not_half_precision():
    """The one recording we do not follow: the released code ties on fp16 probabilities and takes the lower index."""
    case = META["near_tie_fp16"]
    selected = greedy(torch.tensor(case["logits"], dtype=torch.float16), case["n"])
    assert selected.int().argmax() == case["argmax_of_logits"]
    assert selected.tolist() != case["sample"]


def test_frequencies_are_plackett_luce():
    case = META["frequency"]
    found = frequencies(torch.tensor(case["logits"]), case["n"], None, TAU)
    chi2 = 0.0
    for entry in case["table"]:
        expected = entry["plackett_luce_exact"]
        picked = tuple(int(i in entry["set"]) for i in range(case["K"]))
        chi2 += DRAWS * (found.pop(picked, 0.0) - expected) ** 2 / expected
    assert not found, "sets that the exact distribution does not have"
    assert chi2 < 43.8, "0.1 % point of chi-squared with 19 degrees of freedom"
