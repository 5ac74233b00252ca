from __future__ import annotations

import subprocess
import sys


def test_neither_torch_nor_transformers_is_loaded() -> None:
    code = (
        "import sys; import embedstream.api.main; import embedstream.producer; "
        "embedstream.api.create_app; "
        "print(*sorted({'torch', 'transformers', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_package_itself_loads_next_to_nothing() -> None:
    code = "import sys; import embedstream.api; print('starlette' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
