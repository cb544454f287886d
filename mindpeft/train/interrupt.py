"""Ctrl-C during a run: finish the step, then stop."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

from mindpeft.console import logger

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C stopped the run after a whole step; the message says how to resume."""


class InterruptGuard:
    """While active, the first SIGINT or SIGTERM only sets :attr:`requested`; a second one interrupts at once.

    SIGTERM is what cluster schedulers send; besides, MindSpore puts a handler of its own in SIGINT's place,
    which turns Ctrl-C into SIGTERM. Outside the main thread, where Python gets no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> InterruptGuard:
        if self._main:
            self._earlier = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._main:
            for number, handler in self._earlier.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        logger.info("interrupted: stopping after this step (once more to stop at once)")
