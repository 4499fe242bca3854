"""Ctrl-C and SIGTERM, which wait for the step in hand."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Stop:
    """Notes Ctrl-C and SIGTERM while a step is being taken; the same signal again ends at once."""

    def __init__(self):
        self.asked: set[int] = set()

    def _note(self, number: int, frame) -> None:
        if number in self.asked:
            raise KeyboardInterrupt
        self.asked.add(number)

    @contextmanager
    def __call__(self) -> Iterator["Stop"]:
        # only there may signals be handled
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
