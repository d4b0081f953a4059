"""Table B's cost columns, the released MME numbers they rest on, prompts, estimates and tensor parallelism."""

import dataclasses

import pytest

from adallava.cost import (
    LLAVA_1_5_7B,
    CostError,
    ModelSpec,
    PromptTokens,
    Setting,
    decode_step,
    estimate,
    footprint_bytes,
    full_loads,
    prefill,
    prefill_flops,
    prefill_time_ms,
    strict_decode_step_flops,
    strict_prefill_flops,
)
from adallava.cost.paper import FLOPS_COLUMN, MME, TIME_COLUMN, table_b
from adallava.errors import UnknownNameError

CELLS = table_b()
PLAN_27 = [32] * 27 + [0] * 5
TWO_KV = ModelSpec(64, 96, 6, 8, 2, 8, 100)


def cell(row, column):
    return next(c for c in CELLS if (c.row, c.column) == (row, column))


# -- Table B ----------------------------------------------------------------------------------------------------------


def test_all_rows_and_columns_are_there():
    assert len(CELLS) == 70 and len({(c.row, c.column) for c in CELLS}) == 70
    rows = {c.row for c in CELLS}
    assert "LLaVA-1.5-13B AdaLLaVA-H 60%" in rows and "LLaVA-1.5-7B PruMerge+ AdaLLaVA-L 85%" in rows
    assert {c.column for c in CELLS} == {FLOPS_COLUMN, TIME_COLUMN}


def test_every_cell_matches_or_says_why_not():
    for c in CELLS:
        assert c.match == (f"{c.ours:.{len(c.paper.partition('.')[2])}f}" == c.paper)
        assert bool(c.reason) == (not c.match)
        assert "not explained" not in c.reason
        assert 0 < c.low <= c.ours
    missed = {(c.row.removeprefix("LLaVA-1.5-"), c.column) for c in CELLS if not c.match}
    assert missed == {
        ("7B AdaLLaVA-L 60%", TIME_COLUMN),
        ("13B base 100%", TIME_COLUMN),
        ("13B AdaLLaVA-H 85%", TIME_COLUMN),
        ("13B AdaLLaVA-H 60%", TIME_COLUMN),
        ("7B PruMerge AdaLLaVA-L 85%", TIME_COLUMN),
        ("7B PruMerge AdaLLaVA-H 85%", TIME_COLUMN),
        ("7B PruMerge+ base 100%", TIME_COLUMN),
        ("7B FastV base 100%", TIME_COLUMN),
        ("7B FastV AdaLLaVA-L 85%", FLOPS_COLUMN),
        ("7B FastV AdaLLaVA-H 85%", FLOPS_COLUMN),
        ("7B FastV AdaLLaVA-H 85%", TIME_COLUMN),
    }


@pytest.mark.parametrize(
    ("row", "tflops", "ms"),
    [
        ("LLaVA-1.5-7B AdaLLaVA-L 100%", 8.566, 81.39),
        ("LLaVA-1.5-7B AdaLLaVA-L 85%", 7.228, 68.72),
        ("LLaVA-1.5-7B AdaLLaVA-L 60%", 5.086, 48.44),
        ("LLaVA-1.5-7B AdaLLaVA-H 60%", 5.087, 48.87),
        ("LLaVA-1.5-13B AdaLLaVA-L 60%", 10.017, 94.13),
        ("LLaVA-1.5-13B AdaLLaVA-H 60%", 10.018, 95.07),
        ("LLaVA-1.5-7B FastV AdaLLaVA-L 85%", 4.194, 39.67),
        ("LLaVA-1.5-7B PruMerge AdaLLaVA-L 85%", 1.197, 13.44),
        ("LLaVA-1.5-7B PruMerge+ AdaLLaVA-L 60%", 1.802, 17.11),
    ],
)
def test_values_are_those_that_were_computed_independently(row, tflops, ms):
    assert cell(row, FLOPS_COLUMN).ours == pytest.approx(tflops, abs=5.1e-4)
    assert cell(row, TIME_COLUMN).ours == pytest.approx(ms, abs=5.1e-3)


def test_h_rows_tell_the_range_of_their_plans():
    c = cell("LLaVA-1.5-13B AdaLLaVA-H 60%", TIME_COLUMN)
    assert c.low == pytest.approx(cell("LLaVA-1.5-13B AdaLLaVA-L 60%", TIME_COLUMN).ours)
    assert "94.13 with the head groups packed" in c.reason and "95.07" in c.reason


def test_the_released_mme_numbers():
    """What the authors printed for LLaVA-1.5-7B at 85 % on MME, from the sums over its prompts' lengths."""
    flops = MME.mean_of(lambda s: prefill_flops(LLAVA_1_5_7B, PLAN_27, s))
    time_ms = MME.mean_of(lambda s: prefill_time_ms(LLAVA_1_5_7B, PLAN_27, s))
    memory = MME.mean_of(lambda s: footprint_bytes(LLAVA_1_5_7B, PLAN_27, s))
    assert flops == pytest.approx(7227678532923.026, rel=1e-9)
    assert time_ms == pytest.approx(68.71909813745529, rel=1e-9)
    assert memory == pytest.approx(11342271151.824768, rel=1e-9)


