"""Freed memory that is kept is used again, without the system being asked for it."""

import platform
import subprocess
import sys

import pytest

WORK = """
import resource
import torch
from adallava.hosts.memory import keep_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(4_000_000)  # 16 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

without = faults()
keep_memory()
faults()
print(without, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what is told is told to glibc")
def test_memory_is_fetched_once():
    told = subprocess.run([sys.executable, "-c", WORK], check=True, capture_output=True, text=True).stdout
    without, kept = map(int, told.split())
    assert kept < 100 < without
