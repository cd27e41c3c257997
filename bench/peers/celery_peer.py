"""Celery, pool solo: jobs one after the other in the worker's own process, acknowledged before they run."""

import logging

from celery import Celery
from celery.worker import state
from protocol import TEXT, URL, jobs, serve

logging.disable()
app = Celery("bench", broker=URL)
app.conf.update(
    task_ignore_result=True,
    worker_prefetch_multiplier=64,
    worker_hijack_root_logger=False,
    worker_enable_remote_control=False,
    broker_connection_retry_on_startup=True,
)


@app.task(name="job")
def job(number, text):
    jobs.done()


def prepare(count):
    with app.pool.acquire() as connection, app.amqp.producer_pool.acquire() as producer:
        del connection
        for number in range(count):
            job.apply_async((number, TEXT), producer=producer)


def stop():
    state.should_stop = 0


def process(count):
    state.should_stop = None
    jobs.expect(count, stop)
    worker = app.Worker(
        pool="solo",
        concurrency=1,
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        task_events=False,
        loglevel="CRITICAL",
    )
    worker.start()


serve(prepare, process)
