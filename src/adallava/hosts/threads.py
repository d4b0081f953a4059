"""CPU threads: as many as other programs leave cores for, and from one pool only.

The threads that share an operation wait for the slowest of them. Where another program takes a core, one of them gets
time slices only, and all take as long as it does, which no choice of k makes up for. So a request runs on as many
threads as there are free cores; how long that takes is learned from requests (``adallava.cost.forecast``).

Each thread of a program that ever computed in parallel keeps helpers of its own. While there are more of them than
cores, OpenMP lets helpers sleep between operations, and waking them takes longer than the work of a small model. So a
program that computes on several threads lets one of them have helpers (``run_on`` one for the others), or does its work
``apart``.
"""

from __future__ import annotations

import contextvars
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import psutil
import torch

_T = TypeVar("_T")
_WINDOW_S = 0.1  # the system counts in steps of up to a hundredth of a second
TAKEN = 0.35
"""Share of a core from which on it counts as taken. A busy program beside as many threads as there are cores gets less
than a whole one: of two cores two thirds."""
_setting = threading.Lock()
"""Held while a number is set that is not meant for other threads."""
_here = threading.local()
"""``asked``: CPU threads that this thread of the program is to have, where it runs on another number of them."""


def asked_threads() -> int:
    """CPU threads that the program wants for what this thread of it computes, also while it runs on fewer."""
    with _setting:
        return getattr(_here, "asked", None) or torch.get_num_threads()


def run_on(threads: int, asked: int | None = None) -> None:
    """Use so many CPU threads for what this thread of the program computes from now on.

    asked: what the program wants for it, ``asked_threads`` from now on; as before when None.
    """
    asked = asked or asked_threads()
    _here.asked = None if threads == asked else asked
    with _setting:
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)
            if threads != asked:
                # PyTorch gives threads to come what was last set on any; they are to get what the program wants.
                apart(lambda: torch.set_num_threads(asked))


@contextmanager
def running_on(threads: int) -> Iterator[None]:
    """``run_on`` for a while."""
    run_on(threads)
    try:
        yield
    finally:
        run_on(asked_threads())


def apart(work: Callable[[], _T]) -> _T:
    """Do ``work`` on a thread of its own, whose helpers end with it; returns and raises what it does."""
    context = contextvars.copy_context()
    with ThreadPoolExecutor(1, "adallava-apart") as pool:
        return pool.submit(context.run, work).result()


@dataclass(frozen=True)
class _Reading:
    """Seconds: of the clock, that the cores were busy, and that this process kept them so."""

    at: float
    busy: float
    own: float


class CoreMeter:
    """Counts the cores that other programs use, among those that this process may use."""

    def __init__(self) -> None:
        self._cores = _cores()  # once: a thread that OpenMP has bound knows of its own only
        self._last, self._others = _read(self._cores), 0.0

    def others(self) -> float:
        """Cores' worth of time that other programs took since this was last asked, if that is 0.1 s ago at least.

        After a pause it speaks of the pause: the first request after it may find the machine busier.
        """
        last = self._last
        if time.perf_counter() - last.at >= _WINDOW_S:
            now = _read(self._cores)
            self._others = max(0.0, (now.busy - last.busy - (now.own - last.own)) / (now.at - last.at))
            self._last = now
        return self._others

    def free(self) -> int:
        """Cores that other programs leave, 1 at least."""
        return max(1, len(self._cores) - math.floor(self.others() + 1 - TAKEN))


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _read(cores: list[int]) -> _Reading:
    try:
        each = psutil.cpu_times(percpu=True)
    except (OSError, RuntimeError, psutil.Error):  # a system that does not tell has no other programs
        each = []
    # A container may be told of its own cores only, under other numbers.
    counted = [each[core] for core in cores] if max(cores) < len(each) else each
    parts = ("user", "nice", "system", "irq", "softirq")  # not every system tells all of them; guests are in user
    busy = sum(getattr(times, part, 0.0) for times in counted for part in parts)
    return _Reading(time.perf_counter(), busy, time.process_time())
