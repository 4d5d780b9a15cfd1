"""Checkpoints written behind the back of training.

Training waits while its state is copied; a thread then writes the copy. One moment is written at a time: whoever comes with the next one waits
for the thread. What the thread meets (a full disk, say) is raised by whatever looks next: `check`, `write` or `close`.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self


class BackgroundWriter:
    """Runs one job at a time in a thread. A context: leaving it waits for the job."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="lm_saes checkpoint")
        self._job: Future[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether a job is being done."""
        return self._job is not None and not self._job.done()

    def check(self) -> None:
        """Raise what a job that is over has raised, if it has. Costs nothing while one is running."""
        if not self.busy:
            self.wait()

    def write(self, job: Callable[[], None]) -> None:
        """Have the thread do `job`, when the one before is over; raises what that one raised."""
        self.wait()
        self._job = self._pool.submit(job)

    def wait(self) -> None:
        """Until nothing is being done. Raises what the job raised."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._pool.shutdown()
