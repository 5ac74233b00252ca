from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROUNDS = 30


def test_state_is_whole_after_every_kill(tmp_path: Path) -> None:
    program = Path(__file__).with_name("committing.py")
    command = [sys.executable, str(program), str(tmp_path), str(ROUNDS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
