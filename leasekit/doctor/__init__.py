"""What must hold in a tenant's data, and a sweep that finds where it does not. It writes nothing.

A sweep goes page by page while others write, so a page may be blurred: a row can be claimed between
two reads. Therefore a page only raises suspicion. Each suspect is looked at again, alone and at one
moment (`Backend.look`), and judged by the same pure function; what is still wrong then is damage.

    finding   what is found, and what is safe then    pages   a tenant, read page by page
    sweeping  all of a tenant                         outbox, lease, idempotency, gate

The judges (`judge_...`) are pure functions over what a look found.

Source: lua/PROTOCOL.md, "Keys", "Outbox" and "Gate"; tests/lua/commands.py, `invariants`.
"""

from leasekit.doctor.finding import ADVICE, Finding, Problem
from leasekit.doctor.gate import (
    IntentLook,
    IntentState,
    judge_dataset,
    judge_intent,
    judge_run_entry,
    read_intent_state,
)
from leasekit.doctor.idempotency import judge_record
from leasekit.doctor.lease import judge_lease
from leasekit.doctor.outbox import (
    RowLook,
    judge_claim,
    judge_dedupe,
    judge_named_row,
    judge_row,
    judge_tally,
    read_state,
)
from leasekit.doctor.sweeping import scan_keys, sweep

__all__ = [
    "ADVICE",
    "Finding",
    "IntentLook",
    "IntentState",
    "Problem",
    "RowLook",
    "judge_claim",
    "judge_dataset",
    "judge_dedupe",
    "judge_intent",
    "judge_lease",
    "judge_named_row",
    "judge_record",
    "judge_row",
    "judge_run_entry",
    "judge_tally",
    "read_intent_state",
    "read_state",
    "scan_keys",
    "sweep",
]
