"""A server in this process, on a port of its own, and requests to it."""

import base64
import contextlib
import io
import socket
import threading
import time

import httpx
import uvicorn

from adallava.mini.scenes import sample_scene, to_image
from adallava.serving.app import ServeSettings, create_app
from adallava.serving.engine import Engine

PICTURE = to_image(sample_scene("test", 7, 0))
QUESTION = "How many sevens are there?"


def data_url(image=PICTURE, kind="PNG"):
    out = io.BytesIO()
    image.save(out, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"


def asked(question=QUESTION, url=None):
    parts = [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": url or data_url()}}]
    return [{"role": "user", "content": parts}]


@contextlib.contextmanager
def running(vlm, limits=None, **settings):
    """A server on a port of its own; yields its address."""
    app = create_app(Engine(vlm, limits), ServeSettings("mini-L", **settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        for _ in range(1000):
            if server.started:
                break
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server hangs"


def post(url, **body):
    return httpx.post(f"{url}/v1/chat/completions", json={"model": "mini-L", **body}, timeout=60)
