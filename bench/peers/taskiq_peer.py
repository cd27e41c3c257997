"""taskiq on a Redis stream: asyncio; XACK once a job has run, and the stream is never trimmed."""

import asyncio

import uvloop
from protocol import TEXT, URL, jobs, serve_async, side_by_side
from taskiq.receiver import Receiver
from taskiq_redis import RedisStreamBroker

broker = RedisStreamBroker(URL, consumer_id="0", xread_block=100, max_connection_pool_size=60)


@broker.task(task_name="job")
async def job(number: int, text: str) -> None:
    jobs.done()


async def main():
    await broker.startup()

    async def prepare(count):
        await side_by_side(count, lambda number: job.kiq(number, TEXT))

    async def process(count):
        stop = asyncio.Event()
        jobs.expect(count, stop.set)
        broker.is_worker_process = True
        receiver = Receiver(broker, max_async_tasks=100, max_prefetch=100, validate_params=False)
        await receiver.listen(stop)
        broker.is_worker_process = False

    await serve_async(prepare, process)


asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
asyncio.run(main())
