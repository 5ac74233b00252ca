"""`embedstream backfill` with a guard taken out: `python -m tests.chaos.ablated_backfill NAME IN OUT …`."""

from __future__ import annotations

import sys

from embedstream.deploy.cli import main

from .backfill_ablations import ABLATIONS

if __name__ == "__main__":
    ABLATIONS[sys.argv.pop(1)]()
    sys.argv.insert(1, "backfill")
    main()
