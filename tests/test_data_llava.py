"""LLaVA's data: reading it, masking prompts, batching; every host's own template, and what bad data says."""

import json

import pytest
import torch
from PIL import Image

from adallava.data.collate import INDEX, Collator
from adallava.data.conversation import IGNORE_INDEX
from adallava.data.llava_json import missing_images, read_llava_json
from adallava.data.masking import encode_chat, encode_plain
from adallava.errors import DataError
from adallava.mini.build import CHAT_TEMPLATE, build_processor
from adallava.training.blank import blank_sample
from adallava.training.dataset import LlavaDataset
from adallava.training.sampler import LengthGroupedSampler
from tiny import HOSTS, processor

PICTURE = Image.new("RGB", (50, 40), (10, 200, 30))


def entry(question="<image>\nhow many sevens are there ?", answer="two", image="1.png", **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "a", **({"image": image} if image else {}), "conversations": turns, **more}


def write(folder, entries):
    path = folder / "data.json"
    path.write_text(json.dumps(entries))
    return path


def test_conversations_are_read(tmp_path):
    two = entry("<image>\nwhat is red ?", "the star")
    two["conversations"] += [{"from": "human", "value": "and blue ? <image>"}, {"from": "gpt", "value": "nothing"}]
    two["image"] = ["1.png", "sub/2.png"]
    path = write(tmp_path, [entry(), two, entry("what is two ?", "a number", image=None)])
    first, second, third = read_llava_json(path)
    assert first.images == ("1.png",) and third.images == ()
    question, answer = first.messages
    assert question == {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "how many sevens are there ?"}],
    }
    assert answer["content"] == [{"type": "text", "text": "two"}]
    assert [part["type"] for part in second.messages[2]["content"]] == ["image", "text"], "images go first"
    assert first.words == 7
    lines = tmp_path / "data.jsonl"
    lines.write_text(f"{json.dumps(entry())}\n\n{json.dumps(entry())}\n")
    assert read_llava_json(lines) == [first, first]
    (tmp_path / "1.png").touch()
    assert missing_images([first, second, third], tmp_path) == ["sub/2.png"]


