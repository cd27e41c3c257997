"""streaq: asyncio, a stream with a group; a task's state is kept beside it while it runs."""

import asyncio
import logging

import uvloop
from protocol import TEXT, URL, jobs, run_until_done, serve_async
from streaq import Worker

logging.disable()


def new_worker():
    """A worker runs once."""
    worker = Worker(redis_url=URL, concurrency=100, handle_signals=False)

    @worker.task(name="job", ttl=0, silent=True)
    async def job(number: int, text: str) -> None:
        jobs.done()

    return worker, job


async def main():
    async def prepare(count):
        worker, job = new_worker()
        async with worker:
            for first in range(0, count, 1_000):
                numbers = range(first, min(first + 1_000, count))
                await worker.enqueue_many([job.enqueue(number, TEXT) for number in numbers])

    async def process(count):
        worker, _ = new_worker()
        await run_until_done(count, worker.run_async())

    await serve_async(prepare, process)


asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
asyncio.run(main())
