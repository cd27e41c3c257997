"""A small model of one tenant, written from lua/PROTOCOL.md and the specs, not from the Lua.

Plain Python, one item a call, no bounds but those that a short run can meet. tests/integration/
test_model.py runs it beside the real thing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

NEVER_MS = 2**53 - 1
ENDED_KEEP_MS = 300_000
RESERVED_KEEP_MS = 86_400_000
UNFINISHED = ("pending", "claimed", "unknown")


@dataclass(frozen=True)
class Draft:
    lane: str
    payload: int
    dedupe_key: str | None
    available_at: int
    attempts_max: int | None
    parks: bool


@dataclass
class Row:
    id: str
    draft: Draft
    created_at: int
    at: int
    status: str = "pending"
    cause: str = "enqueued"
    token: str | None = None
    attempts: int = 0
    claims: int = 0
    claimed_at: int = 0
    errors: list[str] = field(default_factory=list)

    def seen_at(self, now: int) -> str:
        """The status that readers see: a row that parks is unknown from its lease's end on."""
        parked = self.status == "claimed" and self.draft.parks and self.at <= now
        return "unknown" if parked else self.status

    def move(self, status: str, cause: str, at: int) -> None:
        self.status, self.cause, self.at = status, cause, at

    def fail(self, kind: str) -> None:
        self.errors = [*self.errors, kind][-10:]


@dataclass
class Lease:
    token: str
    fence: int
    end: int
    released: bool = False


@dataclass
class Record:
    token: str
    fingerprint: str
    lease_end: int | None
    expires_at: int | None
    parks: bool
    forget_at: int
    status: str = "reserved"
    conflicts: int = 0
    outcome: int | None = None
    completed: bool = False


