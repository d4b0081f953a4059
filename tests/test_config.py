"""AdaptiveConfig: counts, checks and its file."""

import json
from types import SimpleNamespace

import pytest

from adallava.config import AdaptiveConfig, default_heads_per_switch
from adallava.errors import ConfigError


def make(**fields):
    base = dict(variant="H", num_layers=8, num_heads=8, num_kv_heads=8, hidden_size=64, prefix_layers=4)
    return AdaptiveConfig(**{**base, "heads_per_switch": 4, **fields})


@pytest.mark.parametrize(
    ("fields", "total", "prefix", "per_layer", "logits"),
    [
        (dict(variant="L"), 8, 4, 1, 4),
        (dict(variant="L", num_kv_heads=2), 8, 4, 1, 4),
        (dict(), 16, 8, 2, 4 * 2 * 8),
        (dict(num_kv_heads=2), 16, 8, 2, 4 * 2 * 2),
        (dict(heads_per_switch=2), 32, 16, 4, 4 * 2 * 8),
        # LLaVA-1.5 7B and 13B
        (dict(num_layers=32, num_heads=32, num_kv_heads=32, prefix_layers=16, heads_per_switch=8), 128, 64, 4, 1024),
        (dict(num_layers=40, num_heads=40, num_kv_heads=40, prefix_layers=20, heads_per_switch=8), 200, 100, 5, 1600),
    ],
)
def test_counts(fields, total, prefix, per_layer, logits):
    config = make(**fields)
    assert config.total_switches == total
    assert config.prefix_switches == prefix
    assert config.max_k == total - prefix
    assert config.switches_per_layer == per_layer
    assert config.num_logits == logits
    assert config.groups == config.num_kv_heads
    assert config.groups_per_switch * config.switches_per_layer == config.groups


def test_l_ignores_heads_per_switch():
    assert make(variant="L", num_heads=6, num_kv_heads=6).total_switches == 8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(variant="X"), "variant is 'X', expected one of 'L', 'H'"),
        (dict(prefix_layers=0), "prefix_layers is 0.*Layer 0 always runs"),
        (dict(prefix_layers=8), "prefix_layers is 8 and num_layers is 8.*from 1 to 7"),
        (dict(num_layers=True), "num_layers is True"),
        (dict(hidden_size=64.0), "hidden_size is 64.0, expected a whole number"),
        (dict(num_kv_heads=3), "num_heads 8 is not a multiple of num_kv_heads 3"),
        (dict(heads_per_switch=3), "heads_per_switch is 3.*Choose one of 1, 2, 4, 8"),
        (dict(heads_per_switch=2, num_kv_heads=2), "heads_per_switch is 2.*4 query heads.*Choose one of 4, 8"),
        (dict(heads_per_switch=0), "heads_per_switch is 0"),
        (dict(tau=0), "tau is 0"),
        (dict(tau=float("nan")), "tau is nan"),
        (dict(tau="5"), "tau is '5'"),
        (dict(latency_dim=255), "latency_dim is 255, expected an even number"),
        (
            dict(token_selection="prumerge++"),
            "token_selection is 'prumerge\\+\\+', expected one of.*Did you mean 'prumerge\\+'",
        ),
        (dict(base_model=3), "base_model is 3"),
        (dict(format_version=2), "format_version is 2, but this adallava reads format_version 1"),
    ],
)
def test_contradictions_raise(fields, message):
    with pytest.raises(ConfigError, match=message):
        make(**fields)


def test_json_round_trip(tmp_path):
    config = make(base_model="some/model", tau=3)
    config.to_json_file(tmp_path / "adaptive_config.json")
    assert AdaptiveConfig.from_json_file(tmp_path / "adaptive_config.json") == config
    assert AdaptiveConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prefix_layer": 3}, "unknown key 'prefix_layer'.*Did you mean 'prefix_layers'"),
        ({"format_version": 9, "whatever": 1}, "format_version is 9.*Install the adallava that wrote the file"),
        ({"variant": "Q"}, "variant is 'Q'"),
    ],
)
def test_bad_files_name_the_file(tmp_path, change, message):
    path = tmp_path / "adaptive_config.json"
    path.write_text(json.dumps({**make().to_dict(), **change}))
    with pytest.raises(ConfigError, match=f"adaptive_config.json: .*{message}"):
        AdaptiveConfig.from_json_file(path)


def test_missing_keys_and_broken_json(tmp_path):
    with pytest.raises(ConfigError, match="lacks variant, num_layers"):
        AdaptiveConfig.from_dict({})
    with pytest.raises(ConfigError, match="JSON object"):
        AdaptiveConfig.from_dict([])
    path = tmp_path / "c.json"
    path.write_text("{")
    with pytest.raises(ConfigError, match="c.json is not JSON"):
        AdaptiveConfig.from_json_file(path)


def test_from_model_config():
    text = SimpleNamespace(num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, hidden_size=896)
    config = AdaptiveConfig.from_model_config(text, variant="H")
    assert (config.prefix_layers, config.heads_per_switch, config.num_kv_heads) == (12, 7, 2)
    phi = SimpleNamespace(num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=None, hidden_size=2560)
    config = AdaptiveConfig.from_model_config(phi, variant="H", prefix_layers=8, tau=2)
    assert (config.prefix_layers, config.heads_per_switch, config.num_kv_heads, config.tau) == (8, 8, 32, 2.0)
    with pytest.raises(ConfigError, match="SimpleNamespace has no num_hidden_layers.*text_config"):
        AdaptiveConfig.from_model_config(SimpleNamespace(), variant="L")


@pytest.mark.parametrize(
    ("heads", "kv_heads", "expected"),
    [(32, 32, 8), (40, 40, 8), (32, 8, 8), (4, 4, 1), (4, 2, 2), (8, 8, 2), (12, 12, 3), (14, 2, 7), (28, 4, 7)],
)
def test_default_heads_per_switch(heads, kv_heads, expected):
    assert default_heads_per_switch(heads, kv_heads) == expected
