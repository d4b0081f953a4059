"""The invariant matrix: what must hold for every host and variant, on tiny random models."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from adallava.errors import CheckpointError, ConfigError, PlanError, PromptError
from adallava.hosts.cache import AdaptiveCache
from adallava.hosts.model import Request
from adallava.hosts.prompts import encode, to_prompt
from adallava.hosts.switch import attach, is_attached
from adallava.mini.scenes import sample_scene, to_image
from adallava.plan import ExecutionPlan
from tiny import ROWS, processor, tiny_base, tiny_vlm

IMAGES = [to_image(sample_scene("test", 0, i)) for i in range(3)]
BUDGETS = ("100%", "85%", "70%", "50%")
OPTIONS = {"max_new_tokens": 6, "suppress_tokens": [4]}  # 4 is <image>, which a random model would say
matrix = pytest.mark.parametrize(("host", "variant"), ROWS)


def requests():
    mixed = [Request("How many sevens are there?", IMAGES[i % 3], budget=b) for i, b in enumerate(BUDGETS)]
    return [*mixed, Request("what is at the top-left?", budget="70%"), Request("which", IMAGES[:2], budget="85%")]


def inputs_of(vlm, *questions):
    prompts = [to_prompt(Request(q, IMAGES[i])) for i, q in enumerate(questions)]
    return {k: v for k, v in encode(vlm.processor, prompts).items() if isinstance(v, torch.Tensor)}


def training_batch(vlm):
    """Right-padded conversations with two turns in one of them; labels on the answers."""
    tokenizer = vlm.processor.tokenizer
    texts = [
        "USER: <image> what color is the star ? ASSISTANT: red</s>USER: what is left ? ASSISTANT: seven</s>",
        "USER: <image> how many ? ASSISTANT: two</s>",
    ]
    texts = [t.replace("<image>", "<image>" * 64) for t in texts]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    batch = {k: batch[k] for k in ("input_ids", "attention_mask")}
    answers = torch.tensor(tokenizer.convert_tokens_to_ids(["red", "seven", "two", "</s>"]))
    labels = batch["input_ids"].masked_fill(~torch.isin(batch["input_ids"], answers), -100)
    pixels = encode(vlm.processor, [to_prompt(Request("x", IMAGES[i])) for i in range(2)])["pixel_values"]
    return {**batch, "labels": labels, "pixel_values": pixels}


@matrix
def test_attached_without_a_request_is_the_base_model(host, variant):
    base, vlm = tiny_base(host), tiny_vlm(host, variant)
    inputs = inputs_of(vlm, "how many ?")
    assert torch.equal(vlm.model(**inputs).logits, base(**inputs).logits)
    assert vlm.model.state_dict().keys() == base.state_dict().keys()
    assert type(vlm.model).__name__ == type(base).__name__ and isinstance(vlm.model, type(base))


@matrix
def test_detach_gives_the_base_model_back(host, variant):
    base, vlm = tiny_base(host), tiny_vlm(host, variant)
    inputs = inputs_of(vlm, "how many ?")
    vlm.generate(IMAGES[0], "how many ?", budget="70%", **OPTIONS)
    model = vlm.detach()
    assert type(model) is type(base) and not is_attached(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert torch.equal(model(**inputs).logits, base(**inputs).logits)


@matrix
def test_everything_on_equals_the_base_model_with_the_latency_token(host, variant):
    base, vlm = tiny_base(host), tiny_vlm(host, variant)
    inputs = inputs_of(vlm, "how many ?")
    logits = vlm(**inputs).logits
    embeds = base.get_input_embeddings()(inputs["input_ids"])
    image = torch.cat(base.get_image_features(inputs["pixel_values"]).pooler_output)
    embeds = embeds.masked_scatter((inputs["input_ids"] == base.config.image_token_id)[..., None], image)
    token = vlm.scheduler.encode(torch.tensor([vlm.adaptive_config.max_k]))
    expected = base(inputs_embeds=torch.cat([embeds, token[:, None]], 1)).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@matrix
def test_a_mixed_batch_equals_single_requests(host, variant):
    vlm = tiny_vlm(host, variant)
    batch = vlm.generate_batch(requests(), **OPTIONS)
    assert len({len(a.text) for a in batch}) > 1, "the random model should answer differently"
    for request, together in zip(requests(), batch, strict=True):
        alone = vlm.generate_batch([request], **OPTIONS)[0]
        assert (together.text, together.plan) == (alone.text, alone.plan)


@matrix
def test_mixed_batch_logits_equal_single_logits(host, variant):
    vlm = tiny_vlm(host, variant)
    questions = ["how many sevens are there ?", "what ?", "is there a red star ?"]
    k = torch.tensor([vlm.adaptive_config.max_k, 1, 2])
    batch = vlm(**inputs_of(vlm, *questions), k=k).logits[:, -1]
    for row, question in enumerate(questions):
        prompt = encode(vlm.processor, [to_prompt(Request(question, IMAGES[row]))])
        single = vlm(**{n: v for n, v in prompt.items() if isinstance(v, torch.Tensor)}, k=k[row : row + 1])
        torch.testing.assert_close(batch[row], single.logits[0, -1], rtol=0, atol=2e-5)


@matrix
def test_cached_equals_uncached(host, variant):
    vlm = tiny_vlm(host, variant)
    for request in requests():
        cached = vlm.generate_batch([request], **OPTIONS)[0]
        uncached = vlm.generate_batch([request], use_cache=False, **OPTIONS)[0]
        assert (cached.text, cached.plan) == (uncached.text, uncached.plan)


@matrix
def test_gated_equals_skipped(host, variant):
    vlm = tiny_vlm(host, variant)
    inputs = inputs_of(vlm, "how many ?", "what color is the star ?", "is there a six ?")
    k = torch.tensor([0, 1, vlm.adaptive_config.max_k - 1])
    skipped, gated = vlm.request_state(k, gated=False), vlm.request_state(k, gated=True)
    logits = vlm(**inputs, ada_state=skipped).logits
    torch.testing.assert_close(vlm(**inputs, ada_state=gated).logits, logits, rtol=0, atol=2e-5)
    assert torch.equal(skipped.plan.gates, gated.gates > 0.5)
    assert skipped.plan.k == k.tolist()


@matrix
def test_beams_and_several_answers_equal_single_requests(host, variant):
    vlm = tiny_vlm(host, variant)
    options = {**OPTIONS, "num_beams": 3, "num_return_sequences": 2}
    batch = vlm.generate_batch(requests(), **options)
    for request, together in zip(requests(), batch, strict=True):
        alone = vlm.generate_batch([request], **options)[0]
        assert len(together.texts) == 2
        assert (together.texts, together.plan) == (alone.texts, alone.plan)


@matrix
def test_beam_search_with_cache_equals_without(host, variant):
    vlm = tiny_vlm(host, variant)
    for request in requests()[:4]:
        options = {**OPTIONS, "num_beams": 4}
        cached = vlm.generate_batch([request], **options)[0]
        assert cached.text == vlm.generate_batch([request], use_cache=False, **options)[0].text


@matrix
def test_threads_equal_sequential(host, variant):
    vlm = tiny_vlm(host, variant)
    sequential = [vlm.generate_batch([r], **OPTIONS)[0] for r in requests()]
    with ThreadPoolExecutor(4) as pool:
        threaded = list(pool.map(lambda r: vlm.generate_batch([r], **OPTIONS)[0], requests() * 2))
    assert [(a.text, a.plan) for a in threaded] == [(a.text, a.plan) for a in sequential] * 2


@matrix
def test_save_then_load_is_equal(host, variant, tmp_path):
    vlm = tiny_vlm(host, variant)
    vlm.save_pretrained(tmp_path)
    again = type(vlm).from_pretrained(tmp_path)
    first, second = (m.generate(IMAGES[0], "how many ?", budget="70%", **OPTIONS) for m in (vlm, again))
    assert (first.text, first.plan) == (second.text, second.plan)
    inputs, k = inputs_of(vlm, "how many ?"), torch.tensor([1])
    assert torch.equal(vlm(**inputs, k=k).logits, again(**inputs, k=k).logits)


@matrix
def test_the_saved_base_is_an_ordinary_checkpoint(host, variant, tmp_path):
    vlm = tiny_vlm(host, variant)
    vlm.save_pretrained(tmp_path)
    plain = type(tiny_base(host)).from_pretrained(tmp_path)
    assert plain.state_dict().keys() == vlm.model.state_dict().keys()
    assert plain.config.architectures == ["LlavaForConditionalGeneration"]


@matrix
def test_adapter_only_folder_names_its_base(host, variant, tmp_path):
    tiny_base(host).save_pretrained(tmp_path / "base")
    processor().save_pretrained(tmp_path / "base")
    vlm = tiny_vlm(host, variant)
    with pytest.raises(CheckpointError, match="must name its base model"):
        vlm.save_pretrained(tmp_path / "adapter", adapter_only=True)
    named = (
        type(vlm)
        .adapt(
            vlm.detach(),
            processor(),
            variant=variant,
            heads_per_switch=2 if variant == "H" else None,
            base_model=str(tmp_path / "base"),
        )
        .eval()
    )
    named.save_pretrained(tmp_path / "adapter", adapter_only=True)
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == ["adaptive.safetensors", "adaptive_config.json"]
    again = type(named).from_pretrained(tmp_path / "adapter")
    inputs, k = inputs_of(named, "how many ?"), torch.tensor([1])
    assert torch.equal(named(**inputs, k=k).logits, again(**inputs, k=k).logits)


@matrix
def test_cost_and_cache_grow_with_k(host, variant):
    vlm = tiny_vlm(host, variant)
    inputs = inputs_of(vlm, "how many ?")
    flops, held = [], []
    for k, budget in enumerate(vlm.reachable_budgets()):
        answer = vlm.generate(IMAGES[0], "how many ?", budget=budget, **OPTIONS)
        assert (answer.plan.k, answer.budget.k) == ([k], k)
        flops.append(answer.cost.prefill_flops)
        state = vlm.request_state(torch.tensor([k]))
        cache = AdaptiveCache(state)
        vlm.model(**inputs, ada_state=state, past_key_values=cache, use_cache=True)
        held.append(cache.nbytes)
    assert flops == sorted(set(flops)) and held == sorted(set(held))
    assert answer.cost.frac == pytest.approx(1)
    share = vlm.adaptive_config.prefix_switches / vlm.adaptive_config.total_switches
    assert held[0] / held[-1] == pytest.approx(share), "the cache holds nothing of what did not run"


@matrix
def test_gradient_reaches_scheduler_and_host(host, variant):
    vlm = tiny_vlm(host, variant).train()
    torch.manual_seed(0)
    # Row 0 runs everything: what is off in all rows rightly has no gradient.
    vlm(**training_batch(vlm), k=torch.tensor([vlm.adaptive_config.max_k, 1])).loss.backward()
    for name, weight in vlm.named_parameters():
        if "vision_tower" in name and ("layers.1" in name or "post_layernorm" in name):
            continue  # beyond the feature layer
        assert weight.grad is not None and weight.grad.abs().sum() > 0, name


@matrix
def test_checkpointing_equals_none(host, variant):
    results = []
    for checkpointing in (False, True):
        vlm = tiny_vlm(host, variant).train()
        if checkpointing:
            vlm.gradient_checkpointing_enable()
        torch.manual_seed(0)
        loss = vlm(**training_batch(vlm), k=torch.tensor([2, 1])).loss
        loss.backward()
        results.append((loss, vlm.scheduler.head.weight.grad, vlm.model.lm_head.weight.grad))
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-5, atol=1e-6)


def test_reentrant_checkpointing_is_refused():
    vlm = tiny_vlm().train()
    vlm.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ConfigError, match="use_reentrant"):
        vlm(**training_batch(vlm))


@matrix
def test_random_budgets_are_drawn_over_all_k(host, variant):
    vlm = tiny_vlm(host, variant).train()
    batch, seen = training_batch(vlm), set()
    vlm.request_state = lambda k, make=vlm.request_state: seen.update(k.tolist()) or make(k)
    for _ in range(12 * vlm.adaptive_config.max_k):
        with torch.no_grad():
            vlm(**batch)
    assert seen == set(range(vlm.adaptive_config.max_k + 1))


@matrix
def test_latency_token_goes_before_the_last_answer(host, variant):
    vlm = tiny_vlm(host, variant).train()
    batch = training_batch(vlm)
    state = vlm.request_state(torch.tensor([1, 1]))
    out = vlm(**batch, ada_state=state)
    assert out.logits.shape[1] == batch["input_ids"].shape[1] + 1
    words = ["seven", "two"]
    ids = vlm.processor.tokenizer.convert_tokens_to_ids(words)
    for row, (index, word) in enumerate(zip(state.latency_index.tolist(), ids, strict=True)):
        assert batch["input_ids"][row, index] == word


@matrix
def test_padding_of_a_training_batch_does_not_matter(host, variant):
    vlm = tiny_vlm(host, variant)
    batch = training_batch(vlm)
    state = vlm.request_state(torch.tensor([1, 2]), gated=True)
    both = vlm(**batch, ada_state=state).logits
    length = int(batch["attention_mask"][1].sum())
    alone = {n: v[1:, :length] if n != "pixel_values" else v[1:] for n, v in batch.items()}
    single = vlm(**alone, ada_state=vlm.request_state(torch.tensor([2]), gated=True)).logits
    torch.testing.assert_close(both[1, : length + 1], single[0], rtol=0, atol=2e-5)


@matrix
def test_hidden_states_have_one_entry_per_layer(host, variant):
    vlm = tiny_vlm(host, variant)
    out = vlm(**inputs_of(vlm, "how many ?"), k=torch.tensor([1]), output_hidden_states=True)
    assert len(out.hidden_states) == vlm.adaptive_config.num_layers + 1


@matrix
def test_eager_attention_gives_the_same(host, variant):
    sdpa = tiny_vlm(host, variant)
    eager = tiny_vlm(host, variant)
    eager.model.set_attn_implementation("eager")
    for request in requests():
        first, second = (m.generate_batch([request], **OPTIONS)[0] for m in (sdpa, eager))
        assert (first.text, first.plan) == (second.text, second.plan)


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
