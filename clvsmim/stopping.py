"""SIGTERM, by which a cloud takes a machine back: all processes stop at one step."""

import contextlib
import ctypes
import itertools
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils


class Stop:
    """Whether a SIGTERM asks to stop; every process gets the same answer.

    All of them call it equally often, and all get the first True at the same call.

    Attributes:
      here: the signals that have come to this process, at once.
    """

    def __init__(self) -> None:
        self.here: list[int] = []
        self._agreed = False

    def __call__(self) -> bool:
        if not jax.distributed.is_initialized():
            return bool(self.here)
        if not self._agreed:
            number = next(_calls)
            self._agreed = multihost_utils.reached_preemption_sync_point(number)
        return self._agreed


_calls = itertools.count(1)  # never the same number twice, whatever runs in a process
_notifiers: list[Callable[[int], None]] = []


@contextlib.contextmanager
def sigterm() -> Iterator[Stop]:
    """A `Stop` that SIGTERM sets off, which then no longer ends the program.

    Only the main thread may ask for signals; another one gets a Stop of the others.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    if jax.distributed.is_initialized():
        take_notifier()

    def handle(number: int, _: Any) -> None:
        stop.here.append(number)
        for notify in _notifiers:  # JAX tells the others
            notify(number)

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


def take_notifier() -> None:
    """Give SIGTERM its usual meaning back, and keep what JAX has put there instead.

    JAX's handler, a C function that Python does not know of, only takes notice: outside
    of a training, which asks for it, no SIGTERM would end the program.
    """
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return  # somebody else's handler came later
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    found = libc.signal(signal.SIGTERM, None)
    if found:  # None is the default
        _notifiers[:] = [ctypes.CFUNCTYPE(None, ctypes.c_int)(found)]
