"""Token selection at a host: fewer tokens for real, and everything else as without it."""

from dataclasses import replace

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from adallava import AdaptiveVLM
from adallava.errors import ConfigError, PromptError, UnknownNameError
from adallava.hosts.cache import AdaptiveCache
from adallava.hosts.cut import TokenCut
from adallava.hosts.model import Request
from adallava.hosts.prompts import encode, to_prompt
from adallava.hosts.visual import select_images
from adallava.selection.fastv import FastV
from matrix import IMAGES, fastv_by_hand, inputs_of, options, requests, training_batch
from tiny import ROWS, processor, tiny_base, tiny_vlm

FASTV = "fastv:layer=2,ratio=0.5"
TOWER = ("prumerge", "prumerge+", "random:ratio=0.25", "uniform:count=5")
INSIDE = [(host, variant) for host, variant in ROWS if not host.startswith("qwen3")]
CASES = [(*row, FASTV) for row in INSIDE] + [("llava", variant, chosen) for variant in ("L", "H") for chosen in TOWER]
CASES += [("mipha", "L", chosen) for chosen in TOWER[2:]]
matrix = pytest.mark.parametrize(("host", "variant", "chosen"), CASES)
# The attention-based selectors need a tower that looks at something; a tiny random one looks everywhere alike.
SHARP = 12.0


def make(host, variant, chosen="none"):
    vlm = tiny_vlm(host, variant)
    tower = getattr(vlm.model.model, "vision_tower", None)
    if host == "llava":
        for layer in tower.encoder.layers:
            layer.self_attn.q_proj.weight.data.mul_(SHARP)
    vlm.token_selection = chosen
    return vlm


def row_inputs(vlm, *asked):
    prompt = encode(vlm.processor, [to_prompt(request) for request in asked])
    return {name: value for name, value in prompt.items() if isinstance(value, torch.Tensor)}


# -- what must hold for every selector ---------------------------------------------------------------------------------


@matrix
def test_a_mixed_batch_equals_single_requests(host, variant, chosen):
    vlm = make(host, variant, chosen)
    batch = vlm.generate_batch(requests(host), **options(host))
    for request, together in zip(requests(host), batch, strict=True):
        alone = vlm.generate_batch([request], **options(host))[0]
        assert (together.text, together.plan, together.layer_tokens) == (alone.text, alone.plan, alone.layer_tokens)


@matrix
def test_cached_equals_uncached(host, variant, chosen):
    vlm = make(host, variant, chosen)
    for request in requests(host)[2:]:
        cached = vlm.generate_batch([request], **options(host))[0]
        uncached = vlm.generate_batch([request], use_cache=False, **options(host))[0]
        assert (cached.text, cached.plan) == (uncached.text, uncached.plan)


@matrix
def test_gated_equals_skipped(host, variant, chosen):
    vlm = make(host, variant, chosen)
    inputs = inputs_of(vlm, "how many ?", "what color is the star ?", "is there a six ?")
    k = torch.tensor([0, 1, vlm.adaptive_config.max_k - 1])
    skipped, gated = vlm.request_state(k, gated=False), vlm.request_state(k, gated=True)
    logits = vlm(**inputs, ada_state=skipped).logits
    torch.testing.assert_close(vlm(**inputs, ada_state=gated).logits[:, -1], logits[:, -1], rtol=0, atol=2e-5)
    assert torch.equal(skipped.plan.gates, gated.gates > 0.5)


@matrix
def test_fewer_tokens_cost_less(host, variant, chosen):
    vlm = make(host, variant, chosen)
    some = vlm.generate(IMAGES[0], "how many ?", budget="70%", **options(host))
    whole = vlm.generate(IMAGES[0], "how many ?", budget="70%", token_selection="none", **options(host))
    assert some.prompt_tokens == whole.prompt_tokens
    assert whole.layer_tokens == [whole.prompt_tokens + 1] * 6
    assert some.layer_tokens[-1] < whole.layer_tokens[-1]
    assert some.cost.prefill_flops < whole.cost.prefill_flops
    assert some.cost.base_prefill_flops == whole.cost.base_prefill_flops


@matrix
def test_training_reaches_the_scheduler_and_the_rest(host, variant, chosen):
    vlm = make(host, variant, chosen).train()
    torch.manual_seed(0)
    out = vlm(**training_batch(vlm), k=torch.tensor([vlm.adaptive_config.max_k, 1]))
    out.loss.backward()
    assert torch.isfinite(out.loss)
    names = ["scheduler.head.weight", "model.lm_head.weight"]
    if host in ("llava", "mipha"):
        names.append("model.model.multi_modal_projector.linear_1.weight")
    for name in names:
        grad = vlm.get_parameter(name).grad
        assert grad is not None and grad.any() and torch.isfinite(grad).all(), name


