"""Ctrl-C, SIGTERM and SIGHUP: each raises where the program is, so that all ends in order. Imports no ray."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, as a scheduler or a closed terminal sends it. Whoever minds Ctrl-C minds it likewise."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """As a shell counts: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP."""
    return 128 + (interrupt.number if isinstance(interrupt, Terminated) else signal.SIGINT)


@contextmanager
def raising(once: bool = False) -> Iterator[Callable[[], None]]:
    """Within the block Ctrl-C raises KeyboardInterrupt, and SIGTERM and SIGHUP raise Terminated.

    once: the first of them is the last, as another would cut off the orderly end: also of the program, where a block
    of it lies around this one. Signals that are ignored, as nohup does, or that somebody else handles, stay as they
    are; in threads other than the main one all do. Yields a function that takes the signals back from a library that
    has taken them within the block.
    """
    handler = _Handler(once)
    before = {number: signal.getsignal(number) for number in ENDING if _is_free(signal.getsignal(number))}
    if threading.current_thread() is not threading.main_thread():
        before = {}

    def take() -> None:
        for number in before:
            signal.signal(number, handler)

    handler.taken = tuple(before)
    take()
    try:
        yield take
    except KeyboardInterrupt as error:
        if handler.raised in (None, signal.SIGINT) or isinstance(error, Terminated):
            raise
        # Ray's core passes on that there was a signal, but not which.
        raise Terminated(handler.raised) from None
    finally:
        for number, previous in before.items():
            if not (handler.raised and once and isinstance(previous, _Handler)):
                signal.signal(number, previous)


class _Handler:
    def __init__(self, once: bool):
        self._once = once
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        self.taken: tuple[int, ...] = ()
        self.raised: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.raised = number
        if self._once:
            for other in self.taken:
                signal.signal(other, signal.SIG_IGN)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if number != signal.SIGTERM:
            self._leave_terminal()
        raise Terminated(number)

    def _leave_terminal(self) -> None:
        """Print nowhere: to write to a terminal that has gone is an error, which would end the program in its midst."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in self._terminals:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)


def _is_free(handler: object) -> bool:
    return handler in (signal.SIG_DFL, signal.default_int_handler) or isinstance(handler, _Handler)
