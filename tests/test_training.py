"""Training: interrupted runs continue as if nothing had happened, and every stage makes a model that loads."""

import os
import signal
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, TrainerCallback

from adallava import AdaptiveVLM
from adallava.data.collate import Collator
from adallava.errors import UnknownNameError
from adallava.evaluation.sweep import weights_digest
from adallava.mini import recipe
from adallava.mini.dataset import ConversationDataset, SceneData
from adallava.results import read_rows
from adallava.training.fit import Interrupted, TrainConfig, fit
from tiny import processor, tiny_base, tiny_vlm

CONFIG = TrainConfig(steps=6, batch_size=2, save_every=2, log_every=1, order="in_order")


class Kill(TrainerCallback):
    """Sends this process a Ctrl-C in the middle of a step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def train(variant, output, callbacks=(), mode="learned", config=CONFIG):
    vlm = tiny_base().train() if variant == "base" else tiny_vlm(variant=variant).train()
    vlm.mode = mode
    dataset = ConversationDataset(processor().tokenizer, SceneData(CONFIG.steps * CONFIG.batch_size), 2)
    outcome = fit(vlm, dataset, Collator(processor().tokenizer.pad_token_id), config, output, list(callbacks))
    return [h["loss"] for h in outcome.history if "loss" in h], vlm


@pytest.mark.parametrize(("variant", "muon"), [("L", None), ("H", 3e-3), ("base", 3e-3)])
def test_an_interrupted_run_continues_with_the_same_losses(variant, muon, tmp_path):
    config = replace(CONFIG, muon_learning_rate=muon)
    losses, whole = train(variant, tmp_path / "whole", config=config)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="start again to go on"):
        train(variant, tmp_path / "cut", [Kill(3)], config=config)
    assert signal.getsignal(signal.SIGINT) is before
    assert (tmp_path / "cut" / "checkpoints" / "checkpoint-4").is_dir()
    continued, resumed = train(variant, tmp_path / "cut", config=config)
    assert len(losses) == 6 and continued == pytest.approx(losses, abs=1e-6)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("variant", ["base", "L"])
def test_training_fills_no_cache(variant, tmp_path, monkeypatch):
    filled = []
    monkeypatch.setattr(DynamicCache, "update", lambda *args, **kwargs: filled.append(args))
    _, vlm = train(variant, tmp_path, config=replace(CONFIG, steps=2))
    assert filled == []
    assert vlm.config.get_text_config().use_cache, "as before the training"


def test_training_under_random_plans_leaves_the_scheduler_alone(tmp_path):
    before = tiny_vlm().scheduler.state_dict()
    _, vlm = train("L", tmp_path, mode="random")
    assert torch.equal(vlm.scheduler.head.weight, before["head.weight"])
    encoder = "latency_encoder.net.3.weight"
    assert not torch.equal(vlm.scheduler.state_dict()[encoder], before[encoder]), "the latency token still learns"


def test_the_schedulers_head_has_a_rate_of_its_own(tmp_path):
    before = tiny_vlm().scheduler.state_dict()
    encoder = "latency_encoder.net.3.weight"
    for rate, still in ((0.0, True), (1e-3, False), (None, False)):
        config = replace(CONFIG, steps=2, muon_learning_rate=3e-3, head_learning_rate=rate)
        _, vlm = train("L", tmp_path / str(rate), config=config)
        assert torch.equal(vlm.scheduler.head.weight, before["head.weight"]) == still
        assert not torch.equal(vlm.scheduler.state_dict()[encoder], before[encoder])


def test_the_whole_recipe_in_miniature(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "TOWER", replace(recipe.TOWER, batch_size=6))
    for stage in ("CAPTIONS", "QUESTIONS", "ADAPTIVE"):
        monkeypatch.setattr(recipe, stage, replace(getattr(recipe, stage), batch_size=2, log_every=1))
    scale = 1e-9  # two steps a stage
    recipe.run("mini", tmp_path, scale)
    made = {p.name for p in tmp_path.iterdir()}
    assert made == {"tower", "mini-base-captions", "mini-base", "mini-L", "mini-H"}
    history = read_rows(tmp_path / "mini-L" / "training.json")
    assert [row.metrics["step"] for row in history] == [1, 2] and all(row.metrics["loss"] > 0 for row in history)
    stamp = (tmp_path / "mini-L" / "model.safetensors").stat().st_mtime_ns
    recipe.run("mini-L", tmp_path, scale)
    assert (tmp_path / "mini-L" / "model.safetensors").stat().st_mtime_ns == stamp, "a finished stage is not repeated"
    recipe.run("mini-shallow", tmp_path, scale)
    assert AdaptiveVLM.from_pretrained(tmp_path / "mini-shallow").spec.num_layers == recipe.PREFIX_LAYERS
    longer = AdaptiveVLM.from_pretrained(recipe.run("mini-base-longer", tmp_path, scale))
    assert longer.adaptive_config is None
    base = AdaptiveVLM.from_pretrained(tmp_path / "mini-base")
    assert weights_digest(longer) != weights_digest(base), "it was trained on"
    recipe.run("mini-selection", tmp_path, scale)
    for name in ("mini-L-prumerge", "mini-L-prumerge+", "mini-H-prumerge", "mini-H-prumerge+", "mini-L-fastv"):
        vlm = AdaptiveVLM.from_pretrained(tmp_path / name)
        assert (vlm.adaptive_config.variant, vlm.token_selection.name) == tuple(name.split("-")[1:])
    for name, prefix, switches in (("mini-L-9-switches", 3, 9), ("mini-H-2-heads", 6, 12)):
        config = AdaptiveVLM.from_pretrained(recipe.run(name, tmp_path, scale)).adaptive_config
        assert (config.prefix_layers, config.max_k) == (prefix, switches)
    for name, variant in (("mini-L", "L"), ("mini-H", "H")):
        recipe.export(tmp_path / name, tmp_path / "shipped" / name)
        vlm = AdaptiveVLM.from_pretrained(tmp_path / "shipped" / name)
        assert vlm.status()["variant"] == variant
        assert vlm.generate(None, "how many ?", budget="60%", max_new_tokens=2).plan.k == [1 if variant == "L" else 4]
        size = sum(f.stat().st_size for f in (tmp_path / "shipped" / name).iterdir())
        assert size < 6.6e6, "three such folders make under 20 MB"


def test_unknown_recipes(tmp_path):
    with pytest.raises(UnknownNameError, match="Did you mean 'mini-L'"):
        recipe.run("mini-l", tmp_path)