@matrix
def test_padding_of_a_training_batch_does_not_matter(host, variant, chosen):
    vlm = make(host, variant, chosen)
    both, alone = training_batch(vlm), training_batch(vlm, rows=[1])
    state = vlm.request_state(torch.tensor([1, 2]), gated=True)
    logits = vlm(**both, ada_state=state).logits[1]
    single = vlm(**alone, ada_state=vlm.request_state(torch.tensor([2]), gated=True)).logits[0]
    kept = slice(None) if state.cut is None else state.cut.keep[1, : len(single)]
    torch.testing.assert_close(logits[: len(single)][kept], single[kept], rtol=0, atol=2e-5)


@pytest.mark.parametrize("chosen", [FASTV, "prumerge"])
def test_beams_and_several_answers_equal_single_requests(chosen):
    vlm = make("llava", "L", chosen)
    beams = options("llava", num_beams=3, num_return_sequences=2)
    batch = vlm.generate_batch(requests("llava"), **beams)
    for request, together in zip(requests("llava"), batch, strict=True):
        alone = vlm.generate_batch([request], **beams)[0]
        assert (together.texts, together.plan, together.layer_tokens) == (alone.texts, alone.plan, alone.layer_tokens)
        uncached = vlm.generate_batch([request], use_cache=False, **beams)[0]
        assert uncached.texts == alone.texts


@pytest.mark.parametrize("chosen", ["fastv:ratio=0", "random:ratio=1", "uniform:ratio=1.0", "prumerge:ratio=1.0"])
@pytest.mark.parametrize("variant", ["L", "H"])
def test_keeping_everything_equals_no_selection_bit_for_bit(variant, chosen):
    vlm = make("llava", variant)
    inputs, k = inputs_of(vlm, "how many ?", "what ?"), torch.tensor([1, 2])
    whole = vlm(**inputs, k=k).logits
    vlm.token_selection = chosen
    assert torch.equal(vlm(**inputs, k=k).logits, whole)


@pytest.mark.parametrize("chosen", [FASTV, *TOWER])
def test_base_models_select_too(chosen):
    vlm = AdaptiveVLM(tiny_base("llava"), processor("llava")).eval()
    wholes = [Request(r.question, r.images) for r in requests("llava")]
    batch = vlm.generate_batch(wholes, token_selection=chosen, **options("llava"))
    for request, together in zip(wholes, batch, strict=True):
        alone = vlm.generate_batch([request], token_selection=chosen, use_cache=False, **options("llava"))[0]
        assert (together.text, together.plan) == (alone.text, None)
        assert (together.layer_tokens[-1] < together.prompt_tokens) == (request.images is not None)
    vlm.token_selection = chosen
    vlm.train()(**training_batch(vlm)).loss.backward()


# -- inside the decoder ------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("layer", "rank"), [(1, 3), (2, 8), (5, 0)])
def test_fastv_is_what_a_loop_by_hand_gives(layer, rank):
    vlm = AdaptiveVLM(tiny_base("llava-gqa"), processor("llava-gqa")).eval()
    inputs = inputs_of(vlm, "how many sevens are there ?")
    wanted = fastv_by_hand(tiny_base("llava-gqa"), inputs, layer, rank, 6)[0]
    vlm.token_selection = FastV(layer, rank=rank)
    answer = vlm.generate(IMAGES[0], "how many sevens are there ?", max_new_tokens=6, min_new_tokens=6)
    state = vlm._state(vlm.token_selection, torch.zeros(1, dtype=torch.long))
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "past_key_values": AdaptiveCache(state)}
    ids = vlm.model.generate(**inputs, ada_state=state, **settings)
    assert ids[0, inputs["input_ids"].shape[1] :].tolist() == wanted
    assert answer.layer_tokens == [answer.prompt_tokens] * layer + [answer.prompt_tokens - 64 + rank] * (6 - layer)


@pytest.mark.parametrize(
    ("host", "variant"), [("llava", "L"), ("llava-gqa", "H"), ("gemma3", "L"), ("paligemma2", "H")]
)
def test_other_attention_kernels_keep_the_same_tokens(host, variant):
    sdpa, eager = make(host, variant, FASTV), make(host, variant, FASTV)
    eager.model.set_attn_implementation("eager")
    for request in requests(host):
        first, second = (m.generate_batch([request], **options(host))[0] for m in (sdpa, eager))
        assert (first.text, first.plan) == (second.text, second.plan)


