"""leasekit: one asyncio task a row, each acknowledging its own."""

import asyncio

import uvloop
from protocol import TEXT, URL, jobs, run_until_done, serve_async

import leasekit

LANE, TARGET = "bench", "destination"
ROWS_AT_ONCE, ROWS_A_CLAIM = 1_000, 200


async def main():
    async with leasekit.connect(URL, prefix="peer") as kit:
        outbox = kit.tenant("bench", "consume").outbox

        async def prepare(count):
            drafts = [
                leasekit.Draft(lane=LANE, target=TARGET, payload={"number": number, "text": TEXT})
                for number in range(count)
            ]
            for first in range(0, count, 1_000):
                await outbox.enqueue_many(drafts[first : first + 1_000])

        async def handle(claim):
            await claim.ack()
            jobs.done()

        async def take():
            while True:
                claims = await outbox.claim(LANE, TARGET, limit=ROWS_A_CLAIM, consumer="bench")
                await asyncio.gather(*[handle(claim) for claim in claims])

        async def consume():
            await asyncio.gather(*[take() for _ in range(ROWS_AT_ONCE // ROWS_A_CLAIM)])

        async def process(count):
            await run_until_done(count, consume())

        await serve_async(prepare, process)


uvloop.run(main())
