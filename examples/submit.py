"""Hand work over, and pick the vectors up by id: here, in another process, or an hour later.

python examples/submit.py [REDIS_URL]
"""

import asyncio
import sys

from embedstream.producer import Producer, ResultTimeout

TEXTS = [f"passage number {number}" for number in range(300)]


async def main() -> None:
    """One producer submits, another picks up."""
    async with Producer(*sys.argv[1:]) as producer:
        request_id = await producer.submit(TEXTS, lane="bulk", timeout_s=600)
    print("submitted:", request_id)
    async with Producer(*sys.argv[1:]) as producer:
        try:
            print("at once:", (await producer.result(request_id, timeout_s=0)).shape)
        except ResultTimeout as error:
            print("at once:", error)
        vectors = await producer.result(request_id)
        print("later:", vectors.shape, vectors.dtype)


asyncio.run(main())
