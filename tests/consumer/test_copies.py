"""Copies between host and device: with a runtime that notes in which order it was used, for want of a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from embedstream.consumer.copies import Direct, PinnedCopies, copies_of


class FakeStream:
    def __init__(self, name: str, events: list[str]) -> None:
        self.name = name
        self._events = events

    def wait_stream(self, stream: FakeStream) -> None:
        self._events.append(f"{self.name} waits for {stream.name}")


class FakeEvent:
    def __init__(self, stream: str, events: list[str]) -> None:
        self._stream = stream
        self._events = events

    def synchronize(self) -> None:
        self._events.append(f"host waits for {self._stream}")


class FakeRuntime:
    """The host's memory stands for the device's; what is asked of streams is noted."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self._names = iter(["there", "back"])
        self._current = FakeStream("compute", self.events)
        self._pinned: list[Tensor] = []

    def new_stream(self) -> FakeStream:
        return FakeStream(next(self._names), self.events)

    def current_stream(self) -> FakeStream:
        return self._current

    @contextmanager
    def within(self, stream: FakeStream) -> Iterator[None]:
        before, self._current = self._current, stream
        yield
        self._current = before

    def mark(self, stream: FakeStream) -> FakeEvent:
        self.events.append(f"mark {stream.name}")
        return FakeEvent(stream.name, self.events)

    def pinned(self, like: Tensor) -> Tensor:
        self._pinned.append(torch.empty(like.shape, dtype=like.dtype))
        return self._pinned[-1]

    def to_device(self, pinned: Tensor) -> Tensor:
        assert any(pinned is one for one in self._pinned)
        self.events.append(f"copy on {self._current.name}")
        return pinned.clone()

    def keep(self, tensor: Tensor, stream: Any) -> None:
        self.events.append(f"keep for {stream.name}")


def test_an_array_goes_on_its_own_stream_and_the_kernels_wait_for_it() -> None:
    runtime = FakeRuntime()
    array = np.arange(6, dtype=np.int64).reshape(2, 3)

    tensor = PinnedCopies(runtime).to_device(array)

    assert runtime.events == ["copy on there", "compute waits for there", "keep for compute"]
    assert tensor.tolist() == array.tolist()


def test_an_array_may_be_changed_once_it_was_handed_over() -> None:
    array = np.arange(3)

    tensor = PinnedCopies(FakeRuntime()).to_device(array)
    array[:] = 9

    assert tensor.tolist() == [0, 1, 2]


def test_a_result_comes_back_behind_its_kernels_and_the_host_waits_only_when_it_is_fetched() -> None:
    runtime = FakeRuntime()

    fetch = PinnedCopies(runtime).to_host(torch.tensor([1.0, 2.0]))

    assert runtime.events == ["back waits for compute", "keep for back", "mark back"]
    assert fetch().tolist() == [1.0, 2.0]
    assert runtime.events[-1] == "host waits for back"


def test_on_a_cpu_nothing_is_copied() -> None:
    array = np.arange(3)
    copies = copies_of(torch.device("cpu"))

    tensor = copies.to_device(array)

    assert isinstance(copies, Direct)
    assert not copies.overlap
    assert tensor.data_ptr() == array.ctypes.data
    assert copies.to_host(tensor)() is not None
    assert copies.to_host(tensor)().data_ptr() == array.ctypes.data


def test_a_device_has_one_pair_of_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedstream.consumer.copies.Cuda", lambda device: FakeRuntime())

    first = copies_of(torch.device("cuda", 7))

    assert first.overlap
    assert copies_of(torch.device("cuda", 7)) is first
    copies_of.cache_clear()
