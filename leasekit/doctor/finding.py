"""What a sweep finds, and what is safe to do about it."""

from __future__ import annotations

import msgspec

__all__ = ["ADVICE", "Finding", "Problem"]

_LEAVE = "leave it until the writers of this tenant have stopped; then "
ADVICE = {
    "unreadable_document": "keep a copy (HGET); nobody can send it: enqueue its content anew",
    "unreadable_state": "keep a copy (HGET); no command hands the row out: enqueue its content anew, "
    "once the destination says that it was not sent",
    "row_without_index": "nobody will find the row: ZADD it to the named list at the named score, "
    "with no writer at work",
    "row_in_two_lists": "ZREM it from the named list: the state line is what counts",
    "row_in_wrong_list": "ZREM it from the named list and ZADD it where its state says, with no "
    "writer at work",
    "row_in_wrong_line": "ZREM it from the named line: its document names the line it belongs to",
    "wrong_place": "ZADD the score that the state says: a held row that stands too early is handed to "
    "another holder before its lease ends",
    "wrong_size": "only bounds on bytes are inexact; nothing has to be done",
    "claimed_without_token": "it cannot be acked; wait for its lease's end: it is claimed anew then",
    "lane_not_listed": "its rows are claimed, but not listed or counted; the next enqueue on the "
    "lane lists it again",
    "index_without_row": "nothing is lost by ZREM; a claim drops such an entry of a line by itself",
    "state_without_row": "HDEL it: there is no row that it could speak of",
    "errors_without_row": "HDEL it: there is no row that it could speak of",
    "wrong_tally": _LEAVE + "HSET the counted number; claims and acks do not depend on it",
    "stale_claim_record": "HDEL and ZREM it once its end has passed: rows are held by their state "
    "lines, not by it; it only answers repeats of its claim",
    "claim_end_without_record": "ZREM it; the next claims do so by themselves",
    "two_holders": "stop both holders, ask the destination what was sent under which fence, then "
    "let one of them finish",
    "fence_behind": "SET it to the named number before anything else is granted: else a new holder "
    "may get a fence that is not above an older one",
    "dedupe_without_end": "the next enqueue under this key renews or drops it; HDEL it where its row "
    "is finished",
    "dedupe_end_without_entry": "ZREM it; enqueues do so by themselves",
    "dedupe_of_nothing": "an enqueue under this key is answered duplicate or conflict and stores "
    "nothing: HDEL and ZREM it, then enqueue",
    "unreadable_lease": "HDEL it, ZREM its end and name, once its holder has stopped",
    "lease_without_end": "ZADD the end that its line names, or it is never forgotten",
    "lease_without_name": "ZADD it to the names at 0: it is held, but not listed",
    "lease_end_disagrees": "ZADD the end that its line names: one that is kept as over is forgotten "
    "while it is held",
    "lease_end_without_lease": "ZREM it; the next acquisitions do so by themselves",
    "lease_name_without_lease": "ZREM it: nobody holds it",
    "unreadable_record": "keep a copy (HGET); ask the destination before the key is used again",
    "key_without_end": "it is never forgotten, listed or purged: ZADD when it may be",
    "key_end_without_record": "ZREM it; reservations do so by themselves",
    "unreadable_intent": "leave it there, for so long nobody is granted it; ask the destination what "
    "became of it, and restore the line from a backup; HDEL it only once nothing was sent",
    "intent_without_token": "its sender cannot complete it; once it is unknown: leasekit resolve",
    "unreadable_intent_document": "pages that hold it cannot be read: restore it from a backup, or keep "
    "a copy and HDEL it; the state line is what counts",
    "intent_without_document": "nobody is granted it all the same; it reads without tool and key, so "
    "that no destination is asked: restore it from a backup, or leasekit resolve",
    "unreadable_facts": "pages that hold them cannot be read: keep a copy (HGET), then HDEL them; the "
    "state line is what counts",
    "document_without_intent": "its key is granted anew, and whether it was sent is lost: stop its "
    "senders, ask the destination, restore the state line from a backup; HDEL it only if nothing was "
    "sent",
    "facts_without_intent": "its key is granted anew: read them first (HGET), they may say that it was "
    "sent; HDEL them where nothing was",
    "entry_without_intent": "nothing is lost by ZREM: no state line speaks of it",
    "intent_without_entry": "ZADD it there at the named score, with no sender at work: until then "
    "lists, reconcile or forgetting do not find it",
    "intent_in_wrong_place": "ZADD the score that is named, with no sender at work: else it comes too "
    "early or too late in lists, questions or forgetting",
    "intent_in_wrong_list": "ZREM it from the named list: the state line is what counts",
    "intent_among_done": "ZREM it from there at once: what stands there is forgotten by its age, and "
    "may then be granted again",
    "intent_without_run_entry": "ZADD the named entry at 0: pages of its run leave it out",
    "stale_run_entry": "ZREM the named entry: the state line is what counts",
    "unreadable_dataset": "who knows this data is granted nothing: restore it from a backup, or SET it "
    "to the name that the senders' error tells",
    "dataset_without_name": "who knows this data is granted nothing, and the next grant renames it: "
    "restore it from a backup, or SET it to the name that the senders' error tells",
    "foreign_key": "leasekit did not write it: give leasekit a prefix of its own, or DEL it",
    "wrong_type": "leasekit did not write it, and the tenant cannot be used: RENAME it away, and "
    "restore the tenant from a backup",
}


class Problem(msgspec.Struct, frozen=True):
    """What a judge found: kind is a word of ADVICE, noun says which structure."""

    kind: str
    noun: str
    what: str


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One piece of damage. `id` is a row, a name or a field; never a token."""

    kind: str
    key: str
    id: str | None
    what: str
    advice: str
