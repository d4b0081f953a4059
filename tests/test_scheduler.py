"""Scheduler and LatencyEncoder: parity with recordings of the released code, dtypes, modes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adallava.budget import Budget
from adallava.config import AdaptiveConfig
from adallava.scheduling.scheduler import MODES, Scheduler

GOLDEN = Path(__file__).parent / "golden" / "scheduler"
META = json.loads((GOLDEN / "scheduler.json").read_text())
TENSORS = load_file(GOLDEN / "scheduler.safetensors")


def make_config(variant):
    sizes = {name: META[name] for name in ("num_layers", "num_heads", "hidden_size", "prefix_layers")}
    return AdaptiveConfig(
        variant=variant, num_kv_heads=META["num_heads"], heads_per_switch=META["heads_per_switch"], **sizes
    )


def load(variant):
    scheduler = Scheduler(make_config(variant))
    prefixes = (f"{variant}.latency_encoder.", f"{variant}.head.")
    scheduler.load_state_dict({key[2:]: value for key, value in TENSORS.items() if key.startswith(prefixes)})
    return scheduler.eval()


SCHEDULERS = {variant: load(variant) for variant in "LH"}


def test_number_of_recordings():
    assert len(META["cases"]) == 58
    assert sum(key.endswith("latency_sincos") for key in TENSORS) == 16


@pytest.mark.parametrize("case", META["cases"], ids=lambda case: case["key"])
def test_recorded(case):
    """Budget -> k -> features -> token, and state -> logits -> plan, as the released code computes them."""
    scheduler, key = SCHEDULERS[case["variant"]], case["key"]
    resolved = Budget.parse(case["latency"]).resolve(scheduler.config, clamp=True)
    k = torch.tensor([resolved.k])
    if f"{key}.latency_sincos" in TENSORS:
        features = scheduler.latency_encoder.features(k)[0]
        torch.testing.assert_close(features, TENSORS[f"{key}.latency_sincos"], atol=1e-6, rtol=0)
        with torch.no_grad():
            token = scheduler.encode(k)[0]
        torch.testing.assert_close(token, TENSORS[f"{key}.latency_embedding"], atol=1e-5, rtol=0)
    state = TENSORS[f"{key}.latency_token_hidden"][None]
    with torch.no_grad():
        logits = scheduler.logits(state)[0]
    torch.testing.assert_close(logits, TENSORS[f"{key}.scheduler_logits"], atol=1e-5, rtol=0)
    plan = scheduler.plan(state, k)
    assert torch.equal(plan.gates[0], TENSORS[f"{key}.plan"].bool())
    assert plan.k == [resolved.k]


def test_names_and_initial_weights():
    scheduler = Scheduler(make_config("L"))
    parts = ["weight", "bias"]
    expected = [f"latency_encoder.net.{i}.{part}" for i in (0, 1, 3) for part in parts]
    assert list(scheduler.state_dict()) == expected + [f"head.{part}" for part in parts]
    assert 0.015 < scheduler.head.weight.std() < 0.025
    assert not scheduler.head.bias.any()


def test_every_k_has_its_own_features_even_in_half_precision_models():
    config = AdaptiveConfig(
        variant="H", num_layers=40, num_heads=40, num_kv_heads=40, hidden_size=16, prefix_layers=20, heads_per_switch=1
    )
    encoder = Scheduler(config).bfloat16().latency_encoder
    k = torch.arange(config.max_k + 1)
    features = encoder.features(k)
    assert features.dtype == torch.float32
    assert torch.cdist(features, features).fill_diagonal_(1).min() > 1e-3
    assert encoder(k).dtype == torch.bfloat16


def test_logits_are_float32_under_autocast_and_in_half_precision():
    scheduler = load("H")
    state = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    expected = scheduler.logits(state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(scheduler.logits(state), expected)
    assert scheduler.bfloat16().logits(state.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("variant", ["L", "H"])
@pytest.mark.parametrize("mode", MODES)
def test_modes(variant, mode):
    scheduler = load(variant)
    state, k = torch.randn(3, 64), torch.tensor([0, 2, 4])
    plan = scheduler.plan(state, k, mode=mode)
    assert plan.k == [0, 2, 4]
    trained = scheduler.gates(state, k, mode=mode, training=True)
    assert trained.dtype == torch.float32
    assert scheduler.gates(state, k, mode=mode).dtype == torch.bool
    assert scheduler.train().gates(state, k, mode=mode).dtype == torch.float32
    assert trained.requires_grad == (mode == "learned")


def test_training_reaches_head_and_state():
    scheduler = load("H").train()
    state = torch.randn(2, 64, requires_grad=True)
    gates = scheduler.gates(state, torch.tensor([3, 5]))
    (gates * torch.randn(gates.shape)).sum().backward()
    assert state.grad.abs().sum() > 0
    assert scheduler.head.weight.grad.abs().sum() > 0


def test_unknown_mode():
    with pytest.raises(ValueError, match="mode is 'best', expected one of 'learned', 'random', 'static'"):
        load("L").gates(torch.zeros(1, 64), torch.tensor([0]), mode="best")
