"""Embeddings straight through the queue, beside a running `make run` or with the URL of its Redis.

python examples/producer.py [REDIS_URL]
"""

import asyncio
import sys

from embedstream.producer import Producer

TEXTS = [f"passage number {number}" for number in range(300)]


async def main() -> None:
    """One matrix for all, then the same piece by piece."""
    async with Producer(*sys.argv[1:]) as producer:
        vectors = await producer.embed(TEXTS)
        print("all at once:", vectors.shape, vectors.dtype)
        async for piece in producer.stream(TEXTS, lane="bulk"):
            print(f"inputs {piece.first} to {piece.first + len(piece.vectors) - 1} are done")


asyncio.run(main())
