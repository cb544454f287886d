"""Ctrl-C during a run: finish the step, then stop."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

from mindpeft.console import logger


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C stopped the run after a whole step; the message says how to resume."""


class InterruptGuard:
    """While active, the first SIGINT only sets :attr:`requested`; a second one interrupts at once.

    Outside the main thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> InterruptGuard:
        if self._main:
            self._earlier = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._main:
            signal.signal(signal.SIGINT, self._earlier)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        logger.info("interrupted: stopping after this step (once more to stop at once)")
