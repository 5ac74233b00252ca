"""The CPUs a consumer computes on: how many threads a forward pass gets, and how they wait for each other.

Nothing here imports torch: what OpenMP reads from the environment it reads once, when torch brings it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from embedstream.shared.settings import Settings

from . import allocator, cgroups

_TOPOLOGY = Path("/sys/devices/system/cpu")
_QUOTAS = (("", "cpu.max"), ("cpu", "cpu.cfs_quota_us"))
"""Controller and file of the quota, in cgroups of version 2 and 1."""

_WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_SHORT_WAIT = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}
"""Turns of a loop for GNU's OpenMP, ms for LLVM's and Intel's. Threads that have done their part of a layer spin a
little, because the next one mostly begins within 0.1 ms and waking a thread costs as much; by default they go on
spinning for 5-20 ms, or 200 ms, on cores which the event loop, the API and Valkey need between two batches."""

_KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "512", "LRU_CACHE_CAPACITY": "64"}
"""Kernels that oneDNN keeps, and those that each thread of torch keeps beside it; 1,024 of both by default. There is
one for each shape of a matrix product, and attention has several for each length of a text: what is thrown away costs
about a millisecond the next time. In half formats each takes some 0.6 MB. Measured on mixed batches of MiniLM in
bfloat16 (AVX512-BF16): after 200 of them the process had grown by 880 MB with room for 4,096 and was growing fast, with
512 and 64 by 540 MB, and after 380 by 610, at the same speed; with 10 of both by 130 MB, at four fifths of it."""
KERNELS_BYTES = 512 * 1024 * 1024
"""What they come to: of those 610 MB batches themselves take about 130."""


@dataclass(frozen=True, slots=True)
class Cores:
    """What this process may use of the machine's CPUs.

    Args:
        logical: CPUs it may run on.
        physical: cores these belong to; two CPUs of a core share the units that multiply matrices.
        quota: CPU time it may use in each second of time, by the strictest of its control groups; None without one.
    """

    logical: int
    physical: int
    quota: float | None

    @property
    def useful(self) -> int:
        """Threads that compute faster than fewer do. A quota's fraction of a core only stops all of them in turns."""
        return max(1, self.physical if self.quota is None else min(self.physical, int(self.quota)))


def usable_cores() -> Cores:
    """Look what this process may use now; the machine's limits may change while it runs."""
    if sys.platform == "linux":
        cpus = os.sched_getaffinity(0)
        return Cores(len(cpus), len({_siblings(cpu) for cpu in cpus}), min(_quotas(), default=None))
    count = os.cpu_count() or 1
    return Cores(count, count, None)


def thread_count(settings: Settings, environment: Mapping[str, str] = os.environ) -> int:
    """CPU threads of one forward pass: as asked for, else this consumer's share of the cores, at least one."""
    share = max(1, usable_cores().useful // (settings.consumers or 1))
    return settings.threads or _asked_of_openmp(environment) or share


def wait_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """How threads of OpenMP wait for each other, unless the operator has said it.

    Args:
        environment: of the operator.
    """
    return {} if any(name in environment for name in _WAIT_VARIABLES) else dict(_SHORT_WAIT)


def prepare(settings: Settings, environment: MutableMapping[str, str] = os.environ) -> None:
    """Make this process one that computes. Call it first of all: before torch is imported and a thread is started."""
    environment.update(wait_variables(environment))
    for name, value in _KERNELS.items():
        environment.setdefault(name, value)
    allocator.keep_memory(settings.keep_memory_bytes, environment)


def _asked_of_openmp(environment: Mapping[str, str]) -> int:
    """Threads that OMP_NUM_THREADS asks for, of nested regions the outermost; 0 without it."""
    first = environment.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() else 0


def _siblings(cpu: int) -> str:
    """The CPUs of the core that one belongs to, by their names; where that is hidden, each is a core of its own."""
    return cgroups.read(_TOPOLOGY / f"cpu{cpu}" / "topology" / "thread_siblings_list") or str(cpu)


def _quotas() -> Iterator[float]:
    """CPU seconds a second that the control groups of this process allow, those without a limit left out."""
    for controller, name in _QUOTAS:
        for group in cgroups.groups(controller):
            quota, _, period = cgroups.read(group / name).partition(" ")
            period = period or cgroups.read(group / "cpu.cfs_period_us")
            if quota.isdecimal() and period.isdecimal() and int(period):  # or "max", or -1
                yield int(quota) / int(period)
