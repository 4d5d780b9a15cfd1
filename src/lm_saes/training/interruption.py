"""Ctrl-C and SIGTERM: finish the step first."""

from __future__ import annotations

import signal
import threading
from typing import Any, Self


class Interruption:
    """While this context is open, the first SIGINT or SIGTERM only sets `requested`; a second one acts as if this were not here.
    Outside the main thread, where Python delivers no signals, it does nothing."""

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._note) for number in self._SIGNALS}
        return self

    def _note(self, *_: object) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}

    def __exit__(self, *exception: object) -> None:
        self._restore()
