"""The server's interface, over real connections: OpenAI's client, streams, errors in its shape, limits, no files."""

import io
import json
import threading
import time

import httpx
import openai
import pytest
import torch
from PIL import Image

from adallava.errors import ImageError
from adallava.hosts.model import AdaptiveVLM
from adallava.mini.scenes import sample_scene, to_image
from adallava.serving import images
from adallava.serving.images import ImagePolicy, read_image
from adallava.serving.jobs import Limits
from adallava.serving.protocol import ChatRequest
from served import PICTURE, QUESTION, asked, data_url, post, running


@pytest.fixture(scope="module")
def vlm():
    return AdaptiveVLM.from_pretrained("mini-L", dtype=torch.float32)


@pytest.fixture(scope="module")
def url(vlm):
    with running(vlm, Limits(prompt_tokens=200, new_tokens=64)) as address:
        yield address


# -- OpenAI's client --------------------------------------------------------------------------------------------------


def test_the_official_client_is_answered(url, vlm):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="any")
    for budget in ("100%", "60%"):
        answer = client.chat.completions.create(
            model="mini-L", messages=asked(), max_tokens=16, extra_body={"budget": budget}
        )
        alone = vlm.generate(PICTURE, QUESTION, budget=budget, max_new_tokens=16)
        assert answer.choices[0].message.content == alone.text
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.prompt_tokens == alone.prompt_tokens
        told = answer.model_extra["adallava"]
        assert told["plan"] == alone.plan.to_dict()["rows"][0]
        assert told["flops"] == alone.cost.prefill_flops and told["flops_frac"] == pytest.approx(alone.cost.frac)
        assert 0 < told["first_token_ms"] <= told["total_ms"] and told["budget"] == budget
    (model,) = client.models.list().data
    assert model.id == "mini-L" and client.models.retrieve("mini-L").id == "mini-L"


def test_the_official_client_is_streamed_to(url, vlm):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="any")
    question = "Describe the picture."
    stream = client.chat.completions.create(
        model="mini-L",
        messages=asked(question),
        max_tokens=32,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"budget": "85%"},
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    alone = vlm.generate(PICTURE, question, budget="85%", max_new_tokens=32)
    assert "".join(pieces) == alone.text and len(pieces) > 1
    assert chunks[-1].usage.completion_tokens > len(pieces) - 2
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] in ("stop", "length") and not any(reasons[:-1])
    assert chunks[0].model_extra["adallava"]["plan"] == alone.plan.to_dict()["rows"][0]


def test_the_official_client_reads_the_errors(url):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
        client.chat.completions.create(model="gpt", messages=asked())
    with pytest.raises(openai.UnprocessableEntityError, match="minimum"):
        client.chat.completions.create(model="mini-L", messages=asked(), extra_body={"budget": "10%"})
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="mini-L", messages=asked(), temperature=3)


# -- requests ---------------------------------------------------------------------------------------------------------


def test_a_conversation_with_two_pictures_and_sampling(url):
    other = data_url(to_image(sample_scene("test", 7, 1)), "JPEG")
    turns = [*asked(), {"role": "assistant", "content": "two"}, *asked("And here?", other)]
    told = post(url, messages=turns, temperature=1.0, top_p=0.9, seed=4, max_completion_tokens=5, stop=["."])
    assert told.status_code == 200, told.text
    again = post(url, messages=turns, temperature=1.0, top_p=0.9, seed=4, max_completion_tokens=5, stop=["."])
    assert told.json()["choices"] == again.json()["choices"]
    assert told.json()["usage"]["completion_tokens"] <= 5


