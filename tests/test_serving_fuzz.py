"""Requests at random, and pictures that are none: no server error, no hang, no memory kept, errors in one shape."""

import base64
import io
import json
import time

import httpx
import psutil
import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from adallava.hosts.model import AdaptiveVLM
from adallava.serving.jobs import Limits
from served import PICTURE, asked, data_url, post, running

CHECKS = (not_a_server_error, response_schema_conformance, status_code_conformance, content_type_conformance)
KNOWN = {200, 400, 404, 413, 422, 429}
LONGEST_S = 10.0
IS_JSON = {"Content-Type": "application/json"}
calmly = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def url():
    vlm = AdaptiveVLM.from_pretrained("mini-L", dtype=torch.float32)
    with running(vlm, Limits(prompt_tokens=300, new_tokens=8), max_body_bytes=2**20) as address:
        yield address


ROUTES = [
    ("GET", "/healthz"),
    ("GET", "/metrics"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("POST", "/v1/chat/completions"),
]


@pytest.fixture(scope="module")
def described(url):
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


def test_all_routes_are_described(described):
    assert {(method.upper(), path) for path in described for method in described[path]} == set(ROUTES)


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_does_what_it_says(described, method, path):
    @settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=described[path][method].as_strategy())
    def ask(case):
        case.call_and_validate(checks=list(CHECKS), timeout=LONGEST_S)

    ask()


def check(told, began):
    assert told.status_code in KNOWN, told.text
    assert time.perf_counter() - began < LONGEST_S
    body = told.json()
    if told.status_code == 200:
        assert body["adallava"]["plan"] and isinstance(body["choices"][0]["message"]["content"], str)
    else:
        assert set(body) == {"error"} and body["error"]["message"] and body["error"]["type"]


# -- bodies that are nearly right -------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
BUDGETS = (
    st.floats()
    | st.text(max_size=12)
    | st.sampled_from(
        ["60%", "0%", "101%", "1e3%", "1 ms", "80 ms", "5 ms/token", "1 TFLOPs", "1e-9 GFLOPs", "auto", "६०%", ""]
    )
)
FIELDS = {
    "budget": BUDGETS,
    "deadline_ms": st.floats() | st.integers(),
    "max_tokens": st.integers(-2, 12) | st.integers(),
    "temperature": st.floats(-1, 3),
    "top_p": st.floats(-0.5, 1.5),
    "stop": st.text(max_size=4) | st.lists(st.text(max_size=4), max_size=6),
    "seed": st.integers(),
    "n": st.integers(-1, 3),
    "messages": JSON,
    "stream_options": JSON,
    "response_format": JSON,
}


@calmly
@given(changed=st.fixed_dictionaries({}, optional=FIELDS), question=st.text(max_size=60))
def test_bodies_that_are_nearly_right(url, changed, question):
    body = json.dumps(
        {"model": "mini-L", "messages": asked(question)} | changed
    )  # with NaN and Infinity, as Python does
    began = time.perf_counter()
    check(httpx.post(f"{url}/v1/chat/completions", content=body, headers=IS_JSON, timeout=60), began)


@calmly
@given(body=st.binary(max_size=300) | JSON.map(lambda value: repr(value).encode()))
def test_bodies_that_are_no_json(url, body):
    began = time.perf_counter()
    told = httpx.post(f"{url}/v1/chat/completions", content=body, headers=IS_JSON)
    assert told.status_code == 400
    check(told, began)


# -- pictures ---------------------------------------------------------------------------------------------------------


def encoded(kind, image=PICTURE, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


WHOLE = {kind: encoded(kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "ICO", "PPM", "TGA", "PCX")}


def sent(data):
    return asked("What is there?", f"data:image/png;base64,{base64.b64encode(data).decode()}")


@calmly
@given(
    kind=st.sampled_from(sorted(WHOLE)),
    cut=st.floats(0, 1),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
    more=st.binary(max_size=20),
)
def test_pictures_that_are_broken(url, kind, cut, changes, more):
    data = bytearray(WHOLE[kind])
    for place, value in changes:
        data[int(place * len(data))] = value
    began = time.perf_counter()
    check(post(url, messages=sent(bytes(data[: int(cut * len(data))]) + more), max_tokens=1), began)


def test_pictures_that_are_strange(url):
    noise = Image.effect_noise((64, 64), 80)
    strange = {
        "a bomb": encoded("PNG", Image.new("1", (30_000, 30_000))),
        "one pixel": encoded("PNG", Image.new("RGB", (1, 1))),
        "a line": encoded("PNG", Image.new("RGB", (4000, 1))),
        "16 bit": encoded("PNG", noise.convert("I;16")),
        "CMYK": encoded("JPEG", noise.convert("CMYK")),
        "a palette": encoded("GIF", noise.convert("P")),
        "see-through": encoded("PNG", noise.convert("LA")),
        "many frames": encoded("GIF", noise, save_all=True, append_images=[noise] * 200),
        "a drawing": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "nothing": b"",
    }
    for name, data in strange.items():
        began = time.perf_counter()
        told = post(url, messages=sent(data), max_tokens=1)
        check(told, began)
        wrong = name in ("a bomb", "a drawing", "nothing")
        assert told.status_code == (400 if wrong else 200), (name, told.text)


@calmly
@given(text=st.text(max_size=80))
def test_addresses_of_pictures_are_never_followed(url, text):
    began = time.perf_counter()
    told = post(url, messages=asked("What is there?", text or "/"), max_tokens=1)
    assert told.status_code == 400
    check(told, began)


def test_memory_does_not_grow(url):
    """Broken pictures and refused bodies by the dozen leave nothing behind."""

    def many():
        for number in range(60):
            post(url, messages=sent(WHOLE["PNG"][: 25 * number]), max_tokens=1)
            post(url, messages=asked(url=data_url()), budget="10%")
        post(url, messages=asked(), max_tokens=4)

    many()
    before = psutil.Process().memory_info().rss
    many()
    assert psutil.Process().memory_info().rss - before < 30 * 2**20
