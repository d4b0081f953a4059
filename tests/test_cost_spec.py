"""ModelSpec from configs, loads from execution plans, the device table, and that the room runs without torch."""

import dataclasses
import subprocess
import sys
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch

from adallava.config import AdaptiveConfig
from adallava.cost import (
    DEVICES,
    LLAVA_1_5_7B,
    LLAVA_1_5_13B,
    SPECS,
    CostError,
    Device,
    LayerLoad,
    ModelSpec,
    Op,
    as_loads,
    decode_step_time_ms,
    full_loads,
    get_device,
    op_time_ms,
    plan_loads,
    prefill,
    prefill_time_ms,
)
from adallava.errors import ConfigError, PlanError, UnknownNameError
from adallava.plan import ExecutionPlan
from tiny import HOSTS, tiny_base, tiny_config

TEXT = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "vocab_size": 100,
}
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}
SPEC = ModelSpec(64, 96, 6, 8, 8, 8, 100)


def as_object(data):
    return SimpleNamespace(**{key: as_object(v) if isinstance(v, dict) else v for key, v in data.items()})


# -- specs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [dict, as_object])
@pytest.mark.parametrize("nested", [lambda text: text, lambda text: {"text_config": text}])
def test_from_config_reads_dicts_and_objects_flat_and_nested(form, nested):
    assert ModelSpec.from_config(form(nested(TEXT))) == SPEC
    gqa = ModelSpec.from_config(form(nested({**TEXT, "num_key_value_heads": 2, "head_dim": 16})))
    assert gqa == dataclasses.replace(SPEC, num_kv_heads=2, head_dim=16)
    assert gqa.heads_per_kv_head == 4
    # Configs spell "the usual" as None.
    assert ModelSpec.from_config(form(nested({**TEXT, "num_key_value_heads": None, "head_dim": None}))) == SPEC


@pytest.mark.parametrize("vision", [VISION, {"vision_tower": VISION}], ids=["plain", "mipha"])
def test_from_config_reads_the_vision_tower(vision):
    spec = ModelSpec.from_config({"text_config": TEXT, "vision_config": vision})
    assert spec.vision.num_patches == 16
    assert spec.vision.projector_hidden_size == 64
    assert spec.vision.class_token
    siglip = ModelSpec.from_config({"text_config": TEXT, "vision_config": {**VISION, "model_type": "siglip"}})
    assert not siglip.vision.class_token
    other = ModelSpec.from_config({"text_config": TEXT, "vision_config": {"depth": 3}})
    assert other.vision is None


def test_from_config_reads_real_transformers_configs():
    transformers = pytest.importorskip("transformers")
    assert ModelSpec.from_config(transformers.LlavaConfig()).vision == LLAVA_1_5_7B.vision
    llava = ModelSpec.from_config(transformers.LlavaConfig())
    assert llava == LLAVA_1_5_7B
    assert ModelSpec.from_config(transformers.LlavaConfig().to_dict()) == llava
    phi = ModelSpec.from_config(transformers.PhiConfig())
    assert not phi.gated_mlp and phi.num_kv_heads == phi.num_heads == 32


@pytest.mark.parametrize("host", HOSTS)
def test_from_config_reads_every_host(host):
    spec = ModelSpec.from_config(tiny_config(host))
    sizes = (spec.hidden_size, spec.intermediate_size, spec.num_layers, spec.num_heads, spec.num_kv_heads)
    assert sizes == (32, 50, 6, 4, HOSTS[host].kv_heads)
    assert spec.gated_mlp == (HOSTS[host].decoder != "phi")


@pytest.mark.parametrize("host", ["llava", "llava-phi", "mipha", "paligemma2", "qwen3-vl"])
def test_weight_bytes_of_a_plan_are_those_of_the_decoder(host):
    """The cost model's matrices are the model's own: for example two in Phi's MLP, three in the others'."""
    model = tiny_base(host)
    matrices = [w for n, w in model.named_parameters() if "language_model.layers" in n and w.dim() == 2]
    held = 2 * (sum(w.numel() for w in matrices) + model.lm_head.weight.numel())
    spec = ModelSpec.from_config(model.config)
    assert sum(op.weight_bytes * count for op, count in prefill(spec, full_loads(spec), 10).ops) == held


def test_missing_sizes_are_named():
    partial = {key: TEXT[key] for key in ("model_type", "hidden_size", "num_attention_heads", "vocab_size")}
    with pytest.raises(ConfigError, match=r"lacks intermediate_size, num_hidden_layers of the language model"):
        ModelSpec.from_config({"text_config": partial})
    with pytest.raises(ConfigError, match="SimpleNamespace lacks hidden_size"):
        ModelSpec.from_config(SimpleNamespace())