def test_moments():
    lengths = [3, 4, 4, 9]
    moments = dataclasses.replace(MME, prompts=4, sum_tokens=20, sum_squares=122)
    for less in (0, 1, 2):
        mean = sum(7 + 2 * (s - less) + 5 * (s - less) ** 2 for s in lengths) / 4
        assert moments.mean_of(lambda s: 7 + 2 * s + 5 * s * s, less) == pytest.approx(mean, rel=1e-12)


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_prompt_tokens():
    assert PromptTokens(67, 576).total == 644
    assert PromptTokens(67, 576).layers(3) == [644] * 3
    assert PromptTokens(67, 576, cut_layer=2, kept=288).layers(4) == [644, 644, 356, 356]
    assert PromptTokens(67, 576, 0, cut_layer=2, kept=0).layers(3) == [643, 643, 67]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": -1, "visual": 5}, "text is -1"),
        ({"text": 1, "visual": True}, "visual is True"),
        ({"text": 1, "visual": 5, "kept": 3}, "cut_layer and kept belong together"),
        ({"text": 1, "visual": 5, "kept": 6, "cut_layer": 2}, "kept is 6, more than the 5 visual"),
    ],
)
def test_bad_prompts(fields, message):
    with pytest.raises(CostError, match=message):
        PromptTokens(**fields)


# -- estimates --------------------------------------------------------------------------------------------------------


def test_estimate_names_its_convention_and_agrees_with_the_functions():
    prompt = PromptTokens(67, 576)
    paper, strict = (estimate(LLAVA_1_5_7B, PLAN_27, prompt, Setting(convention=c)) for c in ("paper", "strict"))
    assert (paper.convention, strict.convention) == ("paper", "strict")
    assert paper.prefill.flops == prefill_flops(LLAVA_1_5_7B, PLAN_27, 644)
    assert paper.prefill.time_ms == prefill_time_ms(LLAVA_1_5_7B, PLAN_27, 644)
    assert paper.footprint_bytes == footprint_bytes(LLAVA_1_5_7B, PLAN_27, 644)
    assert paper.kv_cache_bytes == 27 * 2 * 2 * 4096 * 644
    assert strict.prefill.flops == strict_prefill_flops(LLAVA_1_5_7B, PLAN_27, 644)
    assert strict.decode.flops == strict_decode_step_flops(LLAVA_1_5_7B, PLAN_27, 645)
    assert strict.prefill.time_ms == paper.prefill.time_ms
    assert paper.vision_flops == strict.vision_flops == 406_077_407_232
    assert estimate(TWO_KV, full_loads(TWO_KV), prompt).vision_flops is None
    fewer = estimate(LLAVA_1_5_7B, PLAN_27, PromptTokens(67, 40)).vision_flops
    assert paper.vision_flops - fewer == 536 * 2 * (1024 * 4096 + 4096 * 4096)


def test_flash_and_batch_reach_the_estimate():
    prompt = PromptTokens(67, 576)
    one, flash, two = (
        estimate(LLAVA_1_5_7B, PLAN_27, prompt, setting)
        for setting in (Setting(), Setting(flash=True), Setting(batch=2))
    )
    assert flash.prefill.time_ms == prefill_time_ms(LLAVA_1_5_7B, PLAN_27, 644, flash=True) < one.prefill.time_ms
    assert two.prefill.flops == 2 * one.prefill.flops and two.vision_flops == 2 * one.vision_flops


def test_bad_settings():
    with pytest.raises(CostError, match="'strct', expected 'paper'.*Did you mean 'strict'"):
        Setting(convention="strct")
    with pytest.raises(UnknownNameError, match="Did you mean 'nvidia_A100'"):
        Setting(device="nvidia_A10")


# -- tensor parallelism -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [prefill, decode_step])
def test_what_devices_share_and_what_each_does_in_full(stage):
    plan = [8, 8, 4, 4, 0, 8]
    whole, half = (stage(TWO_KV, plan, 50, batch=3, tensor_parallel=n) for n in (1, 2))
    ops = [(a, b) for (a, _), (b, _) in zip(whole.ops, half.ops, strict=True)]
    for a, b in ops:
        same = a.name.endswith(("norm", "add"))
        assert (a.flops, a.weight_bytes) == ((b.flops, b.weight_bytes) if same else (2 * b.flops, 2 * b.weight_bytes))
        if a.name in ("q_proj", "k_proj", "up_proj", "lm_head"):
            assert a.act_read_bytes == b.act_read_bytes and a.act_write_bytes == 2 * b.act_write_bytes
        if a.name in ("o_proj", "down_proj"):
            assert a.act_read_bytes == 2 * b.act_read_bytes and a.act_write_bytes == b.act_write_bytes
    assert whole.kv_write_bytes == 2 * half.kv_write_bytes and whole.weight_bytes == 2 * half.weight_bytes
    assert {a.name for a, _ in ops} >= {"qk_matmul", "softmax", "mlp_act", "attn_norm", "mlp_add"}


def test_devices_that_do_not_divide():
    with pytest.raises(CostError, match="tensor_parallel is 4, which does not divide the 2 key/value.*one of 1, 2"):
        prefill(TWO_KV, [8] * 6, 50, tensor_parallel=4)
    with pytest.raises(CostError, match="tensor_parallel is 0"):
        footprint_bytes(TWO_KV, [8] * 6, 50, tensor_parallel=0)
    assert footprint_bytes(TWO_KV, [8] * 6, 50, tensor_parallel=2) < footprint_bytes(TWO_KV, [8] * 6, 50)
