"""RQ: one process, jobs one after the other; SimpleWorker does not fork for each."""

import logging

import rq
from protocol import TEXT, URL, job, jobs, serve
from redis import Redis

logging.disable()
connection = Redis.from_url(URL)
queue = rq.Queue(connection=connection)


def prepare(count):
    queue.enqueue_many(
        [
            rq.Queue.prepare_data(job, args=(number, TEXT), result_ttl=0, timeout=60)
            for number in range(count)
        ]
    )


def process(count):
    jobs.expect(count, lambda: None)
    rq.SimpleWorker([queue], connection=connection).work(burst=True)


serve(prepare, process)
