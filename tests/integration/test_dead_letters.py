"""A dead letter, replayed by the command, is computed by a running consumer and picked up by its request id."""

from __future__ import annotations

import uuid
from contextlib import closing

import numpy as np
import pytest
from tests.conftest import Serving
from typer.testing import CliRunner

from embedstream.deploy import cli
from embedstream.producer import SyncProducer
from embedstream.shared import jobs
from embedstream.shared.connections import connect_sync
from embedstream.shared.jobs import Job
from embedstream.shared.keys import Keys

pytestmark = pytest.mark.integration


def test_a_replayed_job_is_answered(serving: Serving) -> None:
    keys, request_id, texts = Keys("ek", "all-MiniLM-L6-v2"), uuid.uuid4().bytes, ("Hello, world", "Good morning")
    header, body = Job(request_id, 0, 1, 0, 1, jobs.text_lengths(texts), texts=texts).encode()
    with closing(connect_sync(serving.redis_url)) as redis:
        letter = redis.xadd(
            keys.dead_letters, {"h": header, "b": body, "rt": "", "why": "a test", "lane": "interactive"}
        )
        assert isinstance(letter, bytes)
        done = CliRunner().invoke(
            cli.app, ["dead-letters", "replay", letter.decode(), "--redis-url", serving.redis_url]
        )
        assert done.exit_code == 0, done.output
        assert request_id.hex() in done.stdout
        assert not redis.exists(keys.dead_letters) or not redis.xrange(keys.dead_letters, letter, letter)
    with SyncProducer(serving.redis_url) as producer:
        vectors = producer.result(request_id.hex(), timeout_s=60)
    np.testing.assert_allclose(vectors, serving.embed(list(texts)), atol=1e-5)