@torch.no_grad()
def test_only_image_tokens_are_dropped_and_the_cache_is_shorter():
    vlm = make("llava", "L", "fastv:layer=2,rank=7")
    inputs = row_inputs(vlm, *requests("llava"))
    k = torch.tensor([3, 2, 1, 0, 3, 2])
    state = vlm.request_state(k, gated=False)
    cache = AdaptiveCache(state)
    out = vlm.model(**inputs, ada_state=state, past_key_values=cache, use_cache=True)
    keep, image = state.cut.keep, inputs["input_ids"] == vlm.model.config.image_token_id
    assert out.logits.shape[1] == keep.shape[1] == image.shape[1] + 1
    assert torch.equal(keep[:, :-1] & ~image, inputs["attention_mask"].bool() & ~image)
    assert keep[torch.arange(6), state.latency_index].all()
    assert (keep[:, :-1] & image).sum(1).tolist() == [7, 7, 7, 7, 7, 0]
    held = [layer.keys.shape[2] for layer in cache.layers if layer.is_initialized]
    width = int(keep.sum(1).max())
    assert held[:2] == [keep.shape[1]] * 2 and set(held[2:]) == {width} and width < keep.shape[1] - 100


def test_rows_of_a_batch_are_ranked_by_themselves():
    vlm = make("llava", "L", "fastv:layer=2,rank=9")
    k = torch.tensor([3, 3])
    state = vlm.request_state(k)
    vlm(**inputs_of(vlm, "how many ?", "how many ?"), ada_state=state)
    assert not torch.equal(*state.cut.keep)


def test_checkpointing_equals_none():
    results = []
    for checkpointing in (False, True):
        vlm = make("llava", "H", FASTV).train()
        if checkpointing:
            vlm.gradient_checkpointing_enable()
        torch.manual_seed(0)
        loss = vlm(**training_batch(vlm), k=torch.tensor([2, 1])).loss
        loss.backward()
        results.append((loss, vlm.scheduler.head.weight.grad, vlm.model.lm_head.weight.grad))
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-5, atol=1e-6)


def test_the_answer_does_not_decide_what_is_dropped():
    vlm = make("llava", "L", FASTV)
    batch, kept = training_batch(vlm, rows=[1]), []
    for word in ("two", "nine"):
        ids = batch["input_ids"].clone()
        ids[batch["labels"] == vlm.processor.tokenizer.convert_tokens_to_ids("two")] = (
            vlm.processor.tokenizer.convert_tokens_to_ids(word)
        )
        state = vlm.request_state(torch.tensor([2]), gated=True)
        vlm(**{**batch, "input_ids": ids}, ada_state=state)
        kept.append(state.cut.keep)
    assert torch.equal(*kept)


def test_flash_masks_are_two_dimensional():
    cut = TokenCut(FastV(1, rank=1), 3)
    image = torch.tensor([[True, True, True, False], [False, True, False, False]])
    cut.start(image, torch.tensor([3, 3]), None)
    cut.keep = torch.tensor([[False, True, False, True], [True, True, True, True]])
    hidden = cut.enter(torch.arange(8.0).view(2, 4, 1), 0)
    assert hidden[1, :, 0].tolist() == [4, 5, 6, 7] and hidden[0, -2:, 0].tolist() == [1, 3]
    made = cut.arguments({"attention_mask": None}, hidden, flash=True)["attention_mask"]
    assert made.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    given = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    made = cut.arguments({"attention_mask": given}, hidden, flash=True)["attention_mask"]
    assert made.tolist() == [[0, 0, 1, 1], [0, 1, 1, 1]]
    step = cut.enter(torch.zeros(2, 1, 1), 4)
    made = cut.arguments({"attention_mask": torch.ones(2, 5, dtype=torch.long)}, step, flash=True)["attention_mask"]
    assert made.tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]


def as_flash_attention(module, query, key, value, attention_mask, scaling=None, **_):
    """What flash attention computes, by its interface: causal, with one 0 or 1 per row and key, or no mask at all."""
    heads = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(heads, 1), value.repeat_interleave(heads, 1)
    queries, keys = query.shape[2], key.shape[2]
    allowed = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None]
    if attention_mask is not None:
        assert attention_mask.dim() == 2 and attention_mask.shape[0] == len(query), attention_mask.shape
        allowed = allowed & attention_mask[:, None, None, -keys:].bool()
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~allowed, -1e30)
    out = scores.softmax(-1) @ value * allowed.any(-1, keepdim=True)
    return out.transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("variant", [None, "L", "H"])
