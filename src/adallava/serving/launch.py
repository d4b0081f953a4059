"""From settings as plain data to a running application; for the command, and for replicas in other processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from fastapi import FastAPI

from adallava.hosts.memory import keep_memory
from adallava.hosts.model import AdaptiveVLM
from adallava.hosts.threads import apart
from adallava.serving.app import ServeSettings, create_app
from adallava.serving.engine import Engine
from adallava.serving.images import ImagePolicy
from adallava.serving.jobs import Limits
from adallava.serving.protocol import AUTO


def application(
    model: str,
    *,
    objective_ms: float | None = None,
    budget: str | None = None,
    limits: Mapping[str, Any] | None = None,
    image_hosts: tuple[str, ...] = (),
    api_key: str | None = None,
    token_selection: str | None = None,
    device: str | None = None,
    threads: int | None = None,
) -> FastAPI:
    """Load a model and make its application; see ``adallava serve --help`` for what is what."""
    if threads is not None:
        torch.set_num_threads(threads)
    keep_memory()
    vlm = apart(lambda: AdaptiveVLM.from_pretrained(model, **({} if device is None else {"device": device})))
    if token_selection is not None:
        vlm.token_selection = token_selection
    engine = Engine(vlm, Limits(**(limits or {})), objective_ms)
    default = budget or ("100%" if objective_ms is None else AUTO)
    settings = ServeSettings(model, api_key, ImagePolicy(hosts=image_hosts), default_budget=default)
    return create_app(engine, settings)
