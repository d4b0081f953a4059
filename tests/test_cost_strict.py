"""The strict convention is what torch's FLOP counter counts on transformers' models, to the integer."""

import pytest
import torch
import transformers as hf
from torch.utils.flop_counter import FlopCounterMode
from transformers.cache_utils import DynamicCache

from adallava.cost import (
    LLAVA_1_5_7B,
    CostError,
    ModelSpec,
    full_loads,
    plan_loads,
    prefill_flops,
    projector_flops,
    strict_decode_step_flops,
    strict_prefill_flops,
    vision_tower_flops,
)
from adallava.plan import ExecutionPlan
from matrix import inputs_of
from tiny import tiny_vlm

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "vocab_size": 100,
}
DECODERS = {
    "llama": (hf.LlamaConfig, {}),
    "llama-gqa": (hf.LlamaConfig, {"num_key_value_heads": 2}),
    "llama-wide-heads": (hf.LlamaConfig, {"num_key_value_heads": 4, "head_dim": 24}),
    "llama-biased": (hf.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "phi": (hf.PhiConfig, {}),
    "qwen2": (hf.Qwen2Config, {"num_key_value_heads": 2}),
}


def count(function, *args, **kwargs):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*args, **kwargs)
    return counter.get_total_flops()


def on_meta(config, attention="sdpa"):
    with torch.device("meta"):
        return hf.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def prompt(batch, queries, keys):
    """Inputs on the meta device; the mask is given, because its making looks at values."""
    ids = torch.zeros(batch, queries, dtype=torch.long, device="meta")
    return {"input_ids": ids, "attention_mask": torch.zeros(batch, 1, queries, keys, device="meta")}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", DECODERS)
def test_prefill_and_decoding_step_of_every_decoder(name, attention):
    made, own = DECODERS[name]
    config = made(**SIZES, **own)
    spec, model, cache = ModelSpec.from_config(config), on_meta(config, attention), DynamicCache()
    full = full_loads(spec)
    for batch, tokens in ((1, 50), (2, 17)):
        inputs = prompt(batch, tokens, tokens)
        for logits, keep in (("last", 1), ("all", 0)):
            counted = count(model, **inputs, logits_to_keep=keep, use_cache=False)
            assert strict_prefill_flops(spec, full, tokens, logits=logits, batch=batch) == counted
    with torch.no_grad():
        model(**prompt(2, 17, 17), past_key_values=cache, use_cache=True)
    step = count(model, **prompt(2, 1, 18), past_key_values=cache, use_cache=True)
    assert strict_decode_step_flops(spec, full, 18, batch=2) == step


def test_layers_left_out():
    """A plan that skips layers costs what a model without them does."""
    config = hf.LlamaConfig(**SIZES)
    spec = ModelSpec.from_config(config)
    one = on_meta(hf.LlamaConfig(**{**SIZES, "num_hidden_layers": 1}))
    assert strict_prefill_flops(spec, [8, 0, 0], 50) == count(one, **prompt(1, 50, 50), logits_to_keep=1)
    assert strict_prefill_flops(spec, [0, 8, 0], 50) == strict_prefill_flops(spec, [8, 0, 0], 50)


# -- LLaVA-1.5-7B -----------------------------------------------------------------------------------------------------


def test_llava_1_5_7b_at_624_tokens():
    spec, full = LLAVA_1_5_7B, full_loads(LLAVA_1_5_7B)
    last = strict_prefill_flops(spec, full, 624)
    every = strict_prefill_flops(spec, full, 624, logits="all")
    assert (last, every) == (8_286_462_017_536, 8_449_777_729_536)
    assert isinstance(last, int) and isinstance(every, int)
    assert prefill_flops(spec, full, 624) - last == 3_334_733_824
    model = on_meta(hf.LlavaConfig().text_config)
    assert count(model, **prompt(1, 624, 624), use_cache=False, logits_to_keep=1) == last
    vision = vision_tower_flops(spec) + projector_flops(spec)
    assert (last + vision, every + vision) == (8_692_539_424_768, 8_855_855_136_768)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_vision_tower_and_projector(kind):
    config = hf.LlavaConfig()
    if kind == "siglip":
        sizes = {"hidden_size": 96, "intermediate_size": 130, "num_hidden_layers": 2, "num_attention_heads": 4}
        vision = hf.SiglipVisionConfig(**sizes, image_size=60, patch_size=14, vision_use_head=False)
        config = hf.LlavaConfig(vision_config=vision)
    spec = ModelSpec.from_config(config)
    with torch.device("meta"):
        tower = hf.AutoModel.from_config(config.vision_config)
        projector = hf.models.llava.modeling_llava.LlavaMultiModalProjector(config)
        side = config.vision_config.image_size
        pixels, patches = torch.zeros(1, 3, side, side), torch.zeros(1, 7, config.vision_config.hidden_size)
    assert vision_tower_flops(spec) == count(tower, pixel_values=pixels)
    assert projector_flops(spec, visual_tokens=7) == count(projector, patches)
    with pytest.raises(CostError, match="visual_tokens is 1000, but an image has"):
        projector_flops(spec, visual_tokens=1000)


