"""Whose turn it is: routes in turn with a share each, woken by hints, due times and polls."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leasekit.consuming.backoff import backoff_ms, jittered_ms
from leasekit.consuming.schedule import Entry, Room, Schedule


def entry_of(name: str, *, room: Room | None = None, turn: int = 10) -> Entry:
    return Entry(None, name, "t", room or Room(1_000), turn=turn)


def served(schedule: Schedule) -> list[tuple[str, int]]:
    """Everybody whose turn it is now, with the rows it may claim."""
    found = []
    while (taken := schedule.take()) is not None:
        found.append((taken[0].lane, taken[1]))
    return found


def test_entries_are_served_in_the_order_in_which_they_were_woken() -> None:
    """Whoever is woken stands at the end of the line, once; nobody is served unasked."""
    schedule = Schedule(100, poll_s=1)
    a, b = entry_of("a"), entry_of("b")
    assert schedule.take() is None

    for entry in (b, a, b):
        schedule.wake(entry, 0, 0)

    assert served(schedule) == [("b", 10), ("a", 10)]


def test_a_claim_asks_for_no_more_than_there_are_slots() -> None:
    """Turn, free slots and the tenant's room bound what is asked; the rest waits for slots."""
    schedule = Schedule(15, poll_s=1)
    a, b, c = entry_of("a"), entry_of("b"), entry_of("c")
    for entry in (a, b, c):
        schedule.wake(entry, 0, 0)

    assert served(schedule) == [("a", 10), ("b", 5)]
    schedule.took(a, 10, 1, more=False, next_s=None, now_s=0)
    assert served(schedule) == [("c", 9)]


def test_who_has_more_goes_on_until_its_turn_is_over() -> None:
    """A turn that slots cut short is finished first; then the next one has its turn."""
    schedule = Schedule(4, poll_s=1)
    a, b = entry_of("a", turn=6), entry_of("b", turn=6)
    schedule.wake(a, 0, 0)
    schedule.wake(b, 0, 0)
    order = []
    while len(order) < 4 and (taken := schedule.take()) is not None:
        entry, rows = taken
        order.append((entry.lane, rows))
        schedule.took(entry, rows, rows, more=True, next_s=None, now_s=0)
        schedule.freed(entry, rows)

    assert order == [("a", 4), ("a", 2), ("b", 4), ("b", 2)]


def test_shares_go_by_the_length_of_turns() -> None:
    """Of many rows that all have, entries get so many as their turns say: weights."""
    schedule = Schedule(3, poll_s=1)
    entries = {name: entry_of(name, turn=turn) for name, turn in (("a", 30), ("b", 10))}
    for entry in entries.values():
        schedule.wake(entry, 0, 0)
    rows: Counter[str] = Counter()
    while rows.total() < 4_000:
        for name, asked in served(schedule):
            rows[name] += asked
            schedule.took(entries[name], asked, asked, more=True, next_s=None, now_s=0)
            schedule.freed(entries[name], asked)

    assert rows["a"] == pytest.approx(3 * rows["b"], rel=0.02)


def test_a_tenant_holds_no_more_than_its_room() -> None:
    """A full room leaves the slots to others, over all its routes, and comes again when it empties."""
    schedule = Schedule(100, poll_s=1)
    noisy = Room(4)
    a1, a2, b = entry_of("a1", room=noisy), entry_of("a2", room=noisy), entry_of("b")
    for entry in (a1, a2, b):
        schedule.wake(entry, 0, 0)

    assert served(schedule) == [("a1", 4), ("b", 10)]
    schedule.took(a1, 4, 4, more=True, next_s=None, now_s=0)
    schedule.wake(a2, 0, 0)
    assert served(schedule) == []
    assert schedule.next_due_s() is None
    schedule.freed(a1, 3)
    assert [rows for _, rows in served(schedule)] == [3]


def test_a_due_time_wakes_and_only_the_earliest_counts() -> None:
    """next_due_s is the earliest time at which somebody has to look; advance lets it stand in line."""
    schedule = Schedule(100, poll_s=1_000)
    a = entry_of("a")
    schedule.wake(a, 5, 10)
    schedule.wake(a, 9, 10)
    schedule.wake(a, 2, 11)
    assert schedule.next_due_s() == 13

    schedule.advance(12.9)
    assert served(schedule) == []
    schedule.advance(13)
    assert served(schedule) == [("a", 10)]
    assert schedule.next_due_s() is None


