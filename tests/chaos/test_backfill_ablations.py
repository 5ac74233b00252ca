"""Each guard of backfills taken out by itself: the oracle must then report a failure."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from . import corpus
from .backfill_ablations import ABLATIONS
from .backfills import Backfill
from .crash_points import in_a_process
from .deployment import Device, Sites
from .trial import Trial

pytestmark = pytest.mark.chaos


@pytest.mark.parametrize(
    ("ablate", "out", "said"),
    [
        ("record_before_part", "out", "ended with 78"),
        ("records_forgotten", "out", "computed again"),
        ("parts_are_added", "out", "there twice"),
        ("no_sweep", "out", "left over"),
        ("joined_before_it_is", "out.parquet", "ended with 78"),
        ("side_file_after_the_end", "out", "bad rows told of|left over"),
    ],
)
async def test_b1_killed_without_a_guard(
    trial: Trial, tmp_path: Path, seed: int, ablate: str, out: str, said: str
) -> None:
    """Which guard, the row says."""
    code, line = await in_a_process(tmp_path, seed, out, ablate)
    assert code == os.EX_SOFTWARE, f"the guard is out, and nothing was broken: {line}"
    assert re.search(said, line), line
    _is_red(trial, ablate, _without_names(line))


async def test_b2_claims_of_everybody(site: Sites, trial: Trial, tmp_path: Path, seed: int) -> None:
    """Claims; two processes."""
    made = corpus.make(tmp_path / "in", seed, 4_000, corpus.Kind(repeated=0, bad=0))
    async with site(consumers=1, apis=0, device=Device(tokens_per_s=20_000)) as here:
        job = Backfill(here, made, tmp_path / "out")
        with trial.on(here):
            await job.until_complete(*(job.start("claims_of_everybody") for _ in range(2)))
            job.check()
            again = job.computed_again()
            assert again > 0, "nobody claims anything, and no row was computed twice"
            _is_red(trial, "claims_of_everybody", f"{again:,} of {len(made.good):,} rows computed again")


def _without_names(line: str) -> str:
    """What is broken, without paths and rows: `killed before act 17 of a backfill to …: 1 files left over: …`."""
    return ": ".join(re.sub(" to /.*", "", part) for part in line.split(": ")[:2])


def _is_red(trial: Trial, ablate: str, said: str) -> None:
    trial.row.scenario = f"Backfill: {(ABLATIONS[ablate].__doc__ or ablate).splitlines()[0]}"
    trial.row.red_as_meant = said
    trial.finish()
