"""What comes along with the weights: vocabulary, tokenizer, prompt and images, as the released code has them."""

import pytest
import torch
from PIL import Image

from adallava import AdaptiveVLM
from adallava.errors import CheckpointError, PromptError
from adallava.hosts.convert import convert
from adallava.hosts.convert_read import resized
from adallava.hosts.images import load_image
from released import GOLDEN, byte_tokenizer, copy_golden, edit_config, llama_tokenizer, read, same_weights

VOCABULARY = 512
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)


def test_new_rows_never_win():
    for dtype in (torch.float32, torch.bfloat16):
        rows = torch.randn(50, 8).to(dtype)
        grown = resized(rows, 64)
        assert torch.equal(grown[:50], rows) and grown.dtype == dtype
        scores = torch.randn(100, 8) @ grown.float().T
        assert (scores[:, 50:] < scores[:, :50].max(1, keepdim=True).values).all()
        assert torch.equal(resized(grown, 50), rows)


@pytest.fixture
def with_tokenizer(tmp_path, request):
    source = copy_golden("ada_L", tmp_path)
    llama_tokenizer(source, legacy=getattr(request, "param", False))
    return source


def pieces(tokenizer, text):
    """Token ids as the released code makes them: split at the image, tokenize piece by piece, join."""
    first, *rest = (tokenizer(piece)["input_ids"] for piece in text.split("<image>"))
    bos = tokenizer.bos_token_id
    assert first[0] == bos
    image = tokenizer.convert_tokens_to_ids("<image>")
    return first + [i for piece in rest for i in (image, *(piece[1:] if piece[0] == bos else piece))]


@pytest.mark.parametrize("with_tokenizer", [False, True], indirect=True)
def test_tokenizer_and_prompt_come_along(with_tokenizer, tmp_path):
    convert(str(with_tokenizer), tmp_path / "ours")
    config = read(tmp_path / "ours")
    assert (config["image_token_index"], config["text_config"]["vocab_size"]) == (512, 576)
    assert read(tmp_path / "ours", "generation_config.json")["suppress_tokens"] == list(range(512, 576))
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What?"}]}]
    prompt = f"{SYSTEM} USER: <image>\n<image>\nWhat? ASSISTANT:"
    for folder in (with_tokenizer, tmp_path / "ours"):
        processor = AdaptiveVLM.from_pretrained(folder).processor
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        # A space may be written where the tokenizer would leave it out; the ids are those of the released code.
        assert text.replace("<image> \n", "<image>\n") == prompt
        assert processor.tokenizer(text)["input_ids"] == pieces(processor.tokenizer, prompt)
    turns = [*messages, {"role": "assistant", "content": "A."}, {"role": "user", "content": "And?"}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    assert text.endswith("What? ASSISTANT: A.</s>USER: And? ASSISTANT:")
    text = processor.apply_chat_template([{"role": "system", "content": "Be brief."}, *messages])
    assert text.startswith("Be brief. USER: <image>")


def test_answers_with_a_tokenizer(with_tokenizer, tmp_path):
    convert(str(with_tokenizer), tmp_path / "ours")
    image = Image.new("RGB", (60, 90), "red")
    vlm, direct = (AdaptiveVLM.from_pretrained(folder) for folder in (tmp_path / "ours", with_tokenizer))
    answers = [m.generate([image, image], "Why?", budget="75%", max_new_tokens=6) for m in (vlm, direct)]
    assert answers[0].text == answers[1].text and answers[0].prompt_tokens == answers[1].prompt_tokens
    assert answers[0].plan.k == answers[1].plan.k
    tokens = vlm.model.generate(
        torch.tensor([[1, 5, 6]] * 8), do_sample=True, top_k=0, max_new_tokens=40, temperature=50.0
    )
    assert int(tokens.max()) < VOCABULARY


def test_tokenizer_there_and_back(with_tokenizer, tmp_path):
    convert(str(with_tokenizer), tmp_path / "ours")
    report = convert(str(tmp_path / "ours"), tmp_path / "back", to="official")
    assert "no tokenizer.model: the released code reads its tokenizer from it" in report.notes[0]
    same_weights(with_tokenizer, tmp_path / "back")
    for name in ("config.json", "tokenizer_config.json"):
        assert read(tmp_path / "back", name) == read(with_tokenizer, name)
    back, source = (read(folder, "tokenizer.json") for folder in (tmp_path / "back", with_tokenizer))
    assert back["added_tokens"] == source["added_tokens"] and back["model"]["vocab"] == source["model"]["vocab"]
    (with_tokenizer / "tokenizer.model").write_bytes(b"sentencepiece")
    convert(str(with_tokenizer), tmp_path / "again")
    assert convert(str(tmp_path / "again"), tmp_path / "back2", to="official").notes[0].startswith("the released code")
    assert (tmp_path / "back2" / "tokenizer.model").read_bytes() == b"sentencepiece"


def test_without_tokenizer(tmp_path):
    vlm = AdaptiveVLM.from_pretrained(GOLDEN / "ada_L" / "checkpoint")
    with pytest.raises(PromptError, match="loaded without a processor.*tokenizer.json"):
        vlm.generate(None, "Why?")
    vlm.save_pretrained(tmp_path)
    assert AdaptiveVLM.from_pretrained(tmp_path).processor is None


def test_tokenizers_that_do_not_fit(with_tokenizer, monkeypatch):
    llama_tokenizer(with_tokenizer, size=520)
    with pytest.raises(CheckpointError, match="has 520 tokens, the model 512"):
        AdaptiveVLM.from_pretrained(with_tokenizer)
    (with_tokenizer / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="the tokenizer of .* cannot be read"):
        AdaptiveVLM.from_pretrained(with_tokenizer)
    (with_tokenizer / "tokenizer.json").rename(with_tokenizer / "tokenizer.model")
    monkeypatch.setattr("adallava.hosts.convert_processor._installed", lambda name: name != "sentencepiece")
    with pytest.raises(CheckpointError, match="pip install sentencepiece protobuf"):
        AdaptiveVLM.from_pretrained(with_tokenizer)


@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_images_are_prepared_as_released(aspect, with_tokenizer, tmp_path):
    edit_config(with_tokenizer, image_aspect_ratio=aspect)
    convert(str(with_tokenizer), tmp_path / "ours")
    processor = AdaptiveVLM.from_pretrained(tmp_path / "ours").processor
    image = load_image(Image.effect_noise((112, 56), 90).convert("RGB"))
    pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 56, 56)
    mean, std = (
        torch.tensor(read(GOLDEN / "ada_L" / "clip", "preprocessor_config.json")[k])
        for k in ("image_mean", "image_std")
    )
    expected = image.resize((112, 56))
    if aspect == "pad":
        square = Image.new("RGB", (112, 112), tuple(int(m * 255) for m in mean.tolist()))
        square.paste(image, (0, 28))
        expected = square.resize((56, 56), Image.Resampling.BICUBIC)
    else:
        expected = image.crop((28, 0, 84, 56))
    values = torch.frombuffer(bytearray(expected.tobytes()), dtype=torch.uint8).view(56, 56, 3) / 255
    torch.testing.assert_close(pixels[0], ((values - mean) / std).permute(2, 0, 1), atol=0.02, rtol=0)


