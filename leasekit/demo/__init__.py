"""`leasekit demo`: the real job with real processes, two of which are treated badly on purpose.

Producers enqueue webhook bodies; dispatchers claim, deliver and ack them; a destination keeps its own
ledger and refuses an older fence for a row that it has seen a newer one for. Half-way, one dispatcher
is killed (SIGKILL) and one is stopped (SIGSTOP), each after a delivery and before its acks. Others
take up their rows when the leases end. Then the stopped one goes on, believes that it still holds its
rows, and must be told otherwise: by the outbox when it acks, by the destination when it delivers.

**Nothing is taken on trust.** Four accounts are kept apart and compared at the end: what the producers
say they enqueued, what the dispatchers were answered, what the destination saw, and what the outbox
says of itself and of the rows that it still keeps. A demo that cannot prove a promise says so and fails.

    story     the phases, in the parent          book      what the processes reported, row by row
    crew      processes and what they are told   judge     the accounts compared: figures, broken promises
    messages  what parent and children say       screen    what a person sees meanwhile
    child     what every child process does      producer  dispatcher  destination   the three roles

A child holds on to its parent by its standard input: at its end the child ends, however the parent
went. Each is a process group of its own in the parent's session, so that ctrl-C reaches the parent
alone, and so that the kernel wakes a stopped child whose parent dies (POSIX: an orphaned group with a
stopped member gets SIGHUP and SIGCONT). Every wait ends: where nothing moves for STALL_S, the demo
says what it was waiting for.

This file imports nothing: every child reads it, and none of them needs what draws on a screen.
"""
