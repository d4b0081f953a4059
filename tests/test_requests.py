"""What users pass in: images, questions, budgets, and what they are told when it cannot work."""

import io

import numpy as np
import pytest
from PIL import Image

from adallava.errors import BudgetError, ImageError, PlanError, PromptError
from adallava.hosts import images
from adallava.hosts.images import load_image
from adallava.hosts.prompts import Request, encode, to_prompt
from adallava.mini.scenes import sample_scene, to_image
from adallava.plan import ExecutionPlan
from tiny import processor, tiny_vlm

PICTURE = to_image(sample_scene("test", 0, 0))


@pytest.fixture(scope="module")
def vlm():
    return tiny_vlm()


def png(image=PICTURE):
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def test_images_from_everywhere_are_the_same(tmp_path):
    path = tmp_path / "scene.png"
    path.write_bytes(png())
    for source in (PICTURE, path, str(path), png(), np.asarray(PICTURE)):
        assert np.array_equal(np.asarray(load_image(source)), np.asarray(PICTURE))


def test_odd_modes_become_rgb():
    for mode in ("L", "RGBA", "P", "1", "CMYK"):
        assert load_image(PICTURE.convert(mode)).mode == "RGB"
    assert load_image(np.zeros((5, 4), np.uint8)).size == (4, 5)


def test_orientation_is_followed(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (4, 8)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"not an image", "the 12 bytes cannot be read as an image"),
        (png()[:300], "damaged or truncated|cannot be read"),
        ("nowhere.png", "no image file 'nowhere.png'"),
        ("https://example.com/x.png", "images are not fetched"),
        (np.zeros((0, 4, 3), np.uint8), "at least one pixel"),
        (np.zeros((4, 4, 3)), "float64 .*expected uint8"),
        (np.zeros((4, 4, 7), np.uint8), r"\[4, 4, 7\].*expected uint8"),
        (12, "type int was passed"),
    ],
)
def test_bad_images(vlm, source, message):
    with pytest.raises(ImageError, match=message):
        vlm.generate(source, "what is at the top ?")


def test_zero_size_pil_image(vlm):
    with pytest.raises(ImageError, match="0 x 3"):
        vlm.generate(Image.new("RGB", (0, 3)), "what is at the top ?")


def test_decompression_bombs_are_refused_before_decoding(vlm, monkeypatch):
    bomb = png(Image.new("1", (12_000, 12_000)))
    assert len(bomb) < 200_000
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="12000 x 12000 pixels, more than the 50,000,000"):
        vlm.generate(bomb, "what is at the top ?")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match="far more than the 50,000,000 pixels allowed"):
        vlm.generate(bomb, "what is at the top ?")
    assert images.MAX_PIXELS == 50_000_000


@pytest.mark.parametrize("question", ["", "   ", "\n"])
def test_empty_questions(vlm, question):
    with pytest.raises(PromptError, match="no text. Ask a question"):
        vlm.generate(PICTURE, question)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "last message must be the user's"),
        ([{"role": "assistant", "content": "x"}], "last message must be the user's"),
        ([{"role": "robot", "content": "x"}], "role 'robot'"),
        ([{"role": "user", "text": "x"}], "expected .*role"),
        ([{"role": "user", "content": [{"type": "video"}]}], "expected a text or an image place"),
        ([{"role": "user", "content": 5}], "expected text or a list"),
        (
            [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "x"}]}],
            "2 image places, but 1",
        ),
        ([{"role": "user", "content": "where is <image> ?"}], "contains '<image>'"),
    ],
)
def test_bad_messages(vlm, messages, message):
    with pytest.raises(PromptError, match=message):
        vlm.generate(PICTURE, messages=messages)


def test_question_and_messages_exclude_each_other(vlm):
    for given in ({}, {"question": "x", "messages": [{"role": "user", "content": "x"}]}):
        with pytest.raises(PromptError, match="either a question or messages"):
            vlm.generate(PICTURE, **given)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("30%", "minimum of this model, 50%"),
        (float("nan"), "not a finite number"),
        (1.5, "more than the whole model"),
        ("0 ms", "not above 0"),
        ("much", "not a budget"),
        (None, "type NoneType"),
    ],
)
def test_bad_budgets(vlm, budget, message):
    with pytest.raises(BudgetError, match=message):
        vlm.generate(PICTURE, "what ?", budget=budget)


def test_bad_plans(vlm):
    plan = ExecutionPlan.full(vlm.adaptive_config, 2)
    with pytest.raises(PromptError, match="2 rows for 1 requests"):
        vlm.generate(PICTURE, "what ?", plan=plan)
    with pytest.raises(PlanError, match="runs 3 switches, its budget allows 1"):
        vlm.generate(PICTURE, "what ?", budget="70%", plan=ExecutionPlan.full(vlm.adaptive_config))
    with pytest.raises(PlanError, match="the plan is for"):
        vlm.generate(PICTURE, "what ?", plan=ExecutionPlan.full(tiny_vlm(layers=4).adaptive_config))


def test_a_processor_without_a_template(vlm, monkeypatch):
    monkeypatch.setattr(vlm.processor, "chat_template", None)
    with pytest.raises(PromptError, match="no chat template"):
        vlm.generate(PICTURE, "what ?")


def test_a_failed_request_leaves_the_model_usable(vlm):
    before = vlm.generate(PICTURE, "how many ?", budget="70%", max_new_tokens=3)
    with pytest.raises(ImageError):
        vlm.generate(b"", "how many ?")
    assert vlm.generate(PICTURE, "how many ?", budget="70%", max_new_tokens=3).text == before.text


def test_paligemma_needs_an_image():
    with pytest.raises(PromptError, match="request 1 has no image, and PaliGemma answers about images only"):
        encode(processor("paligemma"), [to_prompt(Request("what ?", PICTURE)), to_prompt(Request("what ?"))])


@pytest.mark.parametrize(("host", "mark"), [("qwen2-vl", "<video>"), ("gemma3", "<boi>"), ("gemma3", "<image>")])
def test_marks_of_other_hosts(host, mark):
    with pytest.raises(PromptError, match=f"contains '{mark}', which marks an image"):
        encode(processor(host), [to_prompt(Request(f"what is {mark} ?"))])


def test_what_the_processor_refuses(vlm, monkeypatch):
    monkeypatch.setattr(vlm.processor, "chat_template", "no place for images")
    with pytest.raises(PromptError, match="LlavaProcessor cannot make model inputs of the prompts: .*number of images"):
        vlm.generate(PICTURE, "what ?")


def test_images_stay_with_their_prompts():
    prompts = [to_prompt(Request("what ?", images)) for images in (PICTURE, [PICTURE, PICTURE], None)]
    inputs = encode(processor("onevision"), prompts)
    assert inputs["batch_num_images"].tolist() == [1, 2]
    tokens = (inputs["input_ids"] == 4).sum(-1).tolist()
    assert tokens == [16 + 64 + 8, 2 * 17, 0], "one image is cut into tiles, several are not"
