"""What is checked on one host: errors, modes, decoding by hand, and the traps of single families."""

import copy
import inspect

import pytest
import torch
from torch import nn
from transformers import GenerationConfig

from adallava.errors import CheckpointError, ConfigError, PlanError, PromptError
from adallava.hosts.arch import architecture_of
from adallava.hosts.cache import AdaptiveCache
from adallava.hosts.inputs import insert_latency_slot, slot_id
from adallava.hosts.layers import AdaptiveLayer
from adallava.hosts.switch import attach, is_attached
from adallava.plan import ExecutionPlan
from matrix import IMAGES, inputs_of, options, training_batch
from tiny import processor, tiny_base, tiny_vlm

OPTIONS = options("llava")


def test_output_biases_are_kept_and_gated():
    vlm = tiny_vlm("llava", "H", attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for name, weight in vlm.model.named_parameters():
            if name.endswith("bias") and "language_model" in name:
                weight.normal_()
    inputs, k = inputs_of(vlm, "how many ?", "what ?", "which"), torch.tensor([0, 2, 5])
    skipped = vlm(**inputs, ada_state=vlm.request_state(k, gated=False)).logits
    gated = vlm(**inputs, ada_state=vlm.request_state(k, gated=True)).logits
    torch.testing.assert_close(gated, skipped, rtol=0, atol=2e-5)


def test_a_plan_can_be_given_and_modes_differ():
    vlm = tiny_vlm()
    plan = ExecutionPlan.from_switches(torch.tensor([[True, False, False]]), vlm.adaptive_config)
    assert vlm.generate(IMAGES[0], "how many ?", plan=plan, **OPTIONS).plan == plan
    generator = torch.Generator().manual_seed(1)
    plans = {
        vlm.generate(
            IMAGES[0], "how many ?", budget="70%", mode="random", generator=generator, **OPTIONS
        ).plan.describe()
        for _ in range(20)
    }
    assert len(plans) == 3
    static = vlm.generate(IMAGES[0], "how many ?", budget="70%", mode="static", **OPTIONS).plan
    assert static == vlm.generate(IMAGES[1], "what ?", budget="70%", mode="static", **OPTIONS).plan


def test_sampling_and_streaming():
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        pieces = ""

        def on_finalized_text(self, text, stream_end=False):
            self.pieces += text

    vlm = tiny_vlm()
    streamer = Streamer(vlm.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    answer = vlm.generate(IMAGES[0], "how many ?", budget="70%", streamer=streamer, **OPTIONS)
    assert streamer.pieces.split() == answer.text.split()
    torch.manual_seed(0)
    first = vlm.generate(IMAGES[0], "how many ?", budget="70%", do_sample=True, temperature=2.0, **OPTIONS)
    torch.manual_seed(0)
    again = vlm.generate(IMAGES[0], "how many ?", budget="70%", do_sample=True, temperature=2.0, **OPTIONS)
    assert first.text == again.text


def test_multi_turn_chat():
    vlm = tiny_vlm()
    history = [
        {"role": "user", "content": "how many sevens are there ?"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "what color is the star ?"},
    ]
    chat = vlm.generate(IMAGES[0], messages=history, budget="70%", **OPTIONS)
    single = vlm.generate(IMAGES[0], "what color is the star ?", budget="70%", **OPTIONS)
    assert chat.prompt_tokens > single.prompt_tokens + 8


@pytest.mark.parametrize(
    "option",
    [
        {"assistant_model": object()},
        {"prompt_lookup_num_tokens": 2},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 8},
        {"guidance_scale": 1.5},
        {"custom_generate": "x"},
        {"past_key_values": object()},
    ],
)
def test_modes_that_make_no_sense_are_refused(option):
    name = next(iter(option))
    with pytest.raises(PromptError, match=f"{name}.*Leave it out"):
        tiny_vlm().generate(IMAGES[0], "how many ?", **option)


def test_a_generation_config_says_the_same_as_keywords():
    vlm = tiny_vlm()
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "repetition_penalty": 3.0}
    meant = vlm.generate(IMAGES[0], "how many ?", budget="70%", **options)
    assert meant.timing.new_tokens == 5
    config = GenerationConfig(**options)
    assert vlm.generate(IMAGES[0], "how many ?", budget="70%", generation_config=config).text == meant.text
    shorter = vlm.generate(IMAGES[0], "how many ?", budget="70%", generation_config=config, max_new_tokens=3)
    assert shorter.timing.new_tokens == 3, "a keyword beside it wins"
    for option in ({"cache_implementation": "static"}, {"guidance_scale": 1.5}):
        with pytest.raises(PromptError, match="Leave it out"):
            vlm.generate(IMAGES[0], "how many ?", generation_config=GenerationConfig(**option))
    with pytest.raises(PromptError, match=r"generation_config is \{'max_new_tokens': 3\}, expected a transformers"):
        vlm.generate(IMAGES[0], "how many ?", generation_config={"max_new_tokens": 3})


