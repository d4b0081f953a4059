"""Weights quantised by other libraries: variant L runs whole layers and takes them; variant H says that it cannot."""

import pytest
import torch
from transformers import BitsAndBytesConfig, TorchAoConfig

from adallava.bench import BenchSettings, quantized
from adallava.errors import ConfigError
from adallava.hosts.graphs import use_graphs
from adallava.hosts.model import AdaptiveVLM, Request
from adallava.mini.scenes import sample_scene, to_image
from test_hosts_graphs import Recorder

PICTURE = to_image(sample_scene("test", 7, 0))
QUESTION = "how many sevens are there ?"


def torchao():
    return TorchAoConfig(pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig())


def eight_bit():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True)


def four_bit():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


@pytest.mark.parametrize("config", [torchao, eight_bit, four_bit])
def test_layers_are_left_out_of_quantised_models(config):
    vlm = AdaptiveVLM.from_pretrained("mini-L", quantization_config=config())
    exact = AdaptiveVLM.from_pretrained("mini-L")
    requests = [Request(QUESTION, PICTURE, budget=budget) for budget in ("100%", "75%", "50%")]
    answers, wanted = vlm.generate_batch(requests), exact.generate_batch(requests)
    assert [answer.text for answer in answers] == [answer.text for answer in wanted]
    assert [answer.plan.k for answer in answers] == [[6], [3], [0]]
    assert [answer.cost for answer in answers] == [answer.cost for answer in wanted]
    # A row of a batch is answered as it is alone.
    assert vlm.generate(PICTURE, QUESTION, budget="75%").text == answers[1].text


@pytest.mark.parametrize("config", [torchao, eight_bit, four_bit])
def test_heads_are_not(config):
    vlm = AdaptiveVLM.from_pretrained("mini-H", quantization_config=config())
    assert vlm.generate(PICTURE, QUESTION, budget="100%").text
    with pytest.raises(ConfigError, match="without quantization for variant H, or use variant L"):
        vlm.generate(PICTURE, QUESTION, budget="60%")


def said(vlm):
    """Eight tokens at each of three budgets, however soon an answer would end."""
    options = {"max_new_tokens": 8, "min_new_tokens": 8}
    return [vlm.generate(PICTURE, QUESTION, budget=budget, **options).text for budget in ("100%", "75%", "50%")]


@pytest.mark.parametrize("config", [torchao, eight_bit, four_bit])
def test_graphs_give_the_same_answers(config):
    vlm, recorder = AdaptiveVLM.from_pretrained("mini-L", quantization_config=config()), Recorder()
    plain = said(vlm)
    use_graphs(vlm, 400, recorder)
    assert said(vlm) == plain
    assert recorder.recorded == 12 and recorder.replayed == 7 * (12 + 9 + 6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("config", [torchao, four_bit])
def test_cuda_graphs_give_the_same_answers(config):
    vlm = AdaptiveVLM.from_pretrained("mini-L", quantization_config=config(), device="cuda")
    plain = said(vlm)
    use_graphs(vlm, 400)
    assert said(vlm) == plain


def test_cuda_graphs_cannot_wait_for_outliers(monkeypatch):
    vlm = AdaptiveVLM.from_pretrained("mini-L", quantization_config=eight_bit())
    monkeypatch.setattr(AdaptiveVLM, "device", torch.device("cuda"))
    with pytest.raises(ConfigError, match="llm_int8_threshold=0.0"):
        use_graphs(vlm)
    exact = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    use_graphs(AdaptiveVLM.from_pretrained("mini-L", quantization_config=exact))


def test_the_benchmark_tells_ratios_beside_shares_for_what_is_installed(monkeypatch):
    pytest.importorskip("torchao")
    pytest.importorskip("bitsandbytes")
    monkeypatch.delitem(quantized.PACKINGS, "nf4, bitsandbytes")  # which takes no layer as narrow as this model's
    rows = quantized.measure(BenchSettings("tiny", rounds=1, threads=1))
    assert {row.config["weights"] for row in rows} == set(quantized.PACKINGS)
    assert len(rows) == 6 * len(quantized.PACKINGS)
    shares = {row.config["measure"]: row.metrics["share"] for row in rows if row.config["weights"] == "int8, torchao"}
    assert shares["L 50%, prefill"] == pytest.approx(0.5, abs=0.05)
    # The smaller the layers' weights, the more of what is read is the output layer and the cache, at any budget.
    assert shares["L 50%, decode"] > shares["L 50%, prefill"]
    assert all(row.metrics["ratio"] > 0 for row in rows)
