"""SAQ: asyncio, one list and one hash a job; a job is moved to an active list and acknowledged there."""

import asyncio

import uvloop
from protocol import TEXT, URL, jobs, run_until_done, serve_async, side_by_side
from saq import Queue, Worker


async def job(context, *, number, text):
    jobs.done()


async def main():
    queue = Queue.from_url(URL)
    await queue.connect()

    async def prepare(count):
        await side_by_side(
            count, lambda number: queue.enqueue("job", number=number, text=TEXT, ttl=-1)
        )

    async def process(count):
        worker = Worker(queue, [job], concurrency=100)
        worker.SIGNALS = []
        await run_until_done(count, worker.start())

    await serve_async(prepare, process)


asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
asyncio.run(main())