BAD = {
    "no list": ({"a": 1}, "expected a list of conversations"),
    "no conversations": ([{"id": 1}], 'entry 0: expected an object with a list "conversations"'),
    "too few images": ([entry(image=None)], "1 times <image> for 0 images"),
    "too many images": ([entry(image=["1.png", "2.png"])], "1 times <image> for 2 images"),
    "image of another type": ([entry(image=7)], '"image" is 7'),
    "roles": (
        [{"conversations": [{"from": "gpt", "value": "two"}]}],
        "the turns are assistant; expected human and gpt",
    ),
    "unknown role": ([{"conversations": [{"from": "bot", "value": "two"}]}], 'turn 0: expected {"from"'),
    "empty answer": ([entry(answer=" ")], "entry 0, turn 1: the answer is empty"),
    "image in an answer": ([entry(answer="<image>")], "only human turns have images"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data(case, tmp_path):
    entries, message = BAD[case]
    with pytest.raises(DataError, match=message.replace("{", "\\{")):
        read_llava_json(write(tmp_path, entries))


def test_files_that_are_no_data(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_llava_json(tmp_path / "none.json")
    broken = tmp_path / "broken.json"
    broken.write_text("[{")
    with pytest.raises(DataError, match="is not .json"):
        read_llava_json(broken)


def messages(*turns):
    made = []
    for question, answer, images in turns:
        parts = [{"type": "image"}] * images + [{"type": "text", "text": question}]
        made.append({"role": "user", "content": parts})
        made.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return made


CHATS = {
    "one turn": ([("how many sevens are there ?", "two", 1)], ["two </s>"]),
    "two turns": ([("how many sevens ?", "two", 1), ("what color is the star ?", "red", 0)], ["two </s>", "red </s>"]),
    "a later image": ([("how many ?", "two", 1), ("what color ?", "red", 1)], ["two </s>", "red </s>"]),
    "no image": ([("how many sevens ?", "two", 0)], ["two </s>"]),
    "two images": ([("how many sevens ?", "two", 2)], ["two </s>"]),
}


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("host", HOSTS)
def test_only_answers_are_learned(host, chat):
    turns, expected = CHATS[chat]
    images = [PICTURE] * sum(count for *_, count in turns)
    if host.startswith("paligemma") and len(images) != 1:
        pytest.skip("PaliGemma answers about one image")
    made = processor(host)
    inputs = encode_chat(made, messages(*turns), images)
    ids, labels = inputs["input_ids"][0], inputs["labels"][0]
    learned = labels != IGNORE_INDEX
    assert torch.equal(ids[learned], labels[learned])
    runs = [run.split() for run in made.tokenizer.decode(ids[learned]).split("</s>")[:-1]]
    assert [" ".join([*run, "</s>"]) for run in runs] == expected
    # The same prompt as at inference, then the answer.
    prompt = made.apply_chat_template(messages(*turns)[:-1], add_generation_prompt=True)
    asked = made(text=[prompt], images=[images] if images else None, add_special_tokens=True, return_tensors="pt")
    start = asked["input_ids"].shape[1]
    assert torch.equal(ids[:start], asked["input_ids"][0])
    assert learned.nonzero().max() == len(ids) - 1 and learned[start:].all()


def test_an_end_mark_is_added_where_the_template_has_none():
    made = build_processor()
    made.chat_template = CHAT_TEMPLATE.replace("'</s>' if message.role == 'assistant' else ' '", "' '")
    inputs = encode_chat(made, messages(("how many ?", "two", 1), ("what color ?", "red", 0)), [PICTURE])
    learned = inputs["labels"][0][inputs["labels"][0] != IGNORE_INDEX]
    assert made.tokenizer.convert_ids_to_tokens(learned) == ["two", "</s>", "red", "</s>"]


def test_templates_that_cannot_be_followed():
    made = build_processor()
    made.chat_template = "{{ messages | length }} {% for m in messages %}{{ m.content[0].text }}{% endfor %}"
    with pytest.raises(DataError, match="renders a conversation and its beginning differently"):
        encode_chat(made, messages(("how many ?", "two", 0)), [])


def test_long_samples_are_cut():
    made = processor()
    turns = messages(("how many ?", "two", 1), ("what color ?", "red", 0))
    whole = encode_chat(made, turns, [PICTURE])
    length = whole["input_ids"].shape[1]
    cut = encode_chat(made, turns, [PICTURE], max_tokens=length - 1)
    assert cut["input_ids"].shape == cut["labels"].shape == (1, length - 1)
    short = encode_chat(made, turns, [PICTURE], max_tokens=length - 2)
    assert (short["labels"] != IGNORE_INDEX).sum() == 2, "the first answer is left, and nothing after it"
    with pytest.raises(DataError, match="no token of an answer is left"):
        encode_chat(made, turns, [PICTURE], max_tokens=68)
    with pytest.raises(DataError, match="its images need 66 tokens and max_tokens is 40"):
        encode_chat(made, turns, [PICTURE], max_tokens=40)


def test_captions_without_a_prompt():
    inputs = encode_plain(processor(), [PICTURE], "a red star")
    tokens = processor().tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    assert tokens[0] == "<s>" and tokens[1:65] == ["<image>"] * 64
    learned = inputs["labels"][0] != IGNORE_INDEX
    assert learned.tolist() == [False] * 65 + [True] * (len(tokens) - 65) and len(tokens) > 67


@pytest.fixture
def dataset(tmp_path):
    PICTURE.save(tmp_path / "1.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "1.png").read_bytes()[:60])
    entries = [entry(), entry("what is two ?", "a", image=None), entry(image="broken.png", id="bad"), entry(id=3)]
    conversations = read_llava_json(write(tmp_path, entries))
    return LlavaDataset(conversations, tmp_path, processor(), unusable=tmp_path / "unusable.jsonl")


def test_unreadable_images_are_told_and_teach_nothing(dataset, tmp_path, caplog):
    samples = [dataset[i] for i in range(4)]
    assert [s[INDEX] for s in samples] == [0, 1, 2, 3]
    assert (torch.as_tensor(samples[2]["labels"]) == IGNORE_INDEX).all() and "pixel_values" not in samples[2]
    assert "sample 2 (bad) is left out" in caplog.text and "broken.png" in caplog.text
    (told,) = [json.loads(line) for line in (tmp_path / "unusable.jsonl").read_text().splitlines()]
    assert (told["index"], told["id"], told["images"]) == (2, "bad", ["broken.png"])
    batch = Collator(processor().tokenizer.pad_token_id)(samples)
    assert batch["pixel_values"].shape == (2, 3, 72, 72)
    assert batch[INDEX].tolist() == [0, 1, 2, 3]
    assert (batch["labels"] != IGNORE_INDEX).any(1).tolist() == [True, True, False, True]


def test_batches_without_images_get_a_blank_one(dataset):
    made = processor()
    collate = Collator(made.tokenizer.pad_token_id, blank=blank_sample(made))
    assert collate([dataset[0], dataset[1]])["pixel_values"].shape[0] == 1
    batch = collate([dataset[1], dataset[1]])
    assert batch["pixel_values"].shape[0] == 1 and batch["input_ids"].shape[0] == 3
    assert (batch["labels"][2] == IGNORE_INDEX).all()


def test_unequal_tiles_are_filled_up():
    samples = [{"input_ids": [1], "pixel_values": torch.ones(1, n, 3)} for n in (2, 4)]
    joined = Collator(0)(samples)["pixel_values"]
    assert joined.shape == (2, 4, 3) and joined.sum(-1).tolist() == [[3, 3, 0, 0], [3, 3, 3, 3]]


def test_samples_are_grouped_by_kind_and_length(dataset):
    assert [length < 0 for length in dataset.lengths] == [False, True, False, False]
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(1, 400, (1000,), generator=generator)
    lengths = torch.where(torch.rand(1000, generator=generator) < 0.2, -words, words).tolist()
    sampler = LengthGroupedSampler(lengths, 16)
    order = list(sampler)
    assert sorted(order) == list(range(1000)) and order == list(sampler)
    batches = [[lengths[i] for i in order[at : at + 16]] for at in range(0, 1000, 16)]
    assert sum(len({length < 0 for length in batch}) == 2 for batch in batches) <= 1
    spread = [max(map(abs, batch)) - min(map(abs, batch)) for batch in batches[:-2]]
    assert sum(spread) / len(spread) < 20, "of 400"
    sampler.set_epoch(1)
    assert sorted(sampler) == list(range(1000)) and list(sampler) != order
