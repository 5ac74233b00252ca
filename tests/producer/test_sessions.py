from __future__ import annotations

import structlog

from embedstream.producer.sessions import start


async def test_loops_log_nothing_of_the_request_that_started_them() -> None:
    seen = []

    async def loop() -> None:
        seen.append(structlog.contextvars.get_contextvars())

    with structlog.contextvars.bound_contextvars(request_id="mine"):
        await start(loop(), "test")
        assert structlog.contextvars.get_contextvars() == {"request_id": "mine"}
    assert seen == [{}]