def test_many_at_once(url, vlm):
    budgets = ("100%", "85%", "60%", 0.5) * 4
    answers, threads = {}, []
    for number, budget in enumerate(budgets):

        def ask(number=number, budget=budget):
            answers[number] = post(url, messages=asked(), budget=budget).json()

        threads.append(threading.Thread(target=ask))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    alone = {budget: vlm.generate(PICTURE, QUESTION, budget=budget).text for budget in set(budgets)}
    for number, budget in enumerate(budgets):
        assert answers[number]["choices"][0]["message"]["content"] == alone[budget]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user", "content": ""}]}, 400, "no text"),
        ({"messages": [{"role": "pirate", "content": "hi"}]}, 400, "role"),
        ({"messages": asked(), "max_tokens": 0}, 400, "max_tokens"),
        ({"messages": asked(), "max_tokens": 65}, 400, "this server allows 64"),
        ({"messages": [{"role": "user", "content": "star " * 300}]}, 400, "this server allows 200"),
        ({"messages": asked(), "n": 2}, 400, "n = 2"),
        ({"messages": asked(), "budget": "lots"}, 400, "lots"),
        ({"messages": asked(), "budget": "80 ms"}, 400, "calibrate"),
        ({"messages": asked(), "budget": "auto"}, 400, "no objective"),
        ({"messages": asked(), "budget": "60%", "deadline_ms": 100}, 400, "Give one"),
        ({"messages": asked(), "budget": "49%"}, 422, "minimum"),
        ({"messages": asked(url="/etc/passwd")}, 400, "expected a data URL"),
        ({"messages": asked(url="file:///etc/passwd")}, 400, "expected a data URL"),
        ({"messages": asked(url="http://localhost:99999/picture.png")}, 400, "expected a data URL"),
        ({"messages": asked(url="http://localhost/picture.png")}, 400, "not fetched from 'localhost'"),
        ({"messages": asked(url="data:text/html;base64,AAAA")}, 400, "expected data:image"),
        ({"messages": asked(url="data:image/png;base64,@@@@")}, 400, "not base64"),
        ({"messages": asked(url="data:image/png;base64,AAAA")}, 400, "cannot be read as an image"),
        ({"messages": asked(url=data_url()[:2000])}, 400, ""),
        ({"messages": asked("<image> what is it ?")}, 400, "marks an image"),
        ({"messages": asked() * 17}, 400, "17 images, more than the 16 allowed"),
        ({"messages": [{"role": "user", "content": "a" * 150_000}] * 3}, 400, "450,000 characters"),
        ({"messages": asked(), "tool_choice": "required"}, 400, "tool_choice"),
        ({"messages": asked(url=data_url(kind="TIFF"))}, 400, "cannot be read as an image"),
    ],
)
def test_what_is_wrong_is_said(url, body, status, message, tmp_path, monkeypatch):
    monkeypatch.setenv("ADALLAVA_PROFILES", str(tmp_path))
    told = post(url, **body)
    assert told.status_code == status, told.text
    error = told.json()["error"]
    assert message in error["message"] and error["type"] == "invalid_request_error"


def test_routes_for_machines(url):
    health = httpx.get(f"{url}/healthz").json()
    assert health == {"status": "ok", "waiting": 0, "decoding": 0}
    post(url, messages=asked())
    told = httpx.get(f"{url}/metrics").text
    assert 'adallava_requests_total{outcome="answered"}' in told and "adallava_first_token_seconds_bucket" in told
    assert httpx.get(f"{url}/docs").status_code == 200
    described = httpx.get(f"{url}/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/models", "/healthz", "/metrics"} <= set(described["paths"])
    missing = httpx.get(f"{url}/nothing")
    assert missing.status_code == 404 and missing.json()["error"]["message"] == "Not Found"


def test_a_key_is_asked_for(vlm):
    with running(vlm, api_key="secret") as url:
        assert post(url, messages=asked()).status_code == 401
        assert httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401
        right = httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer secret"})
        assert right.status_code == 200 and httpx.get(f"{url}/healthz").status_code == 200


def test_a_key_is_asked_for_before_a_body_is_read(vlm):
    with running(vlm, api_key="secret", max_body_bytes=5000) as url:
        assert httpx.post(f"{url}/v1/chat/completions", content=b"a" * 6000).status_code == 401
        lower = httpx.get(f"{url}/v1/models", headers={"Authorization": "bearer secret"})
        assert lower.status_code == 200


def test_bodies_are_limited(vlm):
    with running(vlm, max_body_bytes=5000) as url:
        body = json.dumps({"model": "mini-L", "messages": [{"role": "user", "content": "a" * 6000}]}).encode()
        assert httpx.post(f"{url}/v1/chat/completions", content=body).status_code == 413

        def pieces():
            yield from (body[at : at + 1000] for at in range(0, len(body), 1000))

        told = httpx.post(f"{url}/v1/chat/completions", content=pieces(), headers={"Content-Type": "application/json"})
        assert told.status_code == 413 and "5,000 bytes" in told.json()["error"]["message"]
        assert post(url, messages=[{"role": "user", "content": "what is there ?"}]).status_code == 200


def test_a_client_that_goes_away_frees_its_place(vlm):
    with running(vlm, Limits(rows=1)) as url:
        body = {
            "model": "mini-L",
            "messages": asked(),
            "stream": True,
            "max_tokens": 1000,
            "temperature": 2.0,
            "seed": 1,
        }
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as answer:
            next(answer.iter_lines())
        for _ in range(200):
            if httpx.get(f"{url}/healthz").json()["decoding"] == 0:
                break
            time.sleep(0.05)
        assert httpx.get(f"{url}/healthz").json()["decoding"] == 0
        assert post(url, messages=asked()).status_code == 200


