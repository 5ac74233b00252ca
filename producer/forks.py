"""Forks: what a child process must leave alone of its parent's.

A child has copies of its parent's sockets, and shares the parent's table of what its event loop waits for. To close or
unregister one of them would deafen the parent. So in a child nothing of it is touched, not even by the garbage
collector: it is kept until the process ends.
"""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakSet


class Inherited(Protocol):
    """Something a child process must not use."""

    def forked(self) -> object:
        """Take note, in the child, that this process is another one. Returns what is to be left alone."""


_open: WeakSet[Inherited] = WeakSet()
_kept: list[object] = []


def watch(thing: Inherited) -> None:
    """Have something told of forks, for as long as it lives."""
    _open.add(thing)


def _after_fork() -> None:
    _kept.extend([thing.forked() for thing in _open])


if hasattr(os, "register_at_fork"):  # not on Windows, which has no forks
    os.register_at_fork(after_in_child=_after_fork)
