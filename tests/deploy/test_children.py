from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from embedstream.deploy.children import Backoff, Child, ending_of
from embedstream.shared.processes import identity_of


def launcher(*codes: int) -> Callable[[], subprocess.Popen[bytes]]:
    """Starts processes that end by themselves with these codes, one after the other."""
    remaining = iter(codes)

    def launch() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-S", "-c", f"raise SystemExit({next(remaining)})"], process_group=0)

    return launch


def wait_for_end(child: Child) -> None:
    assert child.process is not None
    child.process.wait(30)


def test_pauses_begin_at_once_and_double_up_to_30_s() -> None:
    backoff = Backoff()
    assert [backoff.pause_s(1) for _ in range(8)] == [0, 1, 2, 4, 8, 16, 30, 30]


def test_a_good_run_begins_anew() -> None:
    backoff = Backoff()
    assert [backoff.pause_s(ran_s) for ran_s in (1, 1, 1, 60, 1, 1)] == [0, 1, 2, 0, 1, 2]


def test_a_child_is_due_after_its_pause() -> None:
    now = 0.0
    child = Child("x", launcher(3, 3), clock=lambda: now)
    child.start()
    wait_for_end(child)
    assert child.reap() == 3
    assert child.reap() is None
    assert child.is_due
    child.start()
    wait_for_end(child)
    assert child.reap() == 3
    assert (child.is_due, child.due_in_s) == (False, 1.0)
    now = 1.0
    assert child.is_due


def test_78_is_final() -> None:
    child = Child("x", launcher(78))
    child.start()
    wait_for_end(child)
    assert child.reap() == 78
    assert child.final
    assert not child.is_due
    assert child.has_ended


def test_a_start_that_fails_is_tried_again_later() -> None:
    child = Child("x", launcher(0), clock=lambda: 0.0)
    child.postpone()
    assert child.is_due
    child.postpone()
    assert child.due_in_s == 1.0


def test_asked_to_stop_it_is_not_started_again() -> None:
    child = Child("x", launcher(1))
    child.start()
    wait_for_end(child)
    child.reap()
    assert child.is_due
    child.ask_to_stop()
    assert not child.is_due


def test_what_a_child_had_started_ends_with_it() -> None:
    code = (
        "import subprocess, sys, os;"
        "p = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)'], stdout=subprocess.DEVNULL);"
        "os.write(1, b'%d' % p.pid); os._exit(1)"
    )

    def launch() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE, process_group=0)

    child = Child("x", launch)
    child.start()
    process = child.process
    assert process is not None
    assert process.stdout is not None
    with process.stdout as output:
        process.wait(30)
        grandchild = identity_of(int(os.read(output.fileno(), 100)))
        assert grandchild is not None
        assert child.reap() == 1
    deadline = time.monotonic() + 30
    while grandchild.is_alive:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(("code", "words"), [(3, "exit code 3"), (-9, "killed by SIGKILL")])
def test_endings_in_words(code: int, words: str) -> None:
    assert ending_of(code) == words
