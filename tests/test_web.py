"""The demo page: what is behind it, and the page itself in a headless browser, where there is one."""

import shutil
import threading
from itertools import pairwise

import pytest

pytest.importorskip("gradio")
from playwright.sync_api import sync_playwright

from adallava.budget import Budget
from adallava.cost.work import DECODE, PREFILL
from adallava.errors import BudgetError, ConfigError
from adallava.hosts.profiles import profile_path
from adallava.mini.questions import rich_scene
from adallava.mini.scenes import to_image
from adallava.web import page as page_module
from adallava.web import studio as module
from adallava.web.page import build, show
from adallava.web.studio import Studio
from adallava.web.views import facts_html, in_time, overlay, strains_html
from test_hosts_profiles import WIDE, profile_of, stage

SCENE, QUESTIONS = rich_scene(0)
PICTURE, QUESTION = to_image(SCENE), QUESTIONS[0].text
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def studio():
    return Studio(("mini-L", "mini-H"))


@pytest.fixture(autouse=True)
def nothing_measured_yet(studio, tmp_path, monkeypatch):
    monkeypatch.setenv("ADALLAVA_PROFILES", str(tmp_path))
    for vlm in studio.models.values():
        vlm.profiles.use(None)


@pytest.fixture
def quick(monkeypatch):
    """A device of which everything is known at once."""

    def known(vlm, name, settings, progress):
        progress(1.0)
        # As the mini models on a laptop: no forecast is right to the millisecond here, and none needs to be.
        made = profile_of(vlm, prefill=stage(PREFILL, 20.0, 2.0, WIDE), decode=stage(DECODE, 5.0, 0.5, WIDE))
        made.save(profile_path(made.fingerprint))
        return made

    monkeypatch.setattr(module, "calibrate", known)


def test_base_models_have_no_page():
    with pytest.raises(ConfigError, match="mini-base is a base model"):
        Studio(("mini-base",))


def test_what_a_budget_buys_is_foreseen(studio):
    whole, half = (studio.foresee("mini-L", PICTURE, QUESTION, budget) for budget in ("100%", "50%"))
    assert (whole.budget.k, half.budget.k) == (6, 0) and half.cost.frac < whole.cost.frac
    assert whole.attention.shape == (8, 8) and 0 < whole.attention.sum() <= 1
    assert overlay(PICTURE, whole.attention).size == (288, 288)
    with pytest.raises(BudgetError, match="minimum"):
        studio.foresee("mini-L", PICTURE, QUESTION, "10%")


def test_answers_grow_and_are_those_of_generate(studio):
    told = list(studio.answer("mini-H", PICTURE, "describe the picture .", "85%"))
    alone = studio.models["mini-H"].generate(PICTURE, "describe the picture .", budget="85%", max_new_tokens=64)
    assert len(told) > 3 and told[-1].text == alone.text
    texts = [one.text for one in told]
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    ours, theirs = studio.compare("mini-H", PICTURE, QUESTION, 3)
    assert ours.repetitions == theirs.repetitions >= 1 and 0 < ours.before_ms < ours.first_ms <= ours.whole_ms
    assert "medians of" in facts_html(told[-1].begun.cost, ours, theirs)


def test_times_need_a_measured_machine(studio, quick):
    assert studio.times("mini-L", PICTURE, QUESTION) is None and not studio.calibrated("mini-L")
    studio.calibrate("mini-L")
    least, most = studio.times("mini-L", PICTURE, QUESTION)
    assert 0 < least < most
    assert studio.foresee("mini-L", PICTURE, QUESTION, f"{10 * most:.1f} ms").budget.k == 6


def test_a_run_under_load_tells_of_itself(studio, quick):
    *_, last = studio.strain("mini-L", 2.0, 0.5, "governor", None)
    assert last.asked and all(one.begun or one.refused for one in last.asked)
    *_, fixed = studio.strain("mini-L", 2.0, 0.5, "fixed", Budget.parse("100%"))
    drawn = strains_html([last, fixed])
    assert drawn.count("<svg") == 2 and drawn.count("<circle") + drawn.count('stroke="#c2410c"') == 2 * len(last.asked)
    assert f"of {len(last.asked)} in time" in in_time(last)


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_the_page_in_a_browser(studio, quick, monkeypatch):
    monkeypatch.setattr(page_module, "_SECONDS", 1.0)
    page, address, ready = build(studio), [], threading.Event()
    thread = threading.Thread(target=show, args=(page, None, lambda at: (address.append(at), ready.set())), daemon=True)
    thread.start()
    assert ready.wait(60)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(viewport={"width": 1280, "height": 1300})
        asked, wrong = [], []
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        tab.set_default_timeout(60_000)
        tab.goto(address[0])
        tab.wait_for_selector("#plan svg")
        tab.wait_for_selector("#attention img")

        assert "9/12" in tab.inner_text("#plan")
        tab.fill("#share input[type=number]", "50")
        tab.keyboard.press("Tab")
        tab.wait_for_function("document.querySelector('#plan').innerText.includes('6/12')")
        tab.wait_for_function("document.querySelector('#facts').innerText.includes('50.0%')")

        tab.click("#ask")
        tab.wait_for_function("document.querySelector('#facts').innerText.includes('medians')")
        expected = studio.models["mini-L"].generate(PICTURE, QUESTION, budget="50%", max_new_tokens=64).text
        assert tab.inner_text("#said .said").strip() == expected

        tab.click("text=ms to the first token")
        tab.wait_for_selector("#measure", state="visible")
        tab.wait_for_function("document.querySelector('#said').innerText.includes('once this machine is measured')")
        tab.click("#measure")
        tab.wait_for_selector("#time", state="visible")

        tab.click("#push")
        tab.wait_for_function("document.querySelectorAll('#strain svg').length == 2")
        tab.wait_for_selector("#strain circle")
        assert "all of the model" in tab.inner_text("#strain")

        tab.click("text=Another scene")
        tab.wait_for_selector("#plan svg")
        assert not wrong
        assert all(url.startswith((address[0], "data:", "blob:")) for url in asked), "nothing is fetched from outside"
        browser.close()
    page.close()
    with studio._alone():  # what was under way has ended
        pass
