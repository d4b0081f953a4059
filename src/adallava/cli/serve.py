"""``adallava serve``: a model behind OpenAI's interface, with a budget for each request."""

from __future__ import annotations

import importlib.util
import os
import signal
from typing import Annotated, Any

import typer
from rich.console import Console

from adallava.errors import ConfigError

KEY = "ADALLAVA_API_KEY"
_NEEDED = ("fastapi", "uvicorn", "prometheus_client", "httpx")


def serve(
    model: Annotated[str, typer.Argument(help="mini-L, mini-H, a checkpoint folder or a hub id; an adaptive one.")],
    host: Annotated[str, typer.Option(help="Address to listen on; only this machine can reach the default.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    objective: Annotated[
        float | None,
        typer.Option(help="Milliseconds within which first tokens are to come; budget 'auto' then follows the load."),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Of requests that name none: '100%', or 'auto' where there is an objective.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Requests that decode together, at most.")] = 8,
    queue: Annotated[int, typer.Option(help="Requests that wait, at most.")] = 64,
    kv_gib: Annotated[float, typer.Option("--kv-gib", help="Memory for keys and values, in GiB.")] = 2.0,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 1024,
    max_prompt_tokens: Annotated[int, typer.Option(help="Longest prompt, in tokens, visual ones included.")] = 8192,
    timeout: Annotated[float, typer.Option(help="Seconds from a request's arrival to the end of its answer.")] = 120.0,
    allow_image_urls: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST", help="A host from which images are fetched; may be given several times."),
    ] = None,
    token_selection: Annotated[str | None, typer.Option(help="none, prumerge or prumerge+.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    ray: Annotated[
        str | None, typer.Option("--ray", help="Replicas under Ray Serve: 2, or 1:4 for as many as the load asks for.")
    ] = None,
) -> None:
    """Serve a model to OpenAI's clients. A key that requests must have is read from $ADALLAVA_API_KEY."""
    _check_installed()
    made: dict[str, Any] = {
        "model": model,
        "objective_ms": objective,
        "budget": budget,
        "limits": {
            "rows": rows,
            "queue": queue,
            "new_tokens": max_tokens,
            "prompt_tokens": max_prompt_tokens,
            "kv_bytes": int(kv_gib * 2**30),
            "timeout_s": timeout,
        },
        "image_hosts": tuple(allow_image_urls or ()),
        "api_key": os.environ.get(KEY) or None,
        "token_selection": token_selection,
        "device": device,
        "threads": threads,
    }
    say = Console(stderr=True, highlight=False, soft_wrap=True).print
    if ray is not None:
        from adallava.serving.replicas import Replicas, run_replicas

        replicas = Replicas.parse(ray)
        say(f"serving {model} from {ray} replicas on http://{host}:{port}; stop with Ctrl-C")
        run_replicas(made, replicas, host, port)
        return
    import uvicorn

    from adallava.serving.launch import application

    app = application(**made)
    say(f"serving {model} on http://{host}:{port}, described at /docs; stop with Ctrl-C")
    # Once it has stopped in good order uvicorn raises the signal again, which would end the process by it.
    signal.signal(signal.SIGTERM, lambda *_: None)
    uvicorn.run(
        app,
        host=host,
        port=port,
        log_level="warning",
        timeout_graceful_shutdown=30,
        limit_concurrency=16 * (rows + queue),
    )


def _check_installed() -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"a server needs {', '.join(missing)}: pip install 'adallava[serve]'")
