"""leasekit: `outbox.run`, one asyncio task a row, each row acknowledged once its handler returns."""

import asyncio

import uvloop
from protocol import TEXT, URL, jobs, run_until_done, serve_async

import leasekit

LANE, TARGET = "bench", "destination"
RUNS, CONCURRENCY = 4, 400


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
            jobs.done()

        async def process(count):
            # Side by side: one works on its rows while the server claims for another.
            runs = [
                outbox.run(LANE, TARGET, handle, consumer="bench", concurrency=CONCURRENCY)
                for _ in range(RUNS)
            ]
            await run_until_done(count, asyncio.gather(*runs))

        await serve_async(prepare, process)


uvloop.run(main())
