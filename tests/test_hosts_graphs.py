"""Decoding with graphs: the same tokens as without. On a CPU a graph is its work done again, on the same tensors."""

import pytest
import torch

from adallava.errors import ConfigError
from adallava.hosts.graphs import capture_cuda, use_graphs
from adallava.hosts.prompts import Request
from matrix import options, requests
from tiny import tiny_vlm

TOKENS = 400


class Recorder:
    """Counts what was recorded and how often it was done again."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def __call__(self, work):
        self.recorded += 1
        work()  # as a warm-up, which leaves other hidden states behind

        def replay():
            self.replayed += 1
            work()

        return replay


def texts(vlm, host, budget, **more):
    answered = []
    for request in requests(host):
        one = Request(request.question, request.images, request.messages, budget)
        answered.append(vlm.generate_batch([one], **options(host, max_new_tokens=8, **more))[0].text)
    return answered


@pytest.mark.parametrize("host", ["llava", "llava-gqa", "llava-phi", "qwen2-vl", "mipha"])
@pytest.mark.parametrize("variant", ["L", "H"])
def test_graphs_give_the_same_answers(host, variant):
    vlm, recorder = tiny_vlm(host, variant), Recorder()
    plain = {budget: texts(vlm, host, budget) for budget in ("100%", "67%", "50%")}
    use_graphs(vlm, TOKENS, recorder)
    assert {budget: texts(vlm, host, budget) for budget in plain} == plain
    assert recorder.recorded == 6, "each layer is recorded once, whatever plans and prompts come"
    assert recorder.replayed >= 3 * len(requests(host)) * 7 * 3, "and replayed in every step that runs it whole"
    assert texts(vlm, host, "67%", do_sample=False) == plain["67%"]


def test_what_does_not_fit_decodes_without():
    vlm, recorder = tiny_vlm(), Recorder()
    asked = [Request(question, budget="67%") for question in ("what color is it ?", "how many are there ?")]
    plain = [answer.text for answer in vlm.generate_batch(asked, max_new_tokens=6)]
    use_graphs(vlm, 8, recorder)
    vlm.generate_batch(asked[:1], max_new_tokens=6)
    assert recorder.recorded == 0, "it is too long"
    use_graphs(vlm, TOKENS, recorder)
    assert [answer.text for answer in vlm.generate_batch(asked, max_new_tokens=6)] == plain
    vlm.generate_batch(asked[:1], max_new_tokens=6, num_beams=2)
    with vlm.graphs.lock:
        assert vlm.generate_batch(asked[:1], max_new_tokens=6)[0].text == plain[0]
    assert recorder.recorded == 0, "batches, beams and a second request have none"
    assert vlm.generate_batch(asked[:1], max_new_tokens=6)[0].text == plain[0]
    assert recorder.recorded > 0 and not vlm.graphs.lock.locked()


def test_where_graphs_cannot_be():
    with pytest.raises(ConfigError, match="the model is on cpu"):
        use_graphs(tiny_vlm())
    with pytest.raises(ConfigError, match="sliding windows"):
        use_graphs(tiny_vlm("llava-mistral", sliding_window=8), capture=Recorder())
    with pytest.raises(ConfigError, match="max_tokens is 0"):
        use_graphs(tiny_vlm(), 0, Recorder())
    vlm = tiny_vlm()
    vlm.model.set_attn_implementation("eager")
    with pytest.raises(ConfigError, match="the model has eager"):
        use_graphs(vlm, capture=Recorder())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("variant", ["L", "H"])
def test_cuda_graphs_give_the_same_answers(variant):
    vlm = tiny_vlm(variant=variant).to("cuda")
    plain = {budget: texts(vlm, "llava", budget) for budget in ("100%", "67%", "50%")}
    use_graphs(vlm, TOKENS, capture_cuda)
    assert {budget: texts(vlm, "llava", budget) for budget in plain} == plain
