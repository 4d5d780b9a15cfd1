"""Reading ahead: the same items in the same order, states that belong to what was handed out, errors and ends as without it, no thread left."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import traceback
from typing import Any, Self

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_saes.activations.prefetch import Prefetch, automatic_depth
from lm_saes.activations.shuffle import ShuffleBuffer
from lm_saes.activations.stream import StoppedError, stopping_point


class Numbers:
    """Items 0, 1, ..., `end` - 1. `reader` is the thread that read last; reading item `fails_at` raises once."""

    def __init__(self, end: int, fails_at: int | None = None, seconds: float = 0.0) -> None:
        self.end, self.fails_at, self.seconds, self.position = end, fails_at, seconds, 0
        self.reader: threading.Thread | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, Any]:
        self.reader = threading.current_thread()
        time.sleep(self.seconds)
        if self.position == self.fails_at:
            self.fails_at = None
            raise OSError("the disk is gone")
        if self.position == self.end:
            raise StopIteration
        self.position += 1
        return {"tokens": torch.arange(self.position - 1, self.position), "meta": [{"spans": [("d", self.position - 1, self.position)]}]}

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: Any) -> None:
        self.position = state["position"]


def numbers(items: list[dict[str, Any]]) -> list[int]:
    for item in items:
        assert item["meta"] == [{"spans": [("d", int(item["tokens"]), int(item["tokens"]) + 1)]}]
    return [int(item["tokens"]) for item in items]


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "this never happened"
        time.sleep(0.001)


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "lm_saes prefetch"]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Any:
    yield
    gc.collect()
    assert reading_threads() == []


def test_a_cpu_does_not_read_ahead_by_itself() -> None:
    assert automatic_depth(torch.device("cpu")) == automatic_depth(torch.device("mps")) == 0
    assert automatic_depth(torch.device("cuda")) == 2


@given(end=st.integers(0, 9), depths=st.tuples(st.integers(0, 4), st.integers(0, 4)), cut=st.integers(0, 9))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_same_items_and_a_state_that_any_depth_takes_up(end: int, depths: tuple[int, int], cut: int) -> None:
    stream = Prefetch(Numbers(end), depths[0])
    assert numbers([next(stream) for _ in range(min(cut, end))]) == list(range(min(cut, end)))
    state = stream.state_dict()
    rest = list(range(min(cut, end), end))
    resumed = Prefetch(Numbers(end), depths[1])
    resumed.load_state_dict(state)
    again = resumed.state_dict()  # before anything was asked for
    assert numbers(list(resumed)) == numbers(list(stream)) == rest
    for late in (stream, resumed):  # a snapshot does not change, and may be loaded at any time
        late.load_state_dict(again)
        assert numbers(list(late)) == rest
        assert list(late) == []
        late.close()


def test_a_state_from_before_there_was_reading_ahead() -> None:
    for depth in (0, 2):
        stream = Prefetch(Numbers(5), depth)
        stream.load_state_dict({"position": 3})
        assert numbers(list(stream)) == [3, 4]


def test_it_really_reads_ahead_in_a_thread_and_no_further_than_its_depth() -> None:
    items = Numbers(100)
    stream = Prefetch(items, 3)
    assert reading_threads() == []  # not before the first item is asked for
    next(stream)
    wait_until(lambda: stream.ahead == 3)
    time.sleep(0.05)
    assert items.position == 4
    assert items.reader is not threading.current_thread()
    next(stream)
    wait_until(lambda: items.position == 5)
    stream.close()
    assert reading_threads() == []
    assert stream.ahead == 3
    assert numbers(list(stream)) == list(range(2, 100))  # what was read is not lost


def test_depth_zero_has_no_thread() -> None:
    items = Numbers(3)
    assert numbers(list(Prefetch(items, 0))) == [0, 1, 2]
    assert items.reader is threading.current_thread()


def test_reading_and_using_overlap() -> None:
    stream = Prefetch(Numbers(8, seconds=0.02), 2)
    start = time.perf_counter()
    for _ in stream:
        time.sleep(0.02)
    assert time.perf_counter() - start < 0.28  # 0.18 s at best, 0.32 s one after the other


def test_errors_come_where_they_would_have_come_with_their_own_traceback() -> None:
    stream = Prefetch(Numbers(6, fails_at=3), 2)
    assert numbers([next(stream) for _ in range(3)]) == [0, 1, 2]
    with pytest.raises(OSError, match="the disk is gone") as raised:
        next(stream)
    assert 'raise OSError("the disk is gone")' in [frame.line for frame in traceback.extract_tb(raised.value.__traceback__)]
    assert reading_threads() == []
    assert numbers(list(stream)) == [3, 4, 5]


def test_the_thread_ends_with_the_stream_even_in_the_middle_of_a_long_item() -> None:
    class Endless(Numbers):
        def __next__(self) -> dict[str, Any]:
            if self.position < 1:
                return super().__next__()
            self.position += 1
            while True:
                stopping_point()
                time.sleep(0.001)

    items = Endless(1)
    stream = Prefetch(items, 2)
    assert numbers([next(stream)]) == [0]
    wait_until(lambda: items.position == 2)
    assert len(reading_threads()) == 1
    del stream
    gc.collect()
    assert reading_threads() == []
    stopping_point()  # in any other thread it means nothing


def test_a_buffer_that_was_stopped_while_it_filled_goes_on() -> None:
    class Stopping(Numbers):
        def __next__(self) -> dict[str, Any]:
            if self.position == 7 and self.fails_at is None:
                self.fails_at = -1
                raise StoppedError
            return super().__next__()

    expected = numbers(list(ShuffleBuffer(Numbers(40), 1, 12, seed=3)))
    buffer = ShuffleBuffer(Stopping(40), 1, 12, seed=3)
    with pytest.raises(StoppedError):
        next(buffer)
    assert numbers(list(buffer)) == expected


def test_nothing_grows() -> None:
    stream = Prefetch(Numbers(400), 2)
    for _ in range(400):
        next(stream)
        assert stream.ahead <= 2
    assert list(stream) == []
    assert len(stream.state_dict()) == 2  # the position, and that nothing is ahead


SCRIPT = """
import os, signal, sys, time, torch
from lm_saes.activations.prefetch import Prefetch

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored

class Forever:
    def __next__(self):
        return {"x": torch.ones(300, 300) @ torch.ones(300, 300)}

stream = Prefetch(Forever(), 2)
for _ in range(5):
    next(stream)
"""
ENDINGS = {
    "": (0, ""),
    "raise RuntimeError('of the training')": (1, "of the training"),
    "os.kill(os.getpid(), signal.SIGINT); time.sleep(60)": (-2, "KeyboardInterrupt"),
    "os.kill(os.getpid(), signal.SIGINT)\nwhile True: next(stream)": (-2, "KeyboardInterrupt"),
}


def test_a_process_ends_as_if_there_were_no_thread() -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", SCRIPT + ending], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for ending in ENDINGS
    ]
    try:
        for process, (code, says) in zip(processes, ENDINGS.values(), strict=True):
            _, errors = process.communicate(timeout=100)
            assert process.returncode == code, errors
            assert says in errors
            assert bool(says) == bool(errors)
            assert "Exception ignored" not in errors
    finally:
        for process in processes:
            process.kill()
