"""huey: threads; a job is popped before it runs, so a crash loses it."""

import logging
import threading

from huey import RedisHuey
from protocol import TEXT, URL, jobs, serve

logging.disable()
huey = RedisHuey("bench", results=False, url=URL)


@huey.task()
def job(number, text):
    jobs.done()


def prepare(count):
    for number in range(count):
        job(number, TEXT)


def process(count):
    finished = threading.Event()
    jobs.expect(count, finished.set)
    consumer = huey.create_consumer(workers=8, periodic=False, check_worker_health=False)
    consumer.start()
    finished.wait()
    consumer.stop(graceful=True)


serve(prepare, process)
