"""Items read ahead by a thread, so that the language model works while the dictionary is trained.

The thread reads until `depth` items wait, then sleeps. What waits belongs to the state: `state_dict()` holds the position of the stream
that is read and the items that were read from it and not handed out. A resumed stream hands these out first, whatever its own depth.

On a GPU the thread issues its work to a CUDA stream of its own, so that it runs beside the training step; whoever takes an item waits for
that item alone, on the device. Items that were made on the CPU are copied there from pinned memory.
On a CPU reading ahead gains nothing: the language model and the step would share the same cores.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from lm_saes.activations.shuffle import Items, loaded, saved
from lm_saes.activations.stream import ReadingThread, State, StoppedError, Stream, nested, part

DEPTH_ON_CUDA = 2
"""One item being used, one ready, one being made."""


def automatic_depth(device: torch.device) -> int:
    """How many items to read ahead where nobody says: some on CUDA, none elsewhere."""
    return DEPTH_ON_CUDA if device.type == "cuda" else 0


class _Read(NamedTuple):
    """What one reading gave: an item, with the event on the device that says it is complete, or what was raised instead."""

    item: Items
    complete: torch.cuda.Event | None = None
    raised: BaseException | None = None


class _Reader:
    """The thread's side: what it shares with the stream that hands items out, which it must not keep alive."""

    def __init__(self, items: Stream[Items], depth: int, device: torch.device) -> None:
        self.items, self.depth, self.device = items, depth, device
        self.changed = threading.Condition()  # guards what follows
        self.waiting: deque[_Read] = deque()
        self.busy = self.paused = False
        self.cuda_stream = torch.cuda.Stream(device) if depth and device.type == "cuda" else None

    def run(self) -> None:
        """Read ahead until something is raised, the end of the stream included, or until told to stop."""
        thread = threading.current_thread()
        assert isinstance(thread, ReadingThread)
        while True:
            with self.changed:
                self.changed.wait_for(lambda: thread.told_to_stop or (len(self.waiting) < self.depth and not self.paused))
                if thread.told_to_stop:
                    return
                self.busy = True
            read = self._read()
            with self.changed:
                self.busy = False
                if not isinstance(read.raised, StoppedError):
                    self.waiting.append(read)
                self.changed.notify_all()
            if read.raised is not None:
                return

    def _read(self) -> _Read:
        try:
            if self.cuda_stream is None:
                return _Read(next(self.items))
            with torch.cuda.stream(self.cuda_stream):
                item = {key: _on_gpu(value, self.device) if isinstance(value, Tensor) else value for key, value in next(self.items).items()}
                complete = torch.cuda.Event()
                complete.record()
                return _Read(item, complete)
        except BaseException as error:  # raised again for whoever asks for this item
            return _Read({}, raised=error)

    def stop(self, thread: ReadingThread) -> None:
        """End the thread at the next stopping point of what it reads; what waits, stays."""
        with self.changed:
            thread.told_to_stop = True
            self.changed.notify_all()
        if thread is not threading.current_thread():  # the garbage collector may call from anywhere
            thread.join()


class Prefetch:
    """The items of a stream, up to `depth` of them read ahead by a thread; 0 reads each when it is asked for, without a thread.

    The thread starts with the first item that is asked for, and ends with the stream, with `close()`, with this object, or with Python.
    What the stream raises is raised by the `next()` that would have met it; asking again goes on as the stream itself would.
    """

    def __init__(self, items: Stream[Items], depth: int, device: torch.device | str = "cpu") -> None:
        self._reader = _Reader(items, depth, torch.device(device))
        self._stop: weakref.finalize | None = None
        """Ends the thread, if there is one: called when this object goes, or Python does."""

    @property
    def ahead(self) -> int:
        """Items that were read and not handed out."""
        return sum(read.raised is None for read in self._reader.waiting)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Items:
        reader = self._reader
        if reader.depth == 0:
            return reader.waiting.popleft().item if reader.waiting else next(reader.items)
        if self._stop is None:
            self._start()
        with reader.changed:
            reader.changed.wait_for(lambda: reader.waiting)
            read = reader.waiting.popleft()
            reader.changed.notify_all()
        if read.raised is not None:
            self.close()
            if isinstance(read.raised, StopIteration):
                raise StopIteration
            raise read.raised
        if read.complete is not None:
            current = torch.cuda.current_stream(reader.device)
            current.wait_event(read.complete)
            for value in read.item.values():
                if isinstance(value, Tensor):
                    value.record_stream(current)  # its memory is given out again only when this use is over
        return read.item

    def _start(self) -> None:
        reader = self._reader
        if reader.cuda_stream is not None:
            reader.cuda_stream.wait_stream(torch.cuda.current_stream(reader.device))  # for the weights, and for a state that was loaded
        thread = ReadingThread(target=reader.run, name="lm_saes prefetch", daemon=True)  # Python does not wait for it at exit: `_stop` ends it
        self._stop = weakref.finalize(self, reader.stop, thread)
        thread.start()

    def close(self) -> None:
        """End the thread. What it read stays and is handed out first, if more is asked for."""
        if self._stop is not None:
            self._stop()
            self._stop = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While open, nothing is being read, and what was read is complete."""
        reader = self._reader
        with reader.changed:
            reader.paused = True
            reader.changed.wait_for(lambda: not reader.busy)
        try:
            if reader.cuda_stream is not None:
                reader.cuda_stream.synchronize()
            yield
        finally:
            with reader.changed:
                reader.paused = False
                reader.changed.notify_all()

    def state_dict(self) -> State:
        """The state of the stream that is read, and the items ahead of it."""
        with self.paused():
            ahead = [saved(read.item) for read in self._reader.waiting if read.raised is None]
            state: State = {"ahead": len(ahead), **self._reader.items.state_dict()}
        for index, item in enumerate(ahead):
            state |= nested(f"ahead.{index}", item)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.close()
        reader = self._reader
        ahead = [loaded(part(f"ahead.{index}", state), reader.device) for index in range(state.get("ahead", 0))]
        reader.items.load_state_dict({key: value for key, value in state.items() if key.split(".")[0] != "ahead"})
        reader.waiting = deque(_Read(item) for item in ahead)


def _on_gpu(value: Tensor, device: torch.device) -> Tensor:
    return value if value.device.type == "cuda" else value.pin_memory().to(device, non_blocking=True)
