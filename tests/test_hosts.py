"""The invariant matrix: what must hold for every host and variant, on tiny random models."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from adallava.errors import CheckpointError
from adallava.hosts.cache import AdaptiveCache
from adallava.hosts.inputs import insert_latency_slot
from adallava.hosts.model import Request
from adallava.hosts.prompts import encode, to_prompt
from adallava.hosts.switch import is_attached
from matrix import IMAGES, inputs_of, options, requests, training_batch
from tiny import ROWS, heads_per_switch, processor, tiny_base, tiny_vlm

matrix = pytest.mark.parametrize(("host", "variant"), ROWS)


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
    vlm.generate(IMAGES[0], "how many ?", budget="70%", **options(host))
    model = vlm.detach()
    assert type(model) is type(base) and not is_attached(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert torch.equal(model(**inputs).logits, base(**inputs).logits)


@matrix
def test_everything_on_equals_the_base_model_with_the_latency_token(host, variant):
    base, vlm = tiny_base(host), tiny_vlm(host, variant)
    inputs = inputs_of(vlm, "how many ?")
    logits = vlm(**inputs).logits
    token = vlm.scheduler.encode(torch.tensor([vlm.adaptive_config.max_k]))

    def overwrite_the_last(module, args, out):
        return torch.cat([out[:, :-1], token[:, None]], 1)

    base.get_input_embeddings().register_forward_hook(overwrite_the_last)
    expected = base(**insert_latency_slot(inputs, 0)[0]).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@matrix
def test_a_mixed_batch_equals_single_requests(host, variant):
    vlm = tiny_vlm(host, variant)
    batch = vlm.generate_batch(requests(host), **options(host))
    assert len({a.text for a in batch}) > 1, "the random model should answer differently"
    for request, together in zip(requests(host), batch, strict=True):
        alone = vlm.generate_batch([request], **options(host))[0]
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
    for request in requests(host):
        cached = vlm.generate_batch([request], **options(host))[0]
        uncached = vlm.generate_batch([request], use_cache=False, **options(host))[0]
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
    beams = options(host, num_beams=3, num_return_sequences=2)
    batch = vlm.generate_batch(requests(host), **beams)
    for request, together in zip(requests(host), batch, strict=True):
        alone = vlm.generate_batch([request], **beams)[0]
        assert len(together.texts) == 2
        assert (together.texts, together.plan) == (alone.texts, alone.plan)


@matrix
def test_beam_search_with_cache_equals_without(host, variant):
    vlm = tiny_vlm(host, variant)
    for request in requests(host)[:4]:
        cached = vlm.generate_batch([request], **options(host, num_beams=4))[0]
        assert cached.text == vlm.generate_batch([request], **options(host, num_beams=4, use_cache=False))[0].text


@matrix
def test_threads_equal_sequential(host, variant):
    vlm = tiny_vlm(host, variant)
    sequential = [vlm.generate_batch([r], **options(host))[0] for r in requests(host)]
    with ThreadPoolExecutor(4) as pool:
        threaded = list(pool.map(lambda r: vlm.generate_batch([r], **options(host))[0], requests(host) * 2))
    assert [(a.text, a.plan) for a in threaded] == [(a.text, a.plan) for a in sequential] * 2


@matrix
def test_save_then_load_is_equal(host, variant, tmp_path):
    vlm = tiny_vlm(host, variant)
    vlm.save_pretrained(tmp_path)
    again = type(vlm).from_pretrained(tmp_path)
    first, second = (m.generate(IMAGES[0], "how many ?", budget="70%", **options(host)) for m in (vlm, again))
    assert (first.text, first.plan) == (second.text, second.plan)
    assert_same_model(vlm, again)


def assert_same_model(first, second):
    """The same weights, to the bit; products of them hang on where they lie in memory, in the last digits."""
    weights, others = first.state_dict(), second.state_dict()
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    inputs, k = inputs_of(first, "how many ?"), torch.tensor([1])
    torch.testing.assert_close(first(**inputs, k=k).logits, second(**inputs, k=k).logits, rtol=0, atol=2e-5)


@matrix
def test_the_saved_base_is_an_ordinary_checkpoint(host, variant, tmp_path):
    vlm = tiny_vlm(host, variant)
    vlm.save_pretrained(tmp_path)
    plain = type(tiny_base(host)).from_pretrained(tmp_path)
    assert plain.state_dict().keys() == vlm.model.state_dict().keys()
    assert plain.config.architectures == [type(tiny_base(host)).__name__]


@matrix
def test_adapter_only_folder_names_its_base(host, variant, tmp_path):
    tiny_base(host).save_pretrained(tmp_path / "base")
    processor(host).save_pretrained(tmp_path / "base")
    vlm = tiny_vlm(host, variant)
    with pytest.raises(CheckpointError, match="must name its base model"):
        vlm.save_pretrained(tmp_path / "adapter", adapter_only=True)
    named = (
        type(vlm)
        .adapt(
            vlm.detach(),
            processor(host),
            variant=variant,
            heads_per_switch=heads_per_switch(host, variant),
            base_model=str(tmp_path / "base"),
        )
        .eval()
    )
    named.save_pretrained(tmp_path / "adapter", adapter_only=True)
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == ["adaptive.safetensors", "adaptive_config.json"]
    again = type(named).from_pretrained(tmp_path / "adapter")
    assert_same_model(named, again)


@matrix
def test_cost_and_cache_grow_with_k(host, variant):
    vlm = tiny_vlm(host, variant)
    inputs = inputs_of(vlm, "how many ?")
    flops, held = [], []
    for k, budget in enumerate(vlm.reachable_budgets()):
        answer = vlm.generate(IMAGES[0], "how many ?", budget=budget, **options(host))
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
def test_gradient_reaches_the_scheduler_and_all_that_the_base_model_trains(host, variant):
    base, vlm = tiny_base(host).train(), tiny_vlm(host, variant).train()
    batch = training_batch(vlm)
    base(**batch).loss.backward()
    torch.manual_seed(0)
    # Row 0 runs everything: what is off in all rows rightly has no gradient.
    vlm(**batch, k=torch.tensor([vlm.adaptive_config.max_k, 1])).loss.backward()
    trained = {f"model.{name}" for name, w in base.named_parameters() if w.grad is not None and w.grad.any()}
    trained |= {f"scheduler.{name}" for name, _ in vlm.scheduler.named_parameters()}
    reached = {name for name, w in vlm.named_parameters() if w.grad is not None and w.grad.any()}
    assert trained - reached == set() and len(trained) > 50


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


@matrix
def test_random_budgets_are_drawn_over_all_k(host, variant):
    vlm = tiny_vlm(host, variant).train()
    batch, seen = training_batch(vlm), set()
    vlm.request_state = lambda k, make=vlm.request_state, **more: seen.update(k.tolist()) or make(k, **more)
    with torch.no_grad():
        vlm(**batch)
        vlm.model.forward = lambda **_: None  # the draws need no model
        for _ in range(12 * vlm.adaptive_config.max_k):
            vlm(**batch)
    assert seen == set(range(vlm.adaptive_config.max_k + 1))


@pytest.mark.parametrize("variant", ["L", "H"])
def test_what_a_seed_draws_does_not_depend_on_the_batch(variant):
    vlm = tiny_vlm(variant=variant).train()
    batch = training_batch(vlm)
    seeds, states = torch.tensor([5, 6]), []
    vlm.request_state = lambda k, make=vlm.request_state, **more: states.append(make(k, **more)) or states[-1]
    with torch.no_grad():
        vlm(**batch, seeds=seeds)
        vlm(**{name: value.flip(0) for name, value in batch.items()}, seeds=seeds.flip(0))
        for row in range(2):
            vlm(**{name: value[[row]] for name, value in batch.items()}, seeds=seeds[[row]])
        vlm(**batch, seeds=seeds + 10)
    both, flipped, first, second, other = states
    assert torch.equal(both.k, flipped.k.flip(0)) and torch.equal(both.gates, flipped.gates.flip(0))
    assert torch.equal(both.gates, torch.cat((first.gates, second.gates)))
    assert not torch.equal(both.k, other.k) or not torch.equal(both.gates, other.gates)


def test_a_row_without_an_answer_is_a_prompt():
    vlm = tiny_vlm().train()
    batch = training_batch(vlm)
    whole = batch["attention_mask"].sum(1)
    batch["labels"][1] = -100
    state = vlm.request_state(torch.tensor([1, 1]))
    loss = vlm(**batch, ada_state=state).loss
    assert state.latency_index[1] == whole[1] and state.latency_index[0] < whole[0] and loss.isfinite()


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
    alone = training_batch(vlm, rows=[1])
    length = alone["input_ids"].shape[1]
    assert length < batch["input_ids"].shape[1]
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
    for request in requests(host):
        first, second = (m.generate_batch([request], **options(host))[0] for m in (sdpa, eager))
        assert (first.text, first.plan) == (second.text, second.plan)
