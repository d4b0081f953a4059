"""Memory that a process has freed, and keeps: so that the same request takes the same time."""

from __future__ import annotations

import contextlib
import ctypes
import functools

# Of <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _NEVER = -1, -3, 2**31 - 1


@functools.cache
def keep_memory() -> None:
    """Let this process keep the memory it has freed, from now on, where the C library can be told so.

    glibc gives what large tensors lay in back to the system, and fetches it again page by page for the next ones, or
    not, as its heap happens to lie: up to a tenth of a prefill on a CPU, or nothing (docs/LOG.md). What is kept is used
    again, so that a process comes to hold what its largest request needs.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            mallopt(parameter, _NEVER)
