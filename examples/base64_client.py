"""Embeddings over HTTP with nothing but the standard library and numpy, as base64.

    python examples/base64_client.py [URL]

The form that the OpenAI clients use: JSON around base64 of little-endian float32.
"""

import base64
import json
import sys
import urllib.request

import numpy as np

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
TEXTS = ["How do I renew my passport?", "passport renewal procedure", "the boiling point of water"]

body = json.dumps({"input": TEXTS, "encoding_format": "base64"}).encode()
request = urllib.request.Request(f"{URL}/v1/embeddings", body, {"Content-Type": "application/json"})  # noqa: S310
with urllib.request.urlopen(request) as response:  # noqa: S310 - the address is yours
    answer = json.load(response)

vectors = np.stack([np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in answer["data"]])
print(f"{vectors.shape[0]} vectors of {vectors.shape[1]}, {answer['usage']['prompt_tokens']} tokens")
for text, cosine in zip(TEXTS[1:], vectors[1:] @ vectors[0], strict=True):
    print(f"{cosine:6.3f}  {TEXTS[0]} | {text}")