@dataclass
class Reference:
    """Everything of a tenant. Each method is a command and gives its outcome."""

    finished_ms: int
    finished_count: int
    dead_ms: int
    dead_count: int
    dedupe_ms: int
    fence: int = 0
    horizon: str = ""
    rows: dict[str, Row] = field(default_factory=dict)
    dedupe: dict[tuple[str, str], tuple[str, Draft, int]] = field(default_factory=dict)
    claims: dict[str, tuple[int, list[str]]] = field(default_factory=dict)
    ever: dict[str, int] = field(default_factory=lambda: {"sent": 0, "cancelled": 0})
    leases: dict[str, Lease] = field(default_factory=dict)
    records: dict[str, Record] = field(default_factory=dict)

    def grant(self, now: int) -> int:
        self.fence = max(self.fence + 1, now * 1_000)
        return self.fence

    # --- outbox ---

    def enqueue(self, now: int, id: str, draft: Draft, repeat: bool) -> tuple[str, str]:
        holder = None
        if draft.dedupe_key is not None:
            self._refresh_dedupe(now)
            holder = self.dedupe.get((draft.lane, draft.dedupe_key))
        row = self.rows.get(id)
        if holder and holder[0] != id:
            return "duplicate" if holder[1] == draft else "conflict", holder[0]
        if row:
            if row.draft != draft:
                return "conflict", id
            return "created" if repeat else "duplicate", id
        if holder or (repeat and id <= self.horizon):
            return "forgotten", id
        self.rows[id] = Row(id, draft, now, draft.available_at or now)
        if draft.dedupe_key is not None:
            self.dedupe[draft.lane, draft.dedupe_key] = (id, draft, now + self.dedupe_ms)
        return "created", id

    def _refresh_dedupe(self, now: int) -> None:
        for key, (id, draft, end) in list(self.dedupe.items()):
            if end > now:
                continue
            row = self.rows.get(id)
            if row and row.status in UNFINISHED:
                self.dedupe[key] = (id, draft, now + self.dedupe_ms)
            else:
                del self.dedupe[key]

    def line(self, lane: str) -> list[Row]:
        rows = [one for one in self.rows.values() if one.draft.lane == lane]
        return sorted(
            (one for one in rows if one.status in ("pending", "claimed")),
            key=lambda one: (one.at, one.id),
        )

    def claim(self, now: int, lane: str, token: str, limit: int, lease_ms: int) -> list[str]:
        due = [one for one in self.line(lane) if one.at <= now]
        over = [name for name, (end, _) in self.claims.items() if end <= now]
        record = self.claims.get(token)
        if record:
            limit, looked_at = 0, []
            held = [self.rows.get(id) for id in record[1]]
            taken = [
                one
                for one in held
                if one and one.status == "claimed" and one.token == token and one not in looked_at
            ]
        else:
            taken, buried = [], False
            for one in due[:limit]:
                used_up = one.draft.attempts_max and one.attempts >= one.draft.attempts_max
                if one.status == "claimed" and one.draft.parks:
                    one.move("unknown", "parked", now)
                elif one.status == "claimed" and used_up:
                    one.move("dead_lettered", "expired", now)
                    one.fail("expired")
                    buried = True
                else:
                    taken.append(one)
            if taken:
                self.grant(now)
                self.claims[token] = (now + lease_ms, [one.id for one in taken])
            for one in taken:
                one.move("claimed", "claimed", now + lease_ms)
                one.token, one.claimed_at = token, now
                one.attempts += 1
                one.claims += 1
            if buried:
                self._forget("dead", now)
        for name in over:
            if name != token or record:
                self.claims.pop(name, None)
        return [one.id for one in taken]

    def _missing(self, id: str, repeat: bool, otherwise: str) -> str:
        return "forgotten" if repeat and id <= self.horizon else otherwise

    def ack(self, now: int, id: str, token: str, repeat: bool) -> str:
        row = self.rows.get(id)
        if row is None:
            return self._missing(id, repeat, "lost_claim")
        if row.token != token:
            return "lost_claim"
        if (row.status, row.cause) == ("sent", "acked"):
            return "acked"
        buried_by_expiry = (row.status, row.cause) == ("dead_lettered", "expired")
        if row.status not in ("claimed", "unknown") and not buried_by_expiry:
            return "lost_claim"
        row.move("sent", "acked", now)
        self.ever["sent"] += 1
        self._forget("done", now)
        return "acked"

    def nack(
        self, now: int, id: str, token: str, retry_at: int | None, permanent: bool, repeat: bool
    ) -> str:
        row = self.rows.get(id)
        if row is None:
            return self._missing(id, repeat, "lost_claim")
        if row.token != token:
            return "lost_claim"
        if (row.status, row.cause) == ("pending", "requeued"):
            return "requeued"
        if row.status == "dead_lettered" and row.cause != "resolved":
            return "dead_lettered"
        if row.status not in ("claimed", "unknown"):
            return "lost_claim"
        used_up = row.draft.attempts_max and row.attempts >= row.draft.attempts_max
        kind = "permanent" if permanent else "nacked" if used_up else "requeued"
        row.fail(kind)
        if kind == "requeued":
            row.move("pending", "requeued", now if retry_at is None else retry_at)
        else:
            row.move("dead_lettered", kind, now)
        self._forget("dead", now)
        return "requeued" if kind == "requeued" else "dead_lettered"

    def extend(self, now: int, id: str, token: str, lease_ms: int) -> str:
        row = self.rows.get(id)
        if not row or row.token != token or row.status != "claimed" or row.at <= now:
            return "lost_claim"
        row.at = max(row.at, now + lease_ms)
        return "extended"

    def release(self, id: str, token: str, repeat: bool) -> str:
        row = self.rows.get(id)
        if row is None:
            return self._missing(id, repeat, "lost_claim")
        if row.token != token:
            return "lost_claim"
        if (row.status, row.cause) == ("pending", "released"):
            return "released"
        if row.status != "claimed":
            return "lost_claim"
        row.move("pending", "released", row.claimed_at)
        row.attempts -= 1
        return "released"

    def cancel(self, now: int, id: str, repeat: bool) -> str:
        row = self.rows.get(id)
        if row is None:
            return self._missing(id, repeat, "missing")
        if row.status == "cancelled":
            return "cancelled"
        if row.status != "pending":
            return "not_pending"
        row.move("cancelled", "cancelled", now)
        self.ever["cancelled"] += 1
        self._forget("done", now)
        return "cancelled"

    def redrive(self, now: int, id: str, repeat: bool) -> str:
        row = self.rows.get(id)
        if row is None:
            return self._missing(id, repeat, "missing")
        if (row.status, row.cause) == ("pending", "redriven"):
            return "redriven"
        if row.status != "dead_lettered":
            return "not_dead"
        row.move("pending", "redriven", now)
        row.attempts, row.token = 0, None
        return "redriven"

    def resolve(self, now: int, id: str, verdict: str, repeat: bool) -> str:
        row = self.rows.get(id)
        if row is None:
            return self._missing(id, repeat, "missing")
        status = {"sent": "sent", "redrive": "pending", "dead": "dead_lettered"}[verdict]
        if (row.status, row.cause) == (status, "resolved"):
            return "resolved"
        if row.seen_at(now) != "unknown":
            return "not_unknown"
        row.move(status, "resolved", now)
        row.token = None
        row.fail(f"resolved_{verdict}")
        if verdict == "sent":
            self.ever["sent"] += 1
        if verdict == "redrive":
            row.attempts = 0
        self._forget("done", now)
        self._forget("dead", now)
        return "resolved"

    def ended(self, noun: str) -> list[Row]:
        """The rows of the list done or dead, the oldest first."""
        words = ("dead_lettered",) if noun == "dead" else ("sent", "cancelled")
        rows = [one for one in self.rows.values() if one.status in words]
        return sorted(rows, key=lambda one: (one.at, one.id))

    def _forget(self, noun: str, now: int) -> None:
        keep_ms = self.dead_ms if noun == "dead" else self.finished_ms
        keep_count = self.dead_count if noun == "dead" else self.finished_count
        rows = self.ended(noun)
        for number, row in enumerate(rows):
            if row.at > now - keep_ms and len(rows) - number <= keep_count:
                break
            del self.rows[row.id]
            self.horizon = max(self.horizon, row.id)

    # --- leases ---

    def acquire(self, now: int, name: str, token: str, ttl_ms: int) -> str:
        over = self._ended_leases(now)
        lease = self.leases.get(name)
        outcome = "acquired"
        if lease and not lease.released and lease.end > now:
            outcome = "acquired" if lease.token == token else "busy"
        elif lease and lease.released and lease.token == token:
            outcome = "busy"  # spent: nobody holds it, and this token never will again
        else:
            self.leases[name] = Lease(token, self.grant(now), now + ttl_ms)
            over.discard(name)
        for ended in over:
            del self.leases[ended]
        return outcome

    def _ended_leases(self, now: int) -> set[str]:
        return {name for name, one in self.leases.items() if one.end <= now - ENDED_KEEP_MS}

    def holder(self, now: int, name: str) -> Lease | None:
        lease = self.leases.get(name)
        return lease if lease and not lease.released and lease.end > now else None

    def extend_lease(self, now: int, name: str, token: str, ttl_ms: int) -> str:
        lease = self.holder(now, name)
        if not lease or lease.token != token:
            return "lost"
        lease.end = max(lease.end, now + ttl_ms)
        return "extended"

    def release_lease(self, now: int, name: str, token: str, repeat: bool) -> str:
        over = self._ended_leases(now)
        lease = self.leases.get(name)
        if lease is None:
            outcome = "forgotten" if repeat else "lost"
        elif lease.token != token or (not lease.released and lease.end <= now):
            outcome = "lost"
        else:
            outcome = "released"
            if not lease.released:
                self.leases[name] = replace(lease, released=True, end=now)
                over.discard(name)
        for ended in over:
            del self.leases[ended]
        return outcome

    # --- idempotency ---

    def reserve(self, now: int, key: str, **given: Any) -> str:
        """given: token, fingerprint, lease_ms, expires_at, parks."""
        self._forget_records(now, key)
        record = self.records.get(key)
        token, fingerprint = given["token"], given["fingerprint"]
        if record and record.status == "released" and record.token == token:
            return "spent"
        if record is None or record.status == "released" or self._is_free(record, now):
            lease_end = now + given["lease_ms"] if given["lease_ms"] else None
            forget_at = given["expires_at"] or NEVER_MS
            if not given["expires_at"] and lease_end and not given["parks"]:
                forget_at = lease_end + RESERVED_KEEP_MS
            self.records[key] = Record(
                token, fingerprint, lease_end, given["expires_at"], given["parks"], forget_at
            )
            return "reserved"
        if record.fingerprint == fingerprint:
            return "reserved" if record.token == token else "duplicate"
        record.status = "conflicted"
        record.conflicts += 1
        return "conflict"

    @staticmethod
    def _is_free(record: Record, now: int) -> bool:
        if record.expires_at is not None and record.expires_at <= now:
            return True
        vanished = record.lease_end is not None and record.lease_end <= now
        return vanished and not record.completed and not record.parks

    def complete(
        self, now: int, key: str, token: str, outcome: int, keep_ms: int, repeat: bool
    ) -> str:
        self._forget_records(now, key)
        record = self.records.get(key)
        if record is None or record.status == "released":
            return "missing"
        if record.token != token:
            return "lost"
        if not (repeat and record.completed):
            record.status, record.outcome, record.completed = "completed", outcome, True
            record.expires_at = record.expires_at or now + keep_ms
            record.forget_at = record.expires_at
        return "completed"

    def withdraw(self, now: int, key: str, token: str, repeat: bool) -> str:
        self._forget_records(now, key)
        record = self.records.get(key)
        if record is None:
            return "forgotten" if repeat else "missing"
        if record.token != token:
            return "missing" if record.status == "released" else "lost"
        if record.status not in ("reserved", "released"):
            return "kept"
        if record.status == "reserved":
            record.status, record.forget_at = "released", now + ENDED_KEEP_MS
        return "released"

    def _forget_records(self, now: int, asked: str) -> None:
        for key, record in list(self.records.items()):
            if record.forget_at <= now and key != asked:
                del self.records[key]