def test_contradicting_and_uncounted_configs():
    with pytest.raises(ConfigError, match="num_heads 8 is not a multiple of num_kv_heads 3"):
        ModelSpec.from_config({**TEXT, "num_key_value_heads": 3})
    with pytest.raises(ConfigError, match="hidden_size 65 is not a multiple of num_attention_heads 8"):
        ModelSpec.from_config({**TEXT, "hidden_size": 65})
    with pytest.raises(ConfigError, match="num_local_experts = 8"):
        ModelSpec.from_config({**TEXT, "num_local_experts": 8})
    with pytest.raises(ConfigError, match="vocab_size is -1"):
        ModelSpec.from_config({**TEXT, "vocab_size": -1})
    with pytest.raises(ConfigError, match="patch_size is 0"):
        ModelSpec.from_config({"text_config": TEXT, "vision_config": {**VISION, "patch_size": 0}})


def test_shipped_specs():
    assert {"llava-1.5-7b", "llava-1.5-13b", "mipha-3b", "qwen2-vl-7b"} <= set(SPECS)
    assert SPECS["llava-1.5-13b"] is LLAVA_1_5_13B
    for spec in SPECS.values():
        assert spec.num_heads * spec.head_dim == spec.hidden_size
    patches = {name: spec.vision and spec.vision.num_patches for name, spec in SPECS.items()}
    assert (patches["llava-1.5-7b"], patches["mipha-3b"], patches["qwen2-vl-7b"]) == (576, 729, None)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llava-1.5-7b", 6.74),
        ("llava-1.5-13b", 13.02),
        ("mipha-3b", 2.78),
        ("qwen2-vl-2b", 1.54),
        ("qwen2-vl-7b", 7.62),
        ("qwen2.5-vl-3b", 3.09),
        ("qwen2.5-vl-7b", 7.62),
    ],
)
def test_shipped_specs_have_the_published_number_of_parameters(name, billions):
    """Of the language model, as its authors state it; biases and norms are below 0.1 %."""
    spec = SPECS[name]
    matrices = sum(op.weight_bytes * count for op, count in prefill(spec, full_loads(spec), 1).ops) / 2
    tied = name in ("qwen2-vl-2b", "qwen2.5-vl-3b")  # one matrix is embedding and lm_head
    assert (matrices + (0 if tied else spec.vocab_size * spec.hidden_size)) / 1e9 == pytest.approx(billions, abs=0.006)


def test_the_released_llava_layout_names_its_tower():
    flat = {**TEXT, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000}
    flat |= {"num_attention_heads": 32, "mm_vision_tower": "openai/clip-vit-large-patch14-336"}
    assert ModelSpec.from_config(flat) == LLAVA_1_5_7B
    assert ModelSpec.from_config({**flat, "mm_vision_tower": "some/other"}).vision is None


# -- loads ------------------------------------------------------------------------------------------------------------


def adaptive(variant, num_kv_heads=8):
    return AdaptiveConfig(
        variant=variant,
        num_layers=6,
        num_heads=8,
        num_kv_heads=num_kv_heads,
        hidden_size=64,
        prefix_layers=3,
        heads_per_switch=4,
    )


def test_loads_of_an_l_plan():
    plan = ExecutionPlan.from_switches(torch.tensor([[True, False, True], [False, False, False]]), adaptive("L"))
    assert plan_loads(SPEC, plan, 0) == as_loads(SPEC, [8, 8, 8, 8, 0, 8])
    assert plan_loads(SPEC, plan, 1) == as_loads(SPEC, [8, 8, 8, 0, 0, 0])
    assert plan_loads(SPEC, ExecutionPlan.full(adaptive("L"))) == full_loads(SPEC)
    with pytest.raises(PlanError, match="the plan has 2 rows. Say which one: row=0 to row=1"):
        plan_loads(SPEC, plan)
    with pytest.raises(PlanError, match="row 2 of a plan with 2 rows"):
        plan_loads(SPEC, plan, 2)


