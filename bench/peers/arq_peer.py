"""arq: asyncio, one sorted set; a job is locked while it runs and removed when it is done."""

import asyncio

import uvloop
from arq import create_pool, func
from arq.connections import RedisSettings
from arq.worker import Worker
from protocol import TEXT, URL, jobs, run_until_done, serve_async, side_by_side


async def job(context, number, text):
    jobs.done()


async def main():
    settings = RedisSettings.from_dsn(URL)
    pool = await create_pool(settings)

    async def prepare(count):
        await side_by_side(count, lambda number: pool.enqueue_job("job", number, TEXT))

    async def process(count):
        worker = Worker(
            [func(job, name="job")],
            redis_settings=settings,
            max_jobs=100,
            keep_result=0,
            poll_delay=0.001,
            handle_signals=False,
        )
        await run_until_done(count, worker.async_run())
        await worker.close()

    await serve_async(prepare, process)


asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
asyncio.run(main())
