"""One process forwards work, others receive the vectors and share them, beside a running `make run`.

python examples/inbox.py send [REDIS_URL]
python examples/inbox.py receive [REDIS_URL]     # in as many terminals as you like; Ctrl-C ends it
"""

import asyncio
import sys
from contextlib import suppress

from embedstream.producer import Producer


async def send(producer: Producer) -> None:
    """Nobody here waits for the vectors."""
    for page in range(10):
        ids = [f"page {page}, line {line}" for line in range(100)]
        await producer.forward(ids, "indexer", ids=ids, tag=f"page {page}")
    print("all is stored; the receivers do the rest")


async def receive(producer: Producer) -> None:
    """Write, then acknowledge: what a killed receiver had not acknowledged goes to another."""
    async for delivery in producer.deliveries("indexer"):
        print(delivery.tag, delivery.ids and delivery.ids[0], delivery.vectors.shape)
        await delivery.ack()


async def main() -> None:
    """Which side this is, the first argument says."""
    async with Producer(*sys.argv[2:]) as producer:
        await (send if sys.argv[1] == "send" else receive)(producer)


with suppress(KeyboardInterrupt):
    asyncio.run(main())
