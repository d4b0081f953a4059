"""Weights quantised by other libraries: variant L runs whole layers and takes them; variant H says that it cannot."""

import pytest
from transformers import BitsAndBytesConfig, TorchAoConfig

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


@pytest.mark.parametrize("config", [torchao, eight_bit, four_bit])
def test_graphs_are_refused(config):
    vlm = AdaptiveVLM.from_pretrained("mini-L", quantization_config=config())
    with pytest.raises(ConfigError, match="graphs do not work with quantised weights yet"):
        use_graphs(vlm, 400, Recorder())
