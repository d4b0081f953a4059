"""Recipes at the paper's scale: what they say, what they would take, and runs of them on a tiny checkpoint."""

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import fsdp_worker
from adallava import AdaptiveVLM
from adallava.cli.main import app
from adallava.errors import ConfigError, DataError, UnknownNameError
from adallava.results import read_rows
from adallava.training import run as runs
from adallava.training.dry_run import dry_run, meta_model
from adallava.training.fit import last_checkpoint
from adallava.training.parts import choose_trainable, counts, merge_adapters
from adallava.training.recipes import RECIPES, TrainRecipe, load_recipe, parse_change
from adallava.training.run import DataPaths, prepare, train_recipe
from tiny import processor, tiny_base, tiny_vlm

WORKER = Path(__file__).parent / "train_worker.py"
WORDS = ["red", "green", "blue", "yellow", "star", "circle", "square", "two", "three", "seven"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny base checkpoint, 24 conversations, a quarter of them without an image, and their images."""
    folder = tmp_path_factory.mktemp("llava")
    rng = random.Random(0)
    entries = []
    for number in range(24):
        text = number % 4 == 3
        question = f"{'' if text else '<image>' + chr(10)}how many {rng.choice(WORDS)} ?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": rng.choice(WORDS)}]
        if number % 3 == 0:
            turns += [{"from": "human", "value": "what color ?"}, {"from": "gpt", "value": rng.choice(WORDS)}]
        entries.append({"id": number, "conversations": turns, **({} if text else {"image": f"{number}.png"})})
        Image.new("RGB", (40, 30), tuple(rng.randrange(256) for _ in range(3))).save(folder / f"{number}.png")
    (folder / "data.json").write_text(json.dumps(entries))
    model = tiny_base()
    model.save_pretrained(folder / "base")
    processor().save_pretrained(folder / "base")
    return folder


def tiny_recipe(folder, **changes):
    fields = {
        "variant": "L",
        "global_batch": 4,
        "device_batch": 4,
        "learning_rate": 1e-3,
        "workers": 0,
        "save_every": 2,
        "lora_rank": 4,
        "lora_dropout": 0.0,
        "gradient_checkpointing": False,
        "model": str(folder / "base"),
        **changes,
    }
    return TrainRecipe("tiny", **fields)


def train(folder, out, **changes):
    return train_recipe(tiny_recipe(folder, **changes), DataPaths(folder / "data.json", folder), out)


def losses(out):
    return [row.metrics["loss"] for row in read_rows(out / runs.HISTORY)]


def worker(folder, recipes, processes=1, check=True, **environment):
    """Run recipes, given by the folders they make, in processes of their own."""
    paths = []
    for out, recipe in recipes.items():
        paths.append(out.with_suffix(".json"))
        paths[-1].write_text(json.dumps(asdict(recipe)))
    return launch([WORKER, folder / "data.json", folder, *paths], processes, check, **environment)


def launch(arguments, processes, check=True, **environment):
    """Run a script of the tests in processes of their own."""
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(several if processes > 1 else []), *map(str, arguments)]
    paths = os.pathsep.join((str(Path(runs.__file__).parents[2]), str(WORKER.parent)))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, done.stderr[-4000:]
    return done


# -- recipes ----------------------------------------------------------------------------------------------------------


def test_the_papers_recipes():
    names = {
        f"llava-1.5-{size}-{v}{s}" for size in ("7b", "13b") for v in "LH" for s in ("", "-prumerge", "-prumerge+")
    }
    assert names | {"mipha-3b-L", "mipha-3b-H"} <= set(RECIPES)
    recipe = load_recipe("llava-1.5-13b-H-prumerge+")
    assert (recipe.prefix_layers, recipe.heads_per_switch, recipe.token_selection) == (20, 8, "prumerge+")
    assert (recipe.learning_rate, recipe.weight_decay, recipe.warmup_frac, recipe.epochs) == (1e-5, 0.0, 0.03, 1.0)
    assert (recipe.global_batch, recipe.max_tokens, recipe.bf16, recipe.sharding) == (128, 2048, True, "zero3")
    assert recipe.steps(665_298) == 5198


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_reckoned_through(name):
    recipe = RECIPES[name]
    found = dry_run(recipe, devices=8)
    language = {"llava-1.5-7b": 6738, "llava-1.5-13b": 13016, "mipha-3b": 2780}[recipe.architecture]
    every, trained = found.parameters["language"]
    if recipe.trainable == "lora":
        assert trained == every - 6_738_415_616 == 319_815_680, "rank 128 on 7 matrices of 32 layers"
    else:
        assert round(every / 1e6) == language and trained in (0, every)
    assert found.parameters["vision"][1] == 0
    assert found.steps * recipe.global_batch >= found.samples > (found.steps - 1) * recipe.global_batch
    assert found.device_batch * found.passes * 8 == recipe.global_batch
    assert 0 < found.device_gib < 80


def test_a_dry_run_counts():
    recipe = RECIPES["llava-1.5-7b-L"]
    one, eight = dry_run(replace(recipe, device_batch=16), 1), dry_run(replace(recipe, device_batch=16), 8)
    assert eight.optimizer_gib == pytest.approx(one.optimizer_gib / 8)
    trained = sum(t for _, t in one.parameters.values())
    assert one.optimizer_gib * 2**30 == 12 * trained and one.gradients_gib * 2**30 == 2 * trained
    # Three forwards' worth and one again: 8 FLOPs per weight and token, and somewhat more for the attention.
    per_token = one.step_flops / 128 / one.tokens
    assert 8 * 6.6e9 < per_token < 9.2 * 6.6e9
    spread = dry_run(replace(recipe, sharding="none"), 1)
    assert spread.weights_gib > 2 * one.weights_gib * 0.95, "float32 where nothing keeps a copy"


def test_recipe_files(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"extends": "llava-1.5-7b-H", "heads_per_switch": 4, "about": "four heads"}))
    recipe = load_recipe(str(path), {"learning_rate": 2e-5})
    assert (recipe.heads_per_switch, recipe.about, recipe.learning_rate) == (4, "four heads", 2e-5)
    assert recipe.prefix_layers == 16
    path.write_text(json.dumps(asdict(RECIPES["mipha-3b-L"])))
    assert load_recipe(str(path)) == RECIPES["mipha-3b-L"]
    assert parse_change("learning_rate=2e-5") == ("learning_rate", 2e-5)
    assert parse_change("model=org/name") == ("model", "org/name")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rat": 1}, "no field 'learning_rat'.*Did you mean 'learning_rate'"),
        ({"stage": "first"}, "stage is 'first', expected one of 'projector', 'instruction', 'adaptive'"),
        ({"learning_rate": 0}, "learning_rate is 0, expected a number above 0"),
        ({"stage": "instruction"}, "variant is 'L' in the stage 'instruction'"),
        ({"trainable": "lora"}, "adapters are merged at the end, which zero3 prevents. Set sharding to none"),
        ({"stage": "projector", "variant": None, "trainable": "scheduler"}, "which has none"),
    ],
)
def test_recipes_that_contradict_themselves(change, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe("llava-1.5-7b-L", change)


def test_recipes_that_are_none(tmp_path):
    with pytest.raises(UnknownNameError, match="Did you mean 'llava-1.5-7b-L'"):
        load_recipe("llava-1.5-7b-l")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_recipe(str(tmp_path / "none.json"))
    (tmp_path / "thin.json").write_text('{"about": "x"}')
    with pytest.raises(ConfigError, match='lacks model. Add them, or say "extends"'):
        load_recipe(str(tmp_path / "thin.json"))
    with pytest.raises(ConfigError, match="is no change of a recipe"):
        parse_change("fast")
    with pytest.raises(ConfigError, match="a global batch of 128 cannot be made of 3 devices"):
        RECIPES["llava-1.5-7b-L"].per_pass(3)
    with pytest.raises(ConfigError, match="expected one of llava-1.5-7b"):
        meta_model(replace(RECIPES["llava-1.5-7b-L"], architecture="qwen2-vl-7b"))


# -- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["llava", "mipha", "qwen2-vl", "smolvlm", "paligemma"])
def test_which_parts_are_trained(host):
    vlm = tiny_vlm(host)
    before = counts(vlm)
    assert all(every > 0 for every, _ in before.values())
    wanted = {
        "full": {"projector", "language", "scheduler"},
        "scheduler": {"scheduler"},
        "projector": {"projector"},
        "lora": {"projector", "language", "scheduler"},
    }
    for trainable, parts in wanted.items():
        vlm = tiny_vlm(host)
        choose_trainable(vlm, TrainRecipe("", "", trainable=trainable, lora_rank=2))
        found = counts(vlm)
        assert {part for part, (_, trained) in found.items() if trained} == parts
        assert trainable != "lora" or found["language"][1] == found["language"][0] - before["language"][0]


@pytest.mark.parametrize("variant", ["L", "H"])
def test_adapters_become_part_of_the_weights(variant):
    vlm = tiny_vlm(variant=variant)
    adapters = choose_trainable(vlm, TrainRecipe("", "", trainable="lora", lora_rank=2, lora_alpha=4))
    for name, weight in vlm.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight, std=0.05)
    inputs = {"input_ids": torch.tensor([[2, 9, 8, 7]]), "k": torch.tensor([vlm.adaptive_config.max_k])}
    with torch.no_grad():
        before = vlm.eval()(**inputs).logits
        merge_adapters(adapters)
        after = vlm(**inputs).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert not [name for name, _ in vlm.named_modules() if "lora" in name]
    assert set(vlm.model.state_dict()) == set(tiny_base().state_dict())


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", ["full", "lora", "scheduler"])
@pytest.mark.parametrize("variant", ["L", "H"])
def test_adaptive_runs(folder, tmp_path, variant, trainable):
    heads = {"heads_per_switch": 2} if variant == "H" else {}
    train(folder, tmp_path / "out", variant=variant, trainable=trainable, **heads)
    assert len(losses(tmp_path / "out")) == 6 and list((tmp_path / "out").glob("**/events.out*")), "TensorBoard's log"
    vlm = AdaptiveVLM.from_pretrained(tmp_path / "out")
    assert vlm.status()["variant"] == variant
    base = tiny_base().state_dict()
    changed = {n for n, w in vlm.model.state_dict().items() if not torch.equal(w, base[n])}
    assert not [name for name in changed if "vision_tower" in name]
    assert bool(changed) == (trainable != "scheduler")
    assert any("layers.5" in name for name in changed) == (trainable != "scheduler")
    assert vlm.generate(None, "how many ?", budget="60%", max_new_tokens=2).plan is not None
    stamp = (tmp_path / "out" / runs.HISTORY).stat().st_mtime_ns
    train(folder, tmp_path / "out", variant=variant, trainable=trainable, **heads)
    assert (tmp_path / "out" / runs.HISTORY).stat().st_mtime_ns == stamp, "a finished run is not repeated"


def test_all_three_stages(folder, tmp_path):
    train(folder, tmp_path / "a", stage="projector", trainable="projector", variant=None)
    base = tiny_base().state_dict()
    vlm = AdaptiveVLM.from_pretrained(tmp_path / "a")
    changed = {n for n, w in vlm.model.state_dict().items() if not torch.equal(w, base[n])}
    assert changed and all("multi_modal_projector" in name for name in changed)
    train(folder, tmp_path / "b", stage="instruction", variant=None, model=str(tmp_path / "a"))
    train(folder, tmp_path / "c", stage="adaptive", model=str(tmp_path / "b"))
    assert AdaptiveVLM.from_pretrained(tmp_path / "b").adaptive_config is None
    adaptive = AdaptiveVLM.from_pretrained(tmp_path / "c")
    assert adaptive.adaptive_config is not None
    train(folder, tmp_path / "d", variant=None, model=str(tmp_path / "c"))
    with pytest.raises(ConfigError, match="is adaptive of variant L, the recipe says H"):
        prepare(adaptive, TrainRecipe("", "c", variant="H"))
    with pytest.raises(ConfigError, match="is adaptive; the stage 'instruction' trains a base model"):
        prepare(adaptive, TrainRecipe("", "c", stage="instruction"))
    with pytest.raises(ConfigError, match="Set variant to L or H"):
        prepare(AdaptiveVLM.from_pretrained(tmp_path / "b"), TrainRecipe("", "b"))


def test_missing_images_are_counted(folder, tmp_path, caplog):
    entries = json.loads((folder / "data.json").read_text())
    entries[0]["image"] = "nowhere.png"
    (tmp_path / "data.json").write_text(json.dumps(entries))
    out = tmp_path / "out"
    train_recipe(tiny_recipe(folder), DataPaths(tmp_path / "data.json", folder), out)
    assert "1 of 24 samples are left out" in caplog.text
    (told,) = [json.loads(line) for line in (out / runs.UNUSABLE).read_text().splitlines()]
    assert told["images"] == ["nowhere.png"]
    only = [entry for entry in entries if "image" in entry]
    (tmp_path / "data.json").write_text(json.dumps(only))
    with pytest.raises(DataError, match="it looks for .*none.*png"):
        train_recipe(tiny_recipe(folder), DataPaths(tmp_path / "data.json", tmp_path / "none"), tmp_path / "other")


def test_a_killed_run_goes_on_with_the_same_losses(folder, tmp_path):
    train(folder, tmp_path / "whole")
    done = worker(folder, {tmp_path / "cut": tiny_recipe(folder, workers=1)}, check=False, KILL_AT="5")
    assert done.returncode == -signal.SIGKILL
    checkpoints = tmp_path / "cut" / "checkpoints"
    assert last_checkpoint(checkpoints).name == "checkpoint-4"
    # As if it had been killed while it wrote that one: the one before it is taken.
    (checkpoints / "checkpoint-4" / "trainer_state.json").write_text('{"epoch": 0.6')
    assert last_checkpoint(checkpoints).name == "checkpoint-2"
    train(folder, tmp_path / "cut")
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), abs=1e-6)
    ours, theirs = (AdaptiveVLM.from_pretrained(tmp_path / n).model.state_dict() for n in ("cut", "whole"))
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=1e-6, msg=name)


def test_two_processes_give_the_losses_of_one(folder, tmp_path):
    recipes = {}
    for variant, heads in (("L", None), ("H", 2)):
        train(folder, tmp_path / f"{variant}-one", variant=variant, heads_per_switch=heads)
        halved = tiny_recipe(folder, variant=variant, heads_per_switch=heads, device_batch=2)
        recipes[tmp_path / f"{variant}-two"] = halved
    worker(folder, recipes, processes=2)
    for variant in "LH":
        one, two = tmp_path / f"{variant}-one", tmp_path / f"{variant}-two"
        assert losses(two) == pytest.approx(losses(one), abs=1e-4)
        assert read_rows(two / runs.HISTORY)[0].config["devices"] == 2


@pytest.mark.parametrize("how", ["fsdp", "zero3"])
def test_spread_weights_give_the_same_losses(how):
    if how == "zero3":
        pytest.importorskip("deepspeed", reason="ZeRO-3 needs DeepSpeed: pip install deepspeed")
    done = launch([WORKER.with_name(f"{how}_worker.py")], processes=2, DS_ACCELERATOR="cpu")
    told = [line.split() for line in done.stdout.splitlines() if line.startswith("losses ")]
    for _, variant, *found in told:
        wanted = fsdp_worker.train(tiny_vlm(variant=variant).train(), slice(None))
        assert list(map(float, found)) == pytest.approx([float(loss) for loss in wanted], abs=1e-4)
    assert [variant for _, variant, *_ in told] == ["L", "H"]


# -- the command ------------------------------------------------------------------------------------------------------


def call(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_a_dry_run_on_the_command_line():
    done = call("train", "llava-1.5-7b-L", "--dry-run", "--devices", 4, "--set", "global_batch=64")
    assert done.exit_code == 0, done.stderr
    words = " ".join(done.stdout.split())
    assert "steps 10,396 of 64 samples" in words and "each of 4 devices 8 samples at once, 2 passes in a step" in words
    assert "6,738.4 M, 6,738.4 M of them trained" in words and "vision, parameters 303.5 M, 0.0 M" in words


def test_a_run_on_the_command_line(folder, tmp_path):
    recipe = tmp_path / "tiny.json"
    recipe.write_text(json.dumps({**asdict(tiny_recipe(folder)), "epochs": 0.2}))
    command = ["train", recipe, "--data", folder / "data.json", "--images", folder, "--out", tmp_path / "out"]
    done = call(*command, "--set", "learning_rate=1e-4")
    assert done.exit_code == 0, done.stderr
    assert "loss" in done.stderr and done.stderr.splitlines()[-1] == f"done: {tmp_path / 'out'}"
    assert read_rows(tmp_path / "out" / runs.HISTORY)[1].metrics["learning_rate"] == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["llava-1.5-7b-l", "--out", "x"], "Did you mean 'llava-1.5-7b-L'"),
        (["llava-1.5-7b-L", "--out", "x"], "pass --data llava_v1_5_mix665k.json --images FOLDER; or --dry-run"),
        (["llava-1.5-7b-L"], "where should the model go? Pass --out FOLDER"),
        (["llava-1.5-7b-L", "--dry-run", "--scale", "0.5"], "--scale is for mini recipes. Use --set epochs=0.5"),
        (["llava-1.5-7b-L", "--dry-run", "--devices", "3"], "cannot be made of 3 devices"),
        (["mini-L", "--out", "x", "--dry-run"], "mini-L is a mini recipe, which draws its own data"),
        (["llava-1.5-7b-L", "--dry-run", "--data", "none.json"], "the data file none.json cannot be read"),
    ],
)
def test_bad_commands(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call("train", *arguments)
    assert done.exit_code == 2 and words in " ".join(done.stderr.split())
    assert not (tmp_path / "x").exists()