def test_loads_of_an_h_plan_count_groups_by_their_heads():
    config = adaptive("H", num_kv_heads=2)
    gates = torch.ones(1, 6, 2, 2, dtype=torch.bool)
    gates[0, 3, 0, 1] = gates[0, 3, 1, 0] = False  # other columns for attention than for the MLP
    gates[0, 5] = False
    gqa = dataclasses.replace(SPEC, num_kv_heads=2)
    loads = plan_loads(gqa, ExecutionPlan(gates, config))
    assert loads == as_loads(gqa, [8, 8, 8, 4, 8, 0])
    assert loads[3] == LayerLoad(4, Fraction(1, 2)) and not loads[5].runs
    assert plan_loads(gqa, SimpleNamespace(gates=gates.tolist())) == loads


def test_loads_of_a_plan_for_another_model():
    plan = ExecutionPlan.full(adaptive("L"))
    with pytest.raises(PlanError, match="the plan has 6 layers, but the model has 32"):
        plan_loads(LLAVA_1_5_7B, plan)
    odd = SimpleNamespace(gates=[[[[1, 1, 1], [1, 1, 1]]] * 6])
    with pytest.raises(PlanError, match="gates have 3 attention and 3 MLP groups"):
        plan_loads(SPEC, odd)


def test_loads_out_of_range():
    with pytest.raises(PlanError, match="heads_on is -1"):
        LayerLoad(-1, Fraction(1))
    for wrong in (Fraction(3, 2), 0.5):
        with pytest.raises(PlanError, match="mlp_frac is .*, expected a Fraction from 0 to 1"):
            LayerLoad(1, wrong)


# -- devices ----------------------------------------------------------------------------------------------------------


def test_device_table():
    names = DEVICES.names()
    assert len(names) == 13
    ridges = {name: round(get_device(name).ridge_flops_per_byte, 1) for name in names}
    assert ridges == {
        "nvidia_V100": 124.4,
        "nvidia_A6000": 201.6,
        "nvidia_A6000_Ada": 379.4,
        "nvidia_A100": 200.6,
        "nvidia_A100_40G": 200.6,
        "nvidia_A100_80G": 153.0,
        "nvidia_A800_80G_SXM": 153.0,
        "nvidia_A40": 215.1,
        "nvidia_H100": 322.1,
        "nvidia_H100_SXM": 322.1,
        "nvidia_H100_PCIe": 369.4,
        "nvidia_L40": 209.5,
        "intel_13900k": 15.4,
    }


def test_unknown_devices_get_a_suggestion():
    with pytest.raises(UnknownNameError, match="unknown device 'nvidia_V10'. Did you mean 'nvidia_V100'"):
        prefill_time_ms(SPEC, [8] * 6, 50, "nvidia_V10")
    with pytest.raises(CostError, match="bandwidth_bytes_per_s of device 'mine' is 0"):
        Device("mine", 0, 1.0, None, 1.0)


def test_an_op_takes_the_longer_of_arithmetic_and_traffic():
    device = Device("slow", bandwidth_bytes_per_s=10.0, fp16_flops_per_s=100.0, int8_ops_per_s=None, onchip_bytes=1.0)
    assert op_time_ms(Op("arithmetic", 1000, weight_bytes=50), device) == 10_000
    assert op_time_ms(Op("traffic", 1000, 50, 20, 30, 40, 60), device) == 20_000


def test_one_decoding_step_of_7b_is_bound_by_reading_the_weights():
    time_ms = decode_step_time_ms(LLAVA_1_5_7B, [32] * 32, 645)
    weights_ms = 2 * (32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32000) / 900e9 * 1e3
    assert weights_ms < time_ms < 1.05 * weights_ms


def test_flash_attention_is_one_op_with_the_same_flops():
    plan, s = [8, 8, 8, 8, 4, 0], 50
    plain, flash = prefill(SPEC, plan, s), prefill(SPEC, plan, s, flash_onchip_bytes=64)
    assert plain.flops == flash.flops
    fused = next(op for op, _ in flash.ops if op.name == "flash_attention")
    # 64 bytes hold 4 rows of 8 values, so that keys and values are read ceil(50 / 4) = 13 times.
    assert fused.kv_read_bytes == 13 * 2 * (2 * s * 64)
    assert (fused.act_read_bytes, fused.act_write_bytes) == (2 * s * 64, 4 * s * s * 8)
    assert prefill_time_ms(LLAVA_1_5_7B, [32] * 32, 645, flash=True) < prefill_time_ms(LLAVA_1_5_7B, [32] * 32, 645)


def test_the_room_runs_without_torch_and_transformers():
    code = (
        "import sys; import adallava.cost as c; "
        "c.plan_cost(c.LLAVA_1_5_7B, [32] * 32, 645); c.prefill_time_ms(c.LLAVA_1_5_7B, [32] * 32, 645); "
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
