"""Embed a text file of any size, line by line, in bounded memory, beside a running `make run`.

python examples/map.py FILE [REDIS_URL]
"""

import sys
from pathlib import Path

from embedstream.producer import InputFailure, SyncProducer


def main() -> None:
    """The file is read no faster than it is embedded."""
    n_rows = 0
    with Path(sys.argv[1]).open() as lines, SyncProducer(*sys.argv[2:]) as producer:
        for line, vector in producer.map(lines, truncate_prompt_tokens=-1, on_failure="yield"):
            if isinstance(vector, InputFailure):
                print(f"left out: {line[:40]!r}: {vector.message}", file=sys.stderr)
            else:
                n_rows += 1  # write the vector, or whatever it is for
    print(n_rows, "lines embedded")


main()
