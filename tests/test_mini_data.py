"""The mini data: reproducible scenes, splits that never meet, questions with one right answer."""

import random
from collections import Counter

import numpy as np
import pytest
import torch

from adallava.data.collate import Collator
from adallava.data.conversation import ConversationEncoder
from adallava.mini import questions as q
from adallava.mini.build import IMAGE_TOKENS
from adallava.mini.dataset import ConversationDataset, DescriptionDataset, SceneData, to_pixels
from adallava.mini.scenes import DIGITS, Scene, SceneObject, digit_samples, render, sample_scene, to_image
from adallava.mini.scoring import mean_and_interval, score
from tiny import processor


def thing(kind, color, row, column):
    return SceneObject(kind, color, row, column, 0, 0, 14, 0 if kind in DIGITS else None)


SCENE = Scene((thing("star", "red", 0, 0), thing("seven", "blue", 0, 1), thing("seven", "red", 1, 1)), 0)


def test_splits_share_no_digit_and_scenes_repeat():
    assert not digit_samples("train") & digit_samples("test")
    assert len(digit_samples("train") | digit_samples("test")) == 1797
    for index in range(20):
        assert sample_scene("train", 0, index) == sample_scene("train", 0, index)
        used = {o.digit_sample for o in sample_scene("test", 0, index).objects if o.is_digit}
        assert used <= digit_samples("test")
    assert np.array_equal(render(sample_scene("test", 3, 4)), render(sample_scene("test", 3, 4)))


def test_no_scene_appears_in_two_splits_or_under_two_seeds():
    seen = Counter()
    for split, seed in (("train", 0), ("train", 1), ("test", 0), ("test", 1)):
        seen.update(tuple((o.name, o.x, o.y, o.size) for o in sample_scene(split, seed, i).objects) for i in range(300))
    assert max(seen.values()) == 1


def test_objects_stay_in_their_cells_and_are_visible():
    for index in range(50):
        scene = sample_scene("train", 0, index)
        picture = render(scene).astype(int)
        assert 2 <= len(scene.objects) <= 6
        assert len({(o.row, o.column) for o in scene.objects}) == len(scene.objects)
        for o in scene.objects:
            assert o.column * 27 <= o.x and o.x + o.size <= o.column * 27 + 18
            assert picture[o.y : o.y + o.size, o.x : o.x + o.size].max() > 120


def test_twins_share_places_and_colours_and_show_every_kind():
    twins = [sample_scene("train", 0, i, 2, twins=15) for i in range(15)]
    assert len({tuple((o.color, o.place) for o in s.objects) for s in twins}) == 1
    at = [{s.objects[n].kind for s in twins} for n in range(len(twins[0].objects))]
    assert max(map(len, at)) == 15


def test_questions_by_hand():
    rng = random.Random(0)
    texts = {f: {(x.text, x.answer) for _ in range(300) if (x := q.FAMILIES[f](SCENE, rng))} for f in q.FAMILIES}
    assert ("how many sevens are there ?", "two") in texts["open"]
    assert ("how many red things are there ?", "two") in texts["open"]
    assert ("what color is the star ?", "red") in texts["open"]
    assert not any("color is the seven" in text for text, _ in texts["open"]), "two sevens: no unique answer"
    assert ("what numbers are there ?", "seven seven") in texts["reading"]
    assert ("what number is blue ?", "seven") in texts["reading"]
    assert ("is there a red seven ?", "yes") in texts["presence"]
    assert ("is there a blue star ?", "no") in texts["presence"]
    assert ("what is the thing right of the star ?", "seven") in texts["relation"]
    assert ("what color is the thing below the thing right of the star ?", "red") in texts["relation"]
    described = "top-left red star , top blue seven , middle red seven"
    assert texts["description"] == {("describe the picture", described)}


def test_answers_follow_from_the_scene():
    """Every generated yes/no and choice is checked against the scene it was made from."""
    for family in ("presence", "choice"):
        answers = Counter()
        for item in q.benchmark(family, 0, 300):
            names = {o.name for o in item.scene.objects}
            text, answer = item.question.text, item.question.answer
            answers[answer] += 1
            if family == "presence":
                assert (text.removeprefix("is there a ").removesuffix(" ?") in names) == (answer == "yes")
            else:
                options = dict(zip("abc", [o.strip() for o in text.replace("(", "|").split("|")[1:]], strict=True))
                shown = [letter for letter, option in options.items() if option[3:] in names]
                assert shown == [answer]
        assert min(answers.values()) > 0.25 * 300


def test_the_tokenizer_knows_every_word_and_the_benchmark_its_seed():
    tokenizer = processor().tokenizer
    for family in q.FAMILIES:
        items = list(q.benchmark(family, 1, 50))
        assert [i.question for i in items] == [i.question for i in q.benchmark(family, 1, 50)]
        assert [i.question for i in items] != [i.question for i in q.benchmark(family, 2, 50)]
        for item in items:
            ids = tokenizer.encode(f"{item.question.text} {item.question.answer}")
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == f"{item.question.text} {item.question.answer}"
    assert tokenizer.encode("How many sevens are there?") == tokenizer.encode("how many sevens are there ?")


def test_pixels_are_those_of_the_image_processor():
    scene = sample_scene("test", 0, 0)
    by_processor = processor().image_processor(to_image(scene), return_tensors="pt")["pixel_values"]
    assert torch.equal(to_pixels(render(scene)), by_processor)


def test_conversations_are_encoded_as_the_chat_template_writes_them():
    turns = [("how many sevens are there ?", "two"), ("what color is the star ?", "red")]
    encoded = ConversationEncoder(processor().tokenizer, IMAGE_TOKENS)(turns)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": turns[0][0]}]},
        {"role": "assistant", "content": turns[0][1]},
        {"role": "user", "content": turns[1][0]},
        {"role": "assistant", "content": turns[1][1]},
    ]
    text = processor().apply_chat_template(messages)
    ids = processor()(text=text, images=to_image(SCENE), return_tensors="pt")["input_ids"][0].tolist()
    assert encoded.input_ids == ids
    learned = [i for i, label in zip(ids, encoded.labels, strict=True) if label != -100]
    assert processor().tokenizer.convert_ids_to_tokens(learned) == ["two", "</s>", "red", "</s>"]


def test_datasets_and_collator():
    tokenizer = processor().tokenizer
    data = SceneData(8, max_objects=(1, 6))
    assert all(len(data.scene(i).objects) == 1 for i in range(4))
    samples = [ConversationDataset(tokenizer, data, 4)[i] for i in range(8)]
    batch = Collator(tokenizer.pad_token_id)(samples)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert batch["pixel_values"].shape == (8, 3, 72, 72)
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert "attention_mask" not in Collator(tokenizer.pad_token_id, mask_padding=False)(samples)
    described = DescriptionDataset(tokenizer, data)[5]
    assert tokenizer.decode(described["input_ids"], skip_special_tokens=True) == data.scene(5).describe()


def test_scores():
    right = q.Question("open", "?", "red star")
    assert score(right, "Red  star.") == 1 and score(right, "red") == 0
    described = q.Question("description", "?", "top red star , left blue six")
    assert score(described, "left blue six , top red star") == 1
    assert score(described, "top red star") == pytest.approx(2 / 3)
    assert score(described, "") == 0
    mean, interval = mean_and_interval([1.0] * 50 + [0.0] * 50)
    assert mean == 0.5 and interval == pytest.approx(1.96 * 0.5025 / 10, rel=1e-3)
    assert mean_and_interval([1.0] * 100)[1] > 0
    with pytest.raises(ValueError, match="no scores"):
        mean_and_interval([])