def test_flash_attention_gives_the_same(variant, monkeypatch):
    vlm = make("llava-gqa", variant) if variant else AdaptiveVLM(tiny_base("llava-gqa"), processor()).eval()
    asked = requests("llava-gqa") if variant else [replace(request, budget="100%") for request in requests("llava-gqa")]
    chosen = options("llava-gqa", token_selection=FASTV)
    told = vlm.generate_batch(asked, **chosen)
    masks = []

    def attend(module, query, key, value, attention_mask, **kwargs):
        masks.append(attention_mask)
        return as_flash_attention(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", attend)
    monkeypatch.setattr(vlm.model.config.get_text_config(), "_attn_implementation", "flash_attention_2")
    again = vlm.generate_batch(asked, **chosen)
    assert [answer.text for answer in again] == [answer.text for answer in told]
    assert [answer.layer_tokens for answer in again] == [answer.layer_tokens for answer in told]
    assert any(answer.layer_tokens[0] > answer.layer_tokens[-1] for answer in again)
    assert any(mask is not None and not mask.all() for mask in masks), "rows were padded, and flash attention told so"
    if variant:
        assert all(torch.equal(one.plan.gates, other.plan.gates) for one, other in zip(again, told, strict=True))


def test_flash_attention_and_sliding_windows():
    vlm = tiny_vlm("llava-mistral")
    vlm.token_selection = FASTV
    vlm.model.config.get_text_config()._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError, match="counts a sliding window in tokens"):
        vlm(**inputs_of(vlm, "how many ?"))


# -- before the decoder ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_images_of_a_batch_keep_their_own_numbers_of_tokens():
    vlm = make("llava", "L", "prumerge")
    answers = vlm.generate_batch(requests("llava"), **options("llava"))
    dropped = [a.prompt_tokens + 1 - a.layer_tokens[0] for a in answers]
    assert len(set(dropped[:3])) > 1 and dropped[0] == dropped[3] and dropped[4] > dropped[0] and dropped[5] == 0


def test_random_patches_depend_on_the_picture_and_the_seed_alone():
    vlm = make("llava", "L", "random:count=9")
    both = row_inputs(vlm, Request("what ?", IMAGES[0]), Request("how many ?", IMAGES[1]))
    alone = row_inputs(vlm, Request("how many ?", IMAGES[1]))
    chosen = vlm.token_selection
    (_, together), (_, single) = (select_images(vlm.model, inputs, chosen) for inputs in (both, alone))
    assert [len(tokens) for tokens in together] == [9, 9]
    torch.testing.assert_close(together[1], single[0])
    _, other = select_images(vlm.model, alone, chosen, seed=1)
    assert not torch.allclose(other[0], single[0], atol=1e-3)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [("vision_feature_layer", [-2, -1], "one layer"), ("vision_feature_select_strategy", "full", "without the CLS")],
)
def test_towers_whose_features_are_no_plain_patches(field, value, words):
    vlm = tiny_vlm("llava")
    setattr(vlm.model.config, field, value)
    with pytest.raises(ConfigError, match=words):
        vlm.token_selection = "uniform:ratio=0.5"
    vlm.token_selection = "fastv"


def test_the_selection_is_saved(tmp_path):
    vlm = make("llava", "L", "fastv:layer=3,ratio=0.75")
    vlm.save_pretrained(tmp_path)
    again = AdaptiveVLM.from_pretrained(tmp_path)
    assert again.token_selection == FastV(3, ratio=0.75)
    assert again.status()["token_selection"] == "fastv:layer=3,ratio=0.75"
    assert AdaptiveVLM.from_pretrained(tmp_path, token_selection="none").token_selection.name == "none"


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "chosen", "words"),
    [
        ("llava-next", "prumerge", "llava_next cuts images into tiles"),
        ("qwen2.5-vl", "uniform:ratio=0.5", "own resolution. Use 'fastv'"),
        ("mipha", "prumerge+", "vision tower .* has none"),
        ("qwen3-vl", "fastv", "adds features to them in later layers"),
        ("llava", "fastv:layer=4", "always runs its first 3 layers only. Choose a layer from 1 to 3"),
    ],
)
def test_selectors_that_make_no_sense(host, chosen, words):
    vlm = tiny_vlm(host)
    with pytest.raises(ConfigError, match=words):
        vlm.token_selection = chosen
    with pytest.raises(ConfigError, match=words):
        vlm.generate(IMAGES[0], "how many ?", token_selection=chosen)
    assert vlm.token_selection.name == "none"


def test_selectors_nobody_knows():
    vlm = tiny_vlm()
    with pytest.raises(UnknownNameError, match="Did you mean 'fastv'"):
        vlm.token_selection = "fastvv"
    with pytest.raises(ConfigError, match="needs either count or ratio"):
        vlm.token_selection = "random"
    with pytest.raises(ConfigError, match="'many' is no value for count"):
        vlm.token_selection = "uniform:count=many"
    with pytest.raises(ConfigError, match="setting=value was expected"):
        vlm.token_selection = "fastv:0.5"


def test_embeddings_do_not_say_where_images_are():
    for chosen, words in ((FASTV, "which tokens are images"), ("uniform:ratio=0.5", "needs input_ids, not embeddings")):
        vlm = make("llava", "L", chosen)
        inputs = inputs_of(vlm, "how many ?")
        embeds = vlm.model.get_input_embeddings()(inputs["input_ids"])
        with pytest.raises(PromptError, match=words):
            vlm(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], pixel_values=inputs["pixel_values"])