def test_a_generation_config_that_was_loaded_says_the_same_too(tmp_path):
    vlm = tiny_vlm()
    vlm.model.generation_config.save_pretrained(tmp_path)
    for config in (copy.deepcopy(vlm.model.generation_config), GenerationConfig.from_pretrained(tmp_path)):
        config.max_new_tokens = config.min_new_tokens = 4
        assert vlm.generate(IMAGES[0], "how many ?", generation_config=config).timing.new_tokens == 4


def test_a_length_counts_the_prompt():
    vlm, options = tiny_vlm(), {"min_new_tokens": 4, "do_sample": False}
    tokens = vlm.generate(IMAGES[0], "how many ?", max_new_tokens=1).prompt_tokens
    assert vlm.generate(IMAGES[0], "how many ?", max_length=tokens + 4, **options).timing.new_tokens == 4
    assert vlm.generate(IMAGES[0], "how many ?", max_length=1, max_new_tokens=6, **options).timing.new_tokens >= 4
    with pytest.raises(PromptError, match=f"max_length is {tokens}, and the prompt has {tokens} tokens"):
        vlm.generate(IMAGES[0], "how many ?", max_length=tokens)


def test_a_cache_belongs_to_one_request():
    vlm = tiny_vlm()
    inputs = inputs_of(vlm, "how many ?")
    first, second = (vlm.request_state(torch.tensor([1])) for _ in range(2))
    cache = AdaptiveCache(first)
    vlm.model(**inputs, ada_state=first, past_key_values=cache, use_cache=True)
    with pytest.raises(ConfigError, match="another request"):
        vlm.model(**inputs, ada_state=second, past_key_values=cache)
    with pytest.raises(PlanError, match="cannot be repeated"):
        cache.batch_repeat_interleave(2)


def test_decoding_by_hand_continues_the_plan_of_the_cache():
    vlm = tiny_vlm()
    inputs = inputs_of(vlm, "how many ?")
    state = vlm.request_state(torch.tensor([1]))
    cache = AdaptiveCache(state)
    out = vlm.model(**inputs, ada_state=state, past_key_values=cache, use_cache=True)
    step = vlm.model(input_ids=out.logits[:, -1:].argmax(-1), past_key_values=cache, use_cache=True)
    assert step.logits.shape[1] == 1
    filled = [layer.is_initialized for layer in cache.layers]
    assert sum(filled) == vlm.adaptive_config.prefix_layers + 1


def test_attach_refuses_a_foreign_config_and_a_second_time():
    vlm = tiny_vlm(layers=6)
    with pytest.raises(ConfigError, match="adaptive already"):
        attach(vlm.model, vlm.adaptive_config)
    with pytest.raises(ConfigError, match="num_layers = 6, the model has 4"):
        attach(tiny_base(layers=4), vlm.adaptive_config)


def test_a_failed_attach_changes_nothing():
    vlm, other = tiny_vlm(layers=6), tiny_base(layers=4)
    with pytest.raises(ConfigError):
        attach(other, vlm.adaptive_config)
    assert not is_attached(other)


def test_other_hosts_are_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=8)
    with pytest.raises(CheckpointError, match="'llama'.*cannot be made adaptive yet; known: llava"):
        type(tiny_vlm()).adapt(LlamaForCausalLM(config), processor(), variant="L")


def test_reentrant_checkpointing_is_refused():
    vlm = tiny_vlm().train()
    vlm.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ConfigError, match="use_reentrant"):
        vlm(**training_batch(vlm))


def test_a_model_without_a_head_is_refused():
    with pytest.raises(CheckpointError, match="LlavaModel has no language-model head"):
        architecture_of(tiny_base().model)


def test_decoders_of_unknown_build_are_refused():
    model = tiny_base()
    model.config.text_config.model_type = "mixtral"
    with pytest.raises(CheckpointError, match="this llava model has a decoder of type 'mixtral'.*known: llama"):
        architecture_of(model)


# -- several hosts ----------------------------------------------------------------------------------------------------


def test_hosts_in_one_process_keep_their_own_signatures():
    llava, qwen = tiny_vlm("llava"), tiny_vlm("qwen2-vl")
    names = [set(inspect.signature(vlm.model.forward).parameters) for vlm in (llava, qwen)]
    assert all("ada_state" in some for some in names)
    assert "image_grid_thw" in names[1] - names[0] and "vision_feature_layer" in names[0] - names[1]


@pytest.mark.parametrize("variant", ["L", "H"])
def test_dtype_and_device_can_be_changed(variant):
    vlm = tiny_vlm("llava", variant)
    before = vlm.generate(IMAGES[0], "how many ?", budget="70%", **OPTIONS)
    assert vlm.to(torch.float64).to("cpu").float() is vlm
    after = vlm.generate(IMAGES[0], "how many ?", budget="70%", **OPTIONS)
    assert (after.text, after.plan) == (before.text, before.plan)