# -- plans ------------------------------------------------------------------------------------------------------------


def random_plan(config, seed):
    """Switches of the tail at random; attention and MLP columns of a layer are drawn apart, as many of each."""
    generator = torch.Generator().manual_seed(seed)
    gates = torch.ones(1, config.num_layers, 2, config.groups, dtype=torch.bool)
    for layer in range(config.prefix_layers, config.num_layers):
        on = int(torch.randint(config.switches_per_layer + 1, (), generator=generator)) * config.groups_per_switch
        for half in range(2):
            gates[0, layer, half] = torch.randperm(config.groups, generator=generator).argsort() < on
    return ExecutionPlan(gates, config)


@pytest.mark.parametrize("variant", ["L", "H"])
@pytest.mark.parametrize("host", ["llava", "llava-gqa", "llava-qwen2", "mipha"])
def test_a_skipped_forward_costs_what_its_plan_says(host, variant):
    """Of real models, cut down to the layers, heads and neurons of a plan: tower, projector and decoder together."""
    vlm = tiny_vlm(host, variant)
    vlm.model.set_attn_implementation("eager")
    spec, inputs = vlm.spec, inputs_of(vlm, "how many ?")
    k = torch.tensor([vlm.adaptive_config.max_k])
    others = count(vlm.scheduler.encode, k) + vision_tower_flops(spec) + projector_flops(spec)
    others += _pooling_head(vlm.model, inputs)
    for seed in range(3):
        plan = random_plan(vlm.adaptive_config, seed)
        counted = count(vlm, **inputs, ada_state=vlm.request_state(torch.tensor(plan.k), plan=plan))
        loads = plan_loads(spec, plan, whole_neurons=True)
        tokens = inputs["input_ids"].shape[1] + 1
        assert strict_prefill_flops(spec, loads, tokens, logits="all") + others == counted, plan.describe()


def _pooling_head(model, inputs):
    """What a SigLIP tower has behind its layers, which nobody reads and the cost model leaves out."""
    head = getattr(model.model.vision_tower, "head", None)
    if head is None:
        return 0
    spec = ModelSpec.from_config(model.config).vision
    return count(head, torch.zeros(1, spec.num_patches, spec.hidden_size))


def test_whole_neurons():
    """Four groups of 50 neurons have 13, 13, 12 and 12; the paper's convention gives each a quarter."""
    vlm = tiny_vlm("llava", "H")
    config, spec = vlm.adaptive_config, vlm.spec
    gates = torch.ones(1, config.num_layers, 2, config.groups, dtype=torch.bool)
    gates[0, -1] = torch.tensor([[True, True, False, False], [False, False, True, True]])
    plan = ExecutionPlan(gates, config)
    assert [float(plan_loads(spec, plan, whole_neurons=w)[-1].mlp_frac) for w in (True, False)] == [0.48, 0.5]


# -- arguments --------------------------------------------------------------------------------------------------------


def test_lengths_per_layer_and_logits():
    spec = ModelSpec.from_config(hf.LlamaConfig(**SIZES))
    per_layer = strict_prefill_flops(spec, [8, 8, 8], [50, 20, 20])
    assert per_layer == sum(strict_prefill_flops(spec, plan, n) for plan, n in (([8, 0, 0], 50), ([0, 8, 8], 20))) - (
        2 * 64 * 100  # lm_head, counted twice
    )
    every = strict_prefill_flops(spec, [8, 8, 8], [50, 20, 20], logits="all")
    assert every - per_layer == 49 * 2 * 64 * 100, "dropped tokens come back before lm_head"
    with pytest.raises(CostError, match="logits is 'some', expected 'last'"):
        strict_prefill_flops(spec, [8, 8, 8], 5, logits="some")


def test_tensor_parallel_divides_everything():
    spec = ModelSpec.from_config(hf.LlamaConfig(**SIZES))
    whole, part = (strict_prefill_flops(spec, [8, 8, 8], 50, tensor_parallel=n) for n in (1, 4))
    assert whole == 4 * part
    step, part = (strict_decode_step_flops(spec, [8, 8, 8], 50, tensor_parallel=n) for n in (1, 4))
    assert step == 4 * part
