"""The server as processes: stopped by a service manager, and as replicas of which one is killed mid-answer."""

import signal
import threading
import time
from collections import Counter

import httpx
import psutil
import pytest

from adallava.bench.soak import running_server
from adallava.errors import ConfigError
from adallava.serving.replicas import Replicas
from served import asked, post

LONG = {"messages": asked("Describe the picture."), "max_tokens": 1000, "temperature": 2.0}


def stream(url, number, said, ended):
    """Read a long answer; ``said`` gets the number at its first piece, ``ended`` how it ended."""
    body = {"model": "mini-L", **LONG, "seed": number, "stream": True}
    try:
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as answer:
            last = None
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    last = line
                    said.add(number)
            ended[number] = "whole" if last == "data: [DONE]" else f"broken off, {answer.status_code}"
    except httpx.HTTPError as error:
        ended[number] = type(error).__name__


def streaming(url, count, busy):
    """So many long answers on threads, going on since ``busy`` is true of the numbers of those that have begun."""
    said, ended = set(), {}
    threads = [threading.Thread(target=stream, args=(url, number, said, ended)) for number in range(count)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 60
    while not busy(said) and time.monotonic() < until:
        time.sleep(0.01)
    assert busy(said)
    return threads, ended


def test_a_service_manager_stops_it_and_answers_are_finished():
    with running_server("mini-L", "--threads", "1") as (server, url):
        threads, ended = streaming(url, 2, lambda said: len(said) == 2)
        began = time.monotonic()
        server.send_signal(signal.SIGTERM)
        assert server.wait(40) == 0
        assert time.monotonic() - began < 35
        for thread in threads:
            thread.join(10)
    # Whole, or told of the stop within its 30 seconds; never left hanging.
    assert Counter(ended.values()) == {"whole": 2}


@pytest.mark.parametrize("text", ["0", "two", "3:2", "1:", "-1", "1:2:3", "٣"])
def test_numbers_of_replicas_that_cannot_be(text):
    with pytest.raises(ConfigError, match="--ray is"):
        Replicas.parse(text)


def test_replicas_scale_by_the_requests_that_go_on():
    assert Replicas.parse("2").scaling() == {"num_replicas": 2}
    scaling = Replicas.parse("1:4").scaling()["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"], scaling["target_ongoing_requests"]) == (1, 4, 2.0)


def replicas_of(server):
    return [
        each
        for each in psutil.Process(server.pid).children(recursive=True)
        if any("ServeReplica" in part for part in each.cmdline())
    ]


def spent(server):
    return [each.cpu_times().user for each in replicas_of(server)]


def wait_for_all(server, url):
    """Ask until every replica answers: they become ready one after the other, and load their models until then."""
    until = time.monotonic() + 90
    while time.monotonic() < until:
        before = spent(server)
        time.sleep(1)
        idle = spent(server)
        threads = [threading.Thread(target=post, args=(url,), kwargs={"messages": asked()}) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        worked = [b - a for a, b in zip(idle, spent(server), strict=True)]
        if max(b - a for a, b in zip(before, idle, strict=True)) < 0.3 and min(worked) > 0.03:
            return
    pytest.fail("not all replicas work")


def test_a_replica_that_is_killed_costs_only_its_own_requests():
    pytest.importorskip("ray")
    with running_server("mini-L", "--ray", "2", "--threads", "1") as (server, url):
        assert len(replicas_of(server)) == 2
        answers = [post(url, messages=asked(), budget="60%") for _ in range(4)]
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.json()["choices"][0]["message"]["content"] for answer in answers}) == 1
        assert post(url, messages=asked(), budget="10%").status_code == 422
        wait_for_all(server, url)
        victim = replicas_of(server)[0]  # found beforehand, because answers do not wait for it
        before = victim.cpu_times().user
        # Not when all have begun: by the time that the last one does, those of the victim may be over.
        threads, ended = streaming(url, 8, lambda said: said and victim.cpu_times().user - before > 0.1)
        victim.kill()
        for thread in threads:
            thread.join(60)
        told = Counter(ended.values())
        assert 1 <= told["whole"] <= 7, told
        # The other one answers at once, and there are two again soon.
        assert post(url, messages=asked()).status_code == 200
        until = time.monotonic() + 60
        while len(replicas_of(server)) < 2 and time.monotonic() < until:
            time.sleep(0.5)
        assert len(replicas_of(server)) == 2
        assert {post(url, messages=asked()).status_code for _ in range(6)} == {200}
        processes = psutil.Process(server.pid).children(recursive=True)
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not alive, "nothing is left behind"
    assert server.returncode == 0