def test_the_latency_slot_is_no_placeholder():
    config = tiny_base("qwen2-vl").config
    assert slot_id(config, 7) == 7
    assert slot_id(config, config.image_token_id) == slot_id(config, config.video_token_id) == 0
    config.image_token_id, config.video_token_id = 0, 1
    assert slot_id(config, None) == slot_id(config, 1) == 2


@pytest.mark.parametrize(
    ("host", "name"), [("gemma3", "token_type_ids"), ("qwen2-vl", "mm_token_type_ids"), ("paligemma", "token_type_ids")]
)
def test_the_latency_token_is_text(host, name):
    inputs = inputs_of(tiny_vlm(host), "how many ?", "what color is the star ?")
    new, index = insert_latency_slot(inputs, 1)
    assert new[name].shape == new["input_ids"].shape == new["attention_mask"].shape
    assert new[name].gather(1, index[:, None]).tolist() == [[0], [0]]
    assert torch.equal(new[name][:, :-1], inputs[name])


def test_no_host_makes_a_cache_of_its_own():
    vlm = tiny_vlm("idefics3", "H")
    vlm.model.config.get_text_config().use_cache = False  # the top config still wants one
    out = vlm(**inputs_of(vlm, "how many ?"), k=torch.tensor([1]))
    assert out.past_key_values is None


@pytest.mark.parametrize("host", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
def test_positions_belong_to_the_request(host):
    """transformers keeps the offset of text after images on the model, where another request overwrites it."""
    vlm, k = tiny_vlm(host), torch.tensor([1, 2])
    inputs, index = insert_latency_slot(inputs_of(vlm, "how many ?", "what color is the star ?"), 1)
    state = vlm.request_state(k, latency_index=index)
    generated = vlm.model.generate(
        **inputs,
        ada_state=state,
        past_key_values=AdaptiveCache(state),
        max_new_tokens=3,
        output_logits=True,
        return_dict_in_generate=True,
    )
    state = vlm.request_state(k, latency_index=index)
    out = vlm.model(**inputs, ada_state=state, use_cache=True)
    vlm(**inputs_of(vlm, "what ?", "which ?", "how many ?"), k=torch.tensor([1, 2, 0]))
    mask = inputs["attention_mask"]
    assert not mask.all()
    for step in (1, 2):
        token, mask = generated.sequences[:, step - 4, None], nn.functional.pad(mask, (0, 1), value=1)
        cache = out.past_key_values
        out = vlm.model(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True)
        torch.testing.assert_close(out.logits[:, -1], generated.logits[step], rtol=0, atol=1e-5)


def test_a_cache_with_skipped_layers_counts_as_filled():
    vlm = tiny_vlm("paligemma")  # which asks its cache whether a prompt, read in both directions, is still to come
    plan = ExecutionPlan.from_switches(torch.tensor([[False, False, True]]), vlm.adaptive_config)
    state = vlm.request_state(torch.tensor([1]), plan=plan)
    cache = vlm.model(**inputs_of(vlm, "how many ?"), ada_state=state, use_cache=True).past_key_values
    assert not all(layer.is_initialized for layer in cache.layers) and cache.is_initialized
    assert not AdaptiveCache(state).is_initialized


def test_a_branch_that_is_off_passes_no_gradient_through_the_norm_behind_it(monkeypatch):
    """A norm's slope at zero is 1 / sqrt(eps): the scheduler's gradient would be hundreds of times too large."""

    def gradient():
        vlm = tiny_vlm("gemma3", "H").train()
        torch.manual_seed(0)
        vlm(**training_batch(vlm), k=torch.tensor([1, 2])).loss.backward()
        return vlm.scheduler.head.weight.grad.norm()

    tamed, around = gradient(), AdaptiveLayer._around
    monkeypatch.setattr(AdaptiveLayer, "_around", lambda self, x, attend, feed, _=None: around(self, x, attend, feed))
    assert 0 < 50 * tamed < gradient()


class Adapted(nn.Module):
    """A projection with something added, as adapters do it."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.weight, self.bias = linear, linear.weight, linear.bias

    def forward(self, x):
        return self.linear(x) + 1.0


@pytest.mark.parametrize("path", ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"])
def test_adapters_are_trained_and_must_be_merged_before_heads_are_skipped(path):
    vlm, k = tiny_vlm("llava", "H"), torch.tensor([2])
    inputs = inputs_of(vlm, "how many ?")
    before = vlm(**inputs, ada_state=vlm.request_state(k, gated=True)).logits
    for layer in vlm.model.model.language_model.layers:
        block, name = path.split(".")
        setattr(getattr(layer, block), name, Adapted(getattr(getattr(layer, block), name)))
    after = vlm(**inputs, ada_state=vlm.request_state(k, gated=True)).logits
    assert not torch.allclose(before, after)
    with pytest.raises(ConfigError, match=f"{name} is a .*Adapted.*Merge adapters"):
        for some in (1, 2, 3):  # at one of these budgets a layer is on in part
            vlm(**inputs, k=torch.tensor([some]))
