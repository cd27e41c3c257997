"""Trying again what failed: dead letters whose retry was requested, each a few times.

A retry is a run that is put back in line from the nodes that failed. A run's checkpoint names its
nodes: `completed_nodes`, `pending_nodes`, `blocked_nodes` (lists), `node_outputs`, `node_attempts`
(by node), `last_failure` (`{node_id}`), `gate`, and `dependencies`: node -> the nodes it waits for.

Source: spec/reliability 4.9.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from leasekit.ledger import phases, recovery
from leasekit.ledger.audit import Audit
from leasekit.ledger.filing import DEAD_LETTERS, RUNS
from leasekit.ledger.records import DeadLetter, PrincipalRef, Run
from leasekit.ledger.redaction import merged
from leasekit.ledger.store import Store, Transaction

__all__ = ["backoff_ms", "dispatch_count", "requeued", "retry_dead_letters"]

DISPATCHES_MAX = 5
BACKOFF_FIRST_MS, BACKOFF_MOST_MS = 1_000, 300_000
REASON = "stateful_dead_letter_retry_dispatched"
ACTOR = PrincipalRef(kind="service_account", id="tandem-server:dead-letter-dispatcher")
WANTED = ("retry_requested", "retrying")
STOPPED = ("failed", "blocked")
PAGE_ROWS = 250


def backoff_ms(count: int) -> int:
    """How long after dispatch number `count` the next one may follow."""
    return min(BACKOFF_FIRST_MS << min(count, 20), BACKOFF_MOST_MS)


def dispatch_count(letter: DeadLetter) -> int:
    """How often a retry of it was dispatched."""
    return _whole(letter.metadata, "retry_dispatch_count")


def _whole(metadata: Any, field: str) -> int:
    value = metadata.get(field) if isinstance(metadata, Mapping) else None
    return value if type(value) is int and value > 0 else 0


def requeued(run: Run, now_ms: int) -> Run | None:
    """A run put back in line from the nodes that failed, with all that depends on them; None where it
    is not known which those are, or where the run has not stopped."""
    if run.status not in STOPPED or not isinstance(run.checkpoint, Mapping):
        return None
    checkpoint = dict(run.checkpoint)
    depends_on = _mapping(checkpoint.get("dependencies"))
    named = {node: set(_list(checkpoint.get(node))) for node in _NODE_LISTS}
    existing = set(depends_on) or set().union(*named.values())
    failure = _mapping(checkpoint.get("last_failure")).get("node_id")
    roots = {*named["blocked_nodes"], *([failure] if isinstance(failure, str) else [])} & existing
    if not roots:
        return None
    again = set(roots)
    while more := {
        node
        for node, needed in depends_on.items()
        if node not in again and again & set(_list(needed))
    }:
        again |= more
    for field in ("completed_nodes", "blocked_nodes"):
        checkpoint[field] = [node for node in _list(checkpoint.get(field)) if node not in again]
    checkpoint["pending_nodes"] = sorted(named["pending_nodes"] | again)
    for field in ("node_outputs", "node_attempts"):
        if field in checkpoint:
            kept = _mapping(checkpoint[field]).items()
            checkpoint[field] = {node: value for node, value in kept if node not in again}
    checkpoint["last_failure"] = checkpoint["gate"] = None
    queued = phases.requeued(run, now_ms, {"resume_reason": REASON})
    return msgspec.structs.replace(queued, checkpoint=checkpoint)


_NODE_LISTS = ("completed_nodes", "pending_nodes", "blocked_nodes")


def _list(value: Any) -> list[str]:
    return [node for node in value if isinstance(node, str)] if isinstance(value, list) else []


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def dispatched(letter: DeadLetter, now_ms: int) -> DeadLetter:
    """A dead letter whose run was put back in line."""
    count = dispatch_count(letter) + 1
    return msgspec.structs.replace(
        letter,
        status="retrying",
        updated_at_ms=now_ms,
        metadata=merged(
            letter.metadata,
            {
                "retry_dispatch_count": count,
                "retry_dispatched_at_ms": now_ms,
                "retry_backoff_ms": backoff_ms(count),
            },
        ),
    )


async def retry_dead_letters(store: Store, *, now_ms: int | None = None) -> int:
    """Look once at every dead letter whose retry was requested; gives how many were acted upon.

    One that succeeded since is resolved, one whose budget of 5 is used up is ignored; else its run is
    put back in line, once a sweep, however many dead letters it has; that is noted in the audit chain.
    """
    acted, seen = 0, set[str]()
    requeued_runs: set[str] = set()
    after: str | None = ""
    while after is not None:
        # Oldest first: what is acted upon moves to the far end, and is not looked at again.
        found, after = await store.page(
            DEAD_LETTERS.name,
            DEAD_LETTERS.name,
            limit=PAGE_ROWS,
            after=after,
            newest=False,
            statuses=WANTED,
            now_ms=now_ms,
        )
        for one in found:
            if one.name not in seen:
                seen.add(one.name)
                acted += await _look_at(store, one.name, requeued_runs, now_ms)
    return acted


async def _look_at(store: Store, name: str, requeued_runs: set[str], now_ms: int | None) -> bool:
    async def decide(transaction: Transaction) -> tuple[bool, str | None]:
        doc = await transaction.get(name)
        letter = None if doc is None else DEAD_LETTERS.decode(doc)
        if letter is None or not _is_candidate(letter) or letter.run_id is None:
            return False, None
        run_doc = await transaction.get(RUNS.name_of(letter.run_id))
        if run_doc is None:
            return False, None
        now, run, queued = transaction.now_ms, RUNS.decode(run_doc), None
        if recovery.is_superseded(letter.metadata):
            changed = _settled(letter, "resolved", "retry_succeeded", now)
        elif dispatch_count(letter) >= DISPATCHES_MAX:
            changed = _settled(letter, "ignored", "retry_exhausted", now)
        elif _next_at(letter) > now:
            return False, None
        else:
            changed = dispatched(letter, now)
            if run.run_id not in requeued_runs:
                queued = requeued(run, now)
                if queued is None:
                    return False, None
                transaction.put(RUNS.name_for(queued), RUNS.listed(queued), RUNS.encode(queued))
        transaction.put(name, DEAD_LETTERS.listed(changed), DEAD_LETTERS.encode(changed))
        return True, None if queued is None else queued.run_id

    acted, run_id = await store.transact(decide, now_ms=now_ms)
    if run_id is not None:
        requeued_runs.add(run_id)
        await Audit(store).append(
            REASON,
            {"run_id": run_id, "dead_letter": name},
            actor=ACTOR.id,
            durability="best_effort",
            now_ms=now_ms,
        )
    return acted


def _is_candidate(letter: DeadLetter) -> bool:
    return (
        letter.status in WANTED
        and letter.source_type == "tool_effect"
        and "retry" in letter.recovery_options
    )


def _next_at(letter: DeadLetter) -> int:
    count = dispatch_count(letter)
    at = _whole(letter.metadata, "retry_dispatched_at_ms")
    return at + backoff_ms(count) if count else 0


def _settled(letter: DeadLetter, status: str, disposition: str, now_ms: int) -> DeadLetter:
    return recovery.disposed(
        letter,
        status,
        disposition,
        reason=letter.disposition_reason,
        actor=ACTOR,
        now_ms=now_ms,
    )
