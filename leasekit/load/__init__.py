"""`leasekit load`: a load test against any server, which keeps books of its own and compares them.

Closed loop: so many coroutines, each of which does one thing after the other. Open loop (`rate`):
things arrive by a Poisson process whether or not the server keeps up, and their latencies count from
the moment they were to begin, so that a slow server cannot hide its slowness by slowing the test.

**Bounded books.** No process keeps a list of rows. Kept are: how many rows were enqueued and acked,
the sums of their ids (equal sums of equally many ids: the same rows), latencies as counts by value,
the claims that are open now, and a line (id, fence, lease) for each claim of a row that was handed
out more than once or whose end was odd. Two claims of one row are held against each other by fence:
the later must not begin before the earlier's lease has ended, or its holder has given the row back.

**It goes on.** A call whose outcome is unknown is asked again by its name with `repeat=True` until
it is known; one that was not applied is made again. So the books stay exact while the server is killed
and started again. Where even a repeat cannot tell (`forgotten`), the row is counted as unsettled.

It works in a prefix of its own, `load-<random>`, and deletes every key of it at the end.

    plan      what is to be done, checked         run       the parent: processes, server, the end
    worker    a process: phases, rates            traffic   what coroutines do, and how they insist
    notes     a process's own books               judge     all books compared; the result
    screen    what a person sees meanwhile        messages  what parent and processes say
    stand_in  a server that costs nothing, to measure what the harness itself costs
"""