def test_too_much_is_refused_and_says_when_to_come_again(vlm):
    with running(vlm, Limits(rows=1, queue=1)) as url:
        answers = []
        body = {"messages": asked(), "max_tokens": 200, "temperature": 2.0, "seed": 3}
        threads = [threading.Thread(target=lambda: answers.append(post(url, **body))) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert {answer.status_code for answer in answers} == {200, 429}
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert int(refused.headers["Retry-After"]) >= 1 and refused.json()["error"]["code"] == "overloaded"


def test_stopping_finishes_what_is_going_on(vlm):
    answers = []
    with running(vlm) as url:
        body = {"messages": asked("Describe the picture."), "max_tokens": 64}
        threads = [threading.Thread(target=lambda: answers.append(post(url, **body).status_code)) for _ in range(4)]
        for thread in threads:
            thread.start()
        while not any(httpx.get(f"{url}/healthz").json()[state] for state in ("waiting", "decoding")):
            time.sleep(0.01)
    for thread in threads:
        thread.join(30)
    assert len(answers) == 4 and set(answers) <= {200, 503}


# -- images -----------------------------------------------------------------------------------------------------------


def test_pictures_are_limited_together():
    large = data_url(Image.new("1", (3000, 3000)))
    one, words = {"type": "image_url", "image_url": {"url": large}}, {"type": "text", "text": "which is larger ?"}
    two, three = (
        ChatRequest(model="mini-L", messages=[{"role": "user", "content": [words, *[one] * n]}]) for n in (2, 3)
    )
    assert len(two.prompt(ImagePolicy()).images) == 2
    with pytest.raises(ImageError, match="more than the"):
        three.prompt(ImagePolicy())


def test_pictures_are_limited():
    assert read_image(data_url(), ImagePolicy()).size == PICTURE.size
    with pytest.raises(ImageError, match="more than the 1,000 allowed"):
        read_image(data_url(), ImagePolicy(max_pixels=1000))
    with pytest.raises(ImageError, match="more than the 100 bytes"):
        read_image(data_url(), ImagePolicy(max_bytes=100))


PUBLIC = "93.184.215.14"


@pytest.fixture
def web(monkeypatch):
    """A web of one public host and one private one, and what was asked of them."""
    out = io.BytesIO()
    PICTURE.save(out, "PNG")
    requests = []

    def answer(request):
        requests.append((str(request.url), request.headers["host"], request.extensions.get("sni_hostname")))
        match request.url.path:
            case "/picture.png":
                return httpx.Response(200, content=out.getvalue())
            case "/there":
                return httpx.Response(302, headers={"location": "/picture.png"})
            case "/away":
                return httpx.Response(302, headers={"location": "https://evil.example/picture.png"})
            case "/inside":
                return httpx.Response(302, headers={"location": "https://inside.example/picture.png"})
            case "/broken":
                return httpx.Response(302, headers={"location": "http://["})
            case "/round":
                return httpx.Response(302, headers={"location": "/round"})
            case "/large":
                return httpx.Response(200, content=b"0" * 60_000)
        return httpx.Response(404)

    def look_up(host, port, **_):
        if host == "nowhere.example":
            raise OSError("no such host")
        return [(None, None, None, "", ("10.0.0.7" if host == "inside.example" else PUBLIC, port))]

    real = httpx.Client
    monkeypatch.setattr(
        images.httpx, "Client", lambda **options: real(**options, transport=httpx.MockTransport(answer))
    )
    monkeypatch.setattr(images.socket, "getaddrinfo", look_up)
    return requests


def test_pictures_of_allowed_hosts_are_fetched(web):
    policy = ImagePolicy(hosts=("Pictures.example", "inside.example", "nowhere.example"), max_bytes=50_000)
    assert read_image("https://pictures.example/picture.png", policy).size == PICTURE.size
    assert read_image("https://pictures.example/there", policy).size == PICTURE.size
    assert {host for _, host, _ in web} == {"pictures.example"} == {name for *_, name in web}
    assert all(url.startswith(f"https://{PUBLIC}/") for url, *_ in web), "the address that was checked is asked"
    for path, wrong in {
        "/away": "not fetched from 'evil.example'",
        "/inside": "10.0.0.7, which is not public",
        "/round": "redirected more than 3 times",
        "/large": "more than the 50,000 bytes",
        "/missing": "answered 404",
        "/broken": "no web address",
    }.items():
        with pytest.raises(ImageError, match=wrong):
            read_image(f"https://pictures.example{path}", policy)
    with pytest.raises(ImageError, match="no host"):
        read_image("https://nowhere.example/picture.png", policy)
    before = len(web)
    for url in (
        "https://other.example/picture.png",
        "https://pictures.example@evil.example/",
        "ftp://pictures.example/",
    ):
        with pytest.raises(ImageError):
            read_image(url, policy)
    assert len(web) == before, "nothing was asked of anybody else"
