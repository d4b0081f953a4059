"""What a device really reaches: its rates in one large matrix product and one large copy, for roofline times."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from adallava.cost import Device
from adallava.cost.flops import BYTES_PER_VALUE
from adallava.hosts.answer import device_now

_SIDE = {"cpu": 2048, "cuda": 8192}
_COPY_VALUES = {"cpu": 2**25, "cuda": 2**30}
_ROUNDS = 5


def measured_device(device: torch.device, dtype: torch.dtype) -> Device:
    """A ``Device`` with the rates that ``device`` reaches in ``dtype``.

    Roofline times count two bytes per value; the bandwidth is scaled so that they are right for ``dtype`` too.
    """
    side, values = _SIDE[device.type], _COPY_VALUES[device.type]
    factor = torch.randn(side, side, device=device, dtype=dtype)
    source = torch.ones(values, device=device, dtype=dtype)
    target = torch.empty_like(source)
    flops = 2 * side**3 / _seconds(lambda: factor @ factor, device)
    bandwidth = 2 * source.nbytes / _seconds(lambda: target.copy_(source), device)
    scale = BYTES_PER_VALUE / source.element_size()
    return Device(f"this {device.type}", bandwidth * scale, flops, None, 1.0)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    taken = []
    for _ in range(_ROUNDS + 1):
        started = device_now(device)
        work()
        taken.append(device_now(device) - started)
    return statistics.median(taken[1:])
