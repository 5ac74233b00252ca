"""Embeddings over HTTP as raw bytes: no JSON around the numbers, half the size with float16.

    python examples/bytes_client.py [URL]

The header `metadata` says where each vector lies. It grows with the number of inputs; for many inputs ask for
`bytes_only`, which sends the same bytes without it: equal slices, in the order of the inputs.
"""

import json
import sys
import urllib.request

import numpy as np

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
TEXTS = ["How do I renew my passport?", "passport renewal procedure", "the boiling point of water"]


def ask(encoding_format: str) -> tuple[str | None, bytes]:
    """The header `metadata` and the body."""
    fields = {"input": TEXTS, "encoding_format": encoding_format, "embed_dtype": "float16", "endianness": "little"}
    request = urllib.request.Request(  # noqa: S310
        f"{URL}/v1/embeddings", json.dumps(fields).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:  # noqa: S310 - the address is yours
        return response.headers["metadata"], response.read()


header, body = ask("bytes")
metadata = json.loads(header or "")
vectors = np.stack([np.frombuffer(body[item["start"] : item["end"]], "<f2") for item in metadata["data"]])
print(f"{len(body)} bytes: {vectors.shape[0]} vectors of {vectors.shape[1]}")
for text, cosine in zip(TEXTS[1:], (vectors[1:] @ vectors[0]).astype(float), strict=True):
    print(f"{cosine:6.3f}  {TEXTS[0]} | {text}")

_, only = ask("bytes_only")
print("the same with bytes_only:", bool((np.frombuffer(only, "<f2").reshape(len(TEXTS), -1) == vectors).all()))
