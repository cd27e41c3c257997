"""dramatiq: threads; messages are fetched in bulk and acknowledged one by one."""

import os
import threading

os.environ["dramatiq_queue_prefetch"] = "1000"  # noqa: SIM112  # its name

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from protocol import TEXT, URL, jobs, serve

broker = RedisBroker(url=URL, middleware=[])
dramatiq.set_broker(broker)


@dramatiq.actor
def job(number, text):
    jobs.done()


def prepare(count):
    for number in range(count):
        job.send(number, TEXT)


def process(count):
    finished = threading.Event()
    jobs.expect(count, finished.set)
    worker = dramatiq.Worker(broker, worker_threads=8)
    worker.start()
    finished.wait()
    worker.stop()


serve(prepare, process)
