"""Signals that end a training run after the running step, not in the middle of it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

__all__ = ["StopSignals", "TrainingInterrupted"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingInterrupted(BaseException):
    """Leaves the training loop after a signal; not an error, so that no handler of errors takes it for one.

    Parameters
    ----------
    signum
        The signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"training was stopped by {signal.Signals(signum).name}")
        self.signum = signum


class StopSignals:
    """Remembers SIGTERM and Ctrl-C while the context is open; the previous handlers are back afterwards.

    The first signal is remembered in :attr:`received`. A second one is handled as it would be without this context, so
    that an impatient Ctrl-C still interrupts at once. Outside the main thread, which alone may handle signals, nothing
    is changed.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self.received = None
        if threading.current_thread() is threading.main_thread():
            self._previous = {signum: signal.getsignal(signum) for signum in _SIGNALS}
            self.install()
        return self

    def __exit__(self, *exc_info: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)
        self._previous = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"received": self.received, "_previous": {}}  # handlers belong to a process

    def install(self) -> None:
        """Handle the signals here; called again after Lightning put its own handler in front.

        The handler of Lightning sends from within itself to other processes, which are in the middle of a step.
        """
        for signum, previous in self._previous.items():
            if previous != signal.SIG_IGN:
                signal.signal(signum, self._remember)

    def end_as_demanded(self, signum: int) -> None:
        """End as the signal demands, now that training is over and the previous handlers are back.

        Raises
        ------
        KeyboardInterrupt
            After Ctrl-C.
        SystemExit
            After SIGTERM, with status 143, as shells report it. A handler that the user had set is called before.
        """
        previous = signal.getsignal(signum)
        if callable(previous) and previous is not signal.default_int_handler:
            previous(signum, None)
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signum)

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signum
            return
        previous: Callable[[int, FrameType | None], Any] | int | None = self._previous.get(signum)
        if callable(previous):
            previous(signum, frame)
        elif signum == signal.SIGTERM:
            raise SystemExit(128 + signum)
