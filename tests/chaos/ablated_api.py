"""An API process that never looks for lost requests: `python -m tests.chaos.ablated_api --port …`."""

from __future__ import annotations

from embedstream.api.__main__ import main
from embedstream.producer.reconcile import Reconciler


async def _look_at_nothing(self: Reconciler, *, at_once: bool) -> None:
    del self, at_once


if __name__ == "__main__":
    Reconciler._check  # noqa: B018 - the ablation must follow the code
    Reconciler._check = _look_at_nothing  # type: ignore[method-assign] # that is the ablation
    main()