def test_a_hint_during_a_claim_is_not_lost() -> None:
    """Who is woken while its claim is under way claims again: that one may have been too early."""
    schedule = Schedule(100, poll_s=1)
    a = entry_of("a")
    schedule.wake(a, 0, 0)
    [(_, asked)] = served(schedule)
    schedule.wake(a, 0, 0)
    schedule.wake(a, 3, 0)
    assert served(schedule) == []

    schedule.took(a, asked, 0, more=False, next_s=None, now_s=0)

    assert served(schedule) == [("a", 10)]


def test_without_hints_each_is_asked_once_in_a_period() -> None:
    """Ten thousand entries that were all asked at once spread over the poll period, evenly."""
    schedule, now = Schedule(100_000, poll_s=50), 0.0
    entries = [entry_of(str(i), turn=1) for i in range(10_000)]
    for entry in entries:
        schedule.wake(entry, 0, 0)
    asked_in: Counter[int] = Counter()
    last: dict[str, float] = {}
    while now < 200:
        schedule.advance(now)
        while (taken := schedule.take()) is not None:
            entry, rows = taken
            asked_in[int(now)] += 1
            assert now - last.get(entry.lane, 0) <= 50 * 1.01
            last[entry.lane] = now
            schedule.took(entry, rows, 0, more=False, next_s=None, now_s=now)
        due_s = schedule.next_due_s()
        assert due_s is not None
        now = due_s

    later = [asked_in[second] for second in range(1, 199)]
    assert max(later) < 280
    assert sum(later) / len(later) == pytest.approx(200, rel=0.02)


def test_old_due_times_do_not_gather() -> None:
    """A busy entry that is claimed again and again leaves a bounded number of times behind."""
    schedule = Schedule(10, poll_s=1_000)
    a = entry_of("a")
    a.phase = 0.5  # its poll is not what is due next at the end
    for number in range(20_000):
        schedule.wake(a, 0, number)
        [(_, asked)] = served(schedule)
        schedule.took(a, asked, 0, more=False, next_s=30, now_s=number)

    assert len(schedule._dues) <= 2_000
    assert schedule.next_due_s() == 19_999 + 30


def test_what_failed_stands_back_and_gives_its_slots_back() -> None:
    """A failed claim is tried again after its pause, or when somebody wakes it."""
    schedule = Schedule(10, poll_s=1)
    a = entry_of("a")
    schedule.wake(a, 0, 0)
    [(_, asked)] = served(schedule)
    schedule.failed(a, asked, pause_s=0.5, now_s=0)

    assert (schedule.free, a.room.in_flight) == (10, 0)
    assert served(schedule) == []
    schedule.advance(0.5)
    assert served(schedule) == [("a", 10)]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 12), st.booleans()), max_size=60))
def test_slots_add_up(steps: list[tuple[int, int, bool]]) -> None:
    """Whatever happens, free slots and rows in flight are all slots, and no share is passed."""
    schedule = Schedule(20, poll_s=1)
    rooms = [Room(7), Room(30)]
    entries = [entry_of(str(i), room=rooms[i % 2], turn=5) for i in range(5)]
    held: Counter[int] = Counter()
    for which, amount, more in steps:
        schedule.wake(entries[which], 0, 0)
        if (taken := schedule.take()) is not None:
            entry, asked = taken
            got = min(amount, asked)
            schedule.took(entry, asked, got, more=more, next_s=None, now_s=0)
            held[entries.index(entry)] += got
        done = min(held[which], amount // 2)
        schedule.freed(entries[which], done)
        held[which] -= done
        assert schedule.free == 20 - held.total() >= 0
        assert [room.in_flight <= room.most for room in rooms] == [True, True]
        assert sum(room.in_flight for room in rooms) == held.total()


@pytest.mark.parametrize(
    ("attempt", "base", "most", "delay"),
    [
        (1, 5, 20, 5),  # the spec's: now 10 -> 15, 20, 30
        (2, 5, 20, 10),
        (4, 5, 20, 20),
        (3, 5, 20, 20),
        (0, 5, 20, 5),
        (1, 1_000, 30_000, 1_000),
        (5, 1_000, 30_000, 16_000),
        (6, 1_000, 30_000, 30_000),
        (1_000_000, 1_000, 30_000, 30_000),
        (1_000_000, 1, 10**15, 2**31),
        (9, 0, 0, 0),
    ],
)
def test_backoff(attempt: int, base: int, most: int, delay: int) -> None:
    """min(base * 2^min(attempt - 1, 31), most), the first attempt being 1."""
    assert backoff_ms(attempt, base, most) == delay


@given(st.integers(0, 10**9))
def test_jitter_is_between_half_and_all(delay_ms: int) -> None:
    """A delay is never shortened by more than half, and never made longer."""
    assert delay_ms // 2 <= jittered_ms(delay_ms) <= delay_ms
