from __future__ import annotations

import os
import signal
import socket
import time

import pytest

from embedstream.deploy import signals
from embedstream.deploy.signals import Signals


def test_a_signal_ends_the_wait() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as watched:
        os.kill(os.getpid(), signal.SIGTERM)
        watched.wait(None)
        assert watched.stopping
        assert not watched.urgent
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_echo_is_no_second_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_ECHO_S", 3600.0)
    with Signals() as watched:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
            watched.wait(None)
        assert watched.stopping
        assert not watched.urgent


def test_a_second_wish_is_urgent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_ECHO_S", 0.0)
    with Signals() as watched:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
            watched.wait(None)
            time.sleep(0.001)
        assert watched.urgent


def test_a_program_started_by_nohup_ignores_the_hangup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as watched:
            os.kill(os.getpid(), signal.SIGHUP)
            watched.wait(0)
            assert not watched.stopping
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_readable_file_ends_the_wait() -> None:
    mine, theirs = socket.socketpair()
    with mine, theirs, Signals() as watched:
        assert not watched.wait(0, [mine])
        theirs.sendall(b"x")
        assert watched.wait(None, [mine])
