"""CPU threads beside other programs: counted, lowered for the length of a request, learned from apart."""

import contextvars
import multiprocessing
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from adallava.cost.calibration import Measured, Measurement, fit_profile
from adallava.cost.forecast import Forecaster
from adallava.hosts import threads
from adallava.hosts.threads import CoreMeter, apart, asked_threads, run_on, running_on
from test_cost_calibration import PRINT, requests, steps, times
from test_cost_forecast import STEP, WORK
from test_hosts_profiles import ask, profile_of
from tiny import tiny_vlm


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    """As on a machine that gives two, and with nothing left behind."""
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "_here", threading.local())
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def clock(monkeypatch):
    """The system's accounts, made up: [seconds passed, busy, own] on four cores."""
    told = [0.0, 0.0, 0.0]
    monkeypatch.setattr(threads, "_read", lambda cores: threads._Reading(*told))
    monkeypatch.setattr(threads, "time", SimpleNamespace(perf_counter=lambda: told[0]))
    monkeypatch.setattr(threads, "_cores", lambda: [0, 1, 2, 3])
    return told


def test_what_is_busy_beyond_this_process_is_others(clock):
    meter = CoreMeter()
    assert (meter.others(), meter.free()) == (0.0, 4)
    clock[:] = [1.0, 3.0, 1.5]
    assert meter.others() == pytest.approx(1.5)
    assert meter.free() == 2
    clock[:] = [1.05, 3.05, 1.5]  # too soon to say
    assert meter.others() == pytest.approx(1.5)
    clock[:] = [2.0, 4.0, 2.6]  # the system counts in larger steps than the process
    assert (meter.others(), meter.free()) == (0.0, 4)
    clock[:] = [3.0, 8.0, 2.6]
    assert meter.free() == 1


def test_a_system_that_does_not_tell_has_no_other_programs(monkeypatch):
    def refuse(**_):
        raise PermissionError("/proc/stat")

    monkeypatch.setattr(threads.psutil, "cpu_times", refuse)
    monkeypatch.setattr(threads, "_cores", lambda: [0, 1])
    meter = CoreMeter()
    time.sleep(0.15)
    assert (meter.others(), meter.free()) == (0.0, 2)


def test_a_busy_process_is_seen():
    meter = CoreMeter()
    process = multiprocessing.get_context("spawn").Process(target=burn, daemon=True)
    process.start()
    try:
        deadline = time.perf_counter() + 20
        while meter.others() < 0.3 and time.perf_counter() < deadline:
            time.sleep(0.2)
        assert meter.others() >= 0.3
    finally:
        process.kill()
        process.join()


def burn():
    while True:
        pass


def test_a_request_gets_fewer_threads_and_the_program_its_own_back():
    with running_on(1):
        assert (torch.get_num_threads(), asked_threads()) == (1, 2)
        assert in_a_new_thread(asked_threads) == in_a_new_thread(torch.get_num_threads) == 2
    assert (torch.get_num_threads(), asked_threads()) == (2, 2)
    run_on(1)
    assert asked_threads() == 2
    run_on(2)
    assert in_a_new_thread(lambda: [run_on(1, asked=1), asked_threads()][-1]) == 1
    torch.set_num_threads(1)  # from now on the program wants one
    assert asked_threads() == 1


def in_a_new_thread(ask):
    told = []
    thread = threading.Thread(target=lambda: told.append(ask()))
    thread.start()
    thread.join()
    return told[0]


def test_fewer_threads_are_learned_apart():
    profile = fit_profile("m", {**PRINT, "threads": "4"}, requests(times(150, noise=0.03), steps(60)))
    made = Forecaster(profile)
    made.observe(Measured(Measurement(WORK, 1e6)))  # the first of a process, which teaches nothing
    calm, step = made.prefill(WORK), made.decode(STEP)
    made.on_threads(2)
    assert made.prefill(WORK).ms == pytest.approx(2 * calm.ms)
    assert made.decode(STEP).upper_ms == pytest.approx(2 * step.upper_ms)
    for _ in range(5):
        made.observe(Measured(Measurement(WORK, 1.5 * calm.ms)))
    assert made.prefill(WORK).ms == pytest.approx(1.5 * calm.ms)
    made.on_threads(4)
    assert made.prefill(WORK) == calm
    made.on_threads(2)
    assert made.prefill(WORK).ms == pytest.approx(1.5 * calm.ms)


@pytest.fixture
def vlm(monkeypatch):
    made = tiny_vlm()
    made.profiles.use(profile_of(made))
    made.ran_on = []
    made.model.register_forward_pre_hook(lambda *_: made.ran_on.append(torch.get_num_threads()))
    return made


@pytest.mark.parametrize(("others", "ran_on"), [(0.0, 2), (0.3, 2), (1.0, 1), (2.0, 1)])
def test_a_budget_in_time_runs_on_the_cores_that_are_free(vlm, monkeypatch, others, ran_on):
    monkeypatch.setattr(threads, "_cores", lambda: [0, 1])
    monkeypatch.setattr(CoreMeter, "others", lambda self: others)
    ask(vlm, "1000000000 ms")
    assert set(vlm.ran_on) == {ran_on}
    assert torch.get_num_threads() == 2
    ask(vlm, "60%")  # whose time nobody asked for
    assert vlm.ran_on[-1] == 2


def test_a_forecaster_that_keeps_to_the_profile_keeps_its_threads(vlm, monkeypatch):
    monkeypatch.setattr(threads, "_cores", lambda: [0, 1])
    monkeypatch.setattr(CoreMeter, "others", lambda self: 1.0)
    vlm.profiles.use(Forecaster(profile_of(vlm), correct=False))
    ask(vlm, "1000000000 ms")
    assert set(vlm.ran_on) == {2}


def test_work_done_apart_keeps_its_context_and_tells_what_went_wrong():
    variable = contextvars.ContextVar("variable", default=0)
    variable.set(7)
    told = apart(lambda: (variable.get(), threading.current_thread().name))
    assert told[0] == 7 and told[1] != threading.current_thread().name
    with pytest.raises(ZeroDivisionError):
        apart(lambda: 1 / 0)