def test_a_spare_row_is_taken(tmp_path):
    source = copy_golden("ada_L", tmp_path)
    llama_tokenizer(source, size=500)
    vlm = AdaptiveVLM.from_pretrained(source)
    assert (vlm.config.image_token_id, vlm.config.text_config.vocab_size) == (500, 512)
    assert vlm.model.generation_config.suppress_tokens == [500]
    convert(str(source), tmp_path / "ours")
    convert(str(tmp_path / "ours"), tmp_path / "back", to="official")
    same_weights(source, tmp_path / "back")


@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_mipha(aspect, tmp_path):
    source = copy_golden("mipha", tmp_path)
    byte_tokenizer(source)
    edit_config(source, image_aspect_ratio=aspect)
    convert(str(source), tmp_path / "ours")
    vlm, direct = (AdaptiveVLM.from_pretrained(folder) for folder in (tmp_path / "ours", source))
    assert (vlm.config.image_token_id, vlm.config.text_config.vocab_size) == (257, 512)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    text = vlm.processor.apply_chat_template([*messages, {"role": "assistant", "content": "A."}])
    assert text == f"{SYSTEM} USER: <image>\nWhat? ASSISTANT: A.<|endoftext|>"
    image = Image.effect_noise((60, 90), 90).convert("RGB")
    inputs = vlm.processor(text=text, images=image, return_tensors="pt")
    assert int((inputs["input_ids"] == 257).sum()) == 16
    pixels = inputs["pixel_values"]
    assert pixels.shape == (1, 3, 56, 56) and pixels.min() >= -1 and pixels.max() <= 1
    # Padded, the left edge is the mean colour, 127 of 255; resized without padding, it is the picture's.
    assert (pixels[0, :, :, 0].std() < 1e-6) == (aspect == "pad")
    answers = [model.generate(image, "What?", max_new_tokens=5).text for model in (vlm, direct)]
    assert answers[0] == answers[1]
    convert(str(tmp_path / "ours"), tmp_path / "back", to="mipha")
    same_weights(source, tmp_path / "back")
    assert read(tmp_path / "back") == read(source)


@pytest.mark.parametrize("legacy", [False, True])
def test_sentencepiece(legacy, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    source = copy_golden("ada_L", tmp_path)
    llama_tokenizer(source, legacy)  # for its settings
    (source / "tokenizer.json").unlink()
    (tmp_path / "text").write_text(f"{SYSTEM} USER: What is this? ASSISTANT: A cat.\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(source / "tokenizer"), model_type="bpe", vocab_size=330,
        byte_fallback=True, pad_id=-1, normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    (source / "tokenizer.vocab").unlink()
    convert(str(source), tmp_path / "ours")
    assert (tmp_path / "ours" / "tokenizer.model").is_file()
    prompt = f"{SYSTEM} USER: <image>\nWhat is this? ASSISTANT:"
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    reference = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    before, after = (reference.encode(piece) for piece in prompt.split("<image>"))
    for folder in (source, tmp_path / "ours"):
        processor = AdaptiveVLM.from_pretrained(folder).processor
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        assert processor.tokenizer(text)["input_ids"] == [1, *before, 330, *after]
