"""A running API as the tests of clients see it, and its answers over plain HTTP."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx2
import numpy as np
from numpy.typing import NDArray

MODEL = "all-MiniLM-L6-v2"
KEY = "clients-key"


@dataclass(frozen=True)
class Server:
    """A running API.

    Args:
        url: of the server, without `/v1`.
        key: what it wants to see.
    """

    url: str
    key: str = KEY

    @property
    def base_url(self) -> str:
        """What clients of OpenAI are pointed at."""
        return f"{self.url}/v1"

    def embed(self, texts: str | Sequence[str], **options: Any) -> NDArray[np.float32]:
        """Vectors over plain HTTP, as lists of floats."""
        body = json.dumps({"input": texts, **options}).encode()
        answer = json.loads(self._ask("/v1/embeddings", body))
        return np.array([item["embedding"] for item in answer["data"]], np.float32)

    def answers(self, status: int) -> int:
        """How many answers with this status it counts for /v1/embeddings."""
        line = rf'^embedstream_http_requests_total{{path="/v1/embeddings",status="{status}"}} (\S+)$'
        return int(sum(map(float, re.findall(line, self._ask("/metrics").decode(), re.MULTILINE))))

    def _ask(self, path: str, body: bytes | None = None) -> bytes:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        with httpx2.Client(trust_env=False, timeout=60, headers=headers) as client:  # no proxy of the machine between
            return client.request("POST" if body else "GET", self.url + path, content=body).raise_for_status().content


def assert_same(vectors: Any, expected: NDArray[np.float32], cosine: float = 0.99999) -> None:
    """Row by row the same direction and the same length."""
    rows = np.atleast_2d(np.array(vectors, np.float64))
    assert rows.shape == expected.shape
    lengths = np.linalg.norm(rows, axis=1), np.linalg.norm(expected, axis=1)
    np.testing.assert_allclose(*lengths, rtol=1e-4)
    assert ((rows * expected).sum(axis=1) / (lengths[0] * lengths[1]) >= cosine).all()
