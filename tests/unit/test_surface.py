"""What users see: names, docstrings, and records that show no secrets."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import leasekit
from leasekit import errors, gate, model
from leasekit.client import Leasekit, Tenant
from leasekit.gate import (
    Fact,
    Gate,
    GuardedTool,
    Intent,
    IntentStatus,
    LedgerEvent,
    Permit,
    PreSendEvent,
    Question,
    Receipt,
    Source,
    applied,
    undecidable,
)
from leasekit.idempotency import Idempotency
from leasekit.lease import Acquisition, Lease, Leases
from leasekit.outbox import Claim, ClaimedRows, Outbox

PACKAGES = ("", "gate.")
MODULES = sorted(
    prefix + one.name
    for prefix in PACKAGES
    for one in pkgutil.iter_modules([str(Path(leasekit.__path__[0], prefix.rstrip(".")))])
    if not one.ispkg or one.name == "gate"
)
FACES = [
    *(Leasekit, Tenant, Outbox, Claim, ClaimedRows, Leases, Lease, Acquisition, Idempotency),
    *(Gate, Permit, GuardedTool),
]


# What only reads; rounds of questions, each under a token of its own; and what is the same said twice.
NOT_REPEATED = ("get", "list", "counts", "purge", "unknown", "reconcile", "open")


def public(face: type) -> Iterator[tuple[str, Any]]:
    """The methods and properties of a class that users may use."""
    for name, member in vars(face).items():
        if not name.startswith("_") and (callable(member) or isinstance(member, property)):
            yield name, member
        elif isinstance(member, staticmethod):
            yield name, member.__func__


def test_the_package_offers_what_it_names() -> None:
    """Everything in __all__ is there, and nothing that it takes from its modules is left out."""
    assert all(hasattr(leasekit, name) for name in leasekit.__all__)
    tree = ast.parse(Path(inspect.getfile(leasekit)).read_text(encoding="utf-8"))
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("leasekit.")
        for alias in node.names
    }
    assert imported == set(leasekit.__all__)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_offers_what_it_names(name: str) -> None:
    """__all__ of each module is true, and its docstring says what it is for."""
    module = importlib.import_module(f"leasekit.{name}")
    assert all(one in vars(module) for one in module.__all__)
    assert len(set(module.__all__)) == len(module.__all__)
    assert module.__doc__


@pytest.mark.parametrize("face", FACES, ids=lambda face: face.__name__)
def test_everything_public_is_explained(face: type) -> None:
    """Each class, method and property that users meet has a docstring of its own."""
    assert face.__doc__
    for name, member in public(face):
        assert inspect.getdoc(member), f"{face.__name__}.{name}"


@pytest.mark.parametrize(
    "face", [Outbox, Leases, Idempotency, Gate], ids=lambda face: face.__name__
)
def test_calls_have_one_form(face: type) -> None:
    """What is not named in the call's first words is keyword-only; who can be repeated says so; and
    every call can be given the time."""
    for name, member in public(face):
        if not inspect.iscoroutinefunction(member) or name in ("once", "run"):  # loops of their own
            continue
        parameters = inspect.signature(member).parameters
        assert parameters["now_ms"].kind is inspect.Parameter.KEYWORD_ONLY, name
        assert parameters["now_ms"].default is None, name
        if name not in NOT_REPEATED:
            assert parameters["repeat"].default is False, name
            assert parameters["durability"].default is None, name
        optional = [one for one in parameters.values() if one.default is not one.empty]
        assert all(one.kind is inspect.Parameter.KEYWORD_ONLY for one in optional), name


def test_every_error_says_what_is_safe() -> None:
    """One tree, and each docstring says what state things are in and what to do."""
    kinds = [getattr(errors, name) for name in errors.__all__]
    assert all(issubclass(kind, errors.LeasekitError) for kind in kinds)
    assert issubclass(errors.InvalidInput, ValueError)
    assert all(kind.__doc__ and ":" in kind.__doc__ for kind in kinds[:3])


def test_outcomes_are_words() -> None:
    """Lower-case words of the protocol, equal to their text."""
    enums = [
        one
        for home in (model, gate)
        for one in vars(home).values()
        if inspect.isclass(one) and one.__name__ in home.__all__
    ]
    words = [one for kind in enums if issubclass(kind, str) for one in kind]  # type: ignore[attr-defined]
    assert len(words) > 30
    assert all(word == str(word) == word.lower() and word.isidentifier() for word in words)


def test_no_face_shows_its_secrets() -> None:
    """Tokens are slots of the objects that hold them, and in none of their reprs."""
    token = "t" * 22
    row = model.Row(
        id="0" * 26,
        lane="l",
        target="t",
        payload={"secret": "s3cret"},
        status=model.RowStatus.CLAIMED,
        cause="claimed",
        attempt_count=1,
        claim_count=1,
        max_attempts=5,
        on_expiry="reclaim",
        created_at_ms=0,
        available_at_ms=0,
    )
    claim = Claim(None, row, token, 7, 10, 0.0, None)  # type: ignore[arg-type]
    lease = Lease("n", "o", token, 7, 0, 10, 0.0)
    acquisition = Acquisition(model.AcquireOutcome.ACQUIRED, lease, None)
    reservation = model.Reservation(
        model.ReserveOutcome.RESERVED,
        model.IdempotencyRecord(
            schema_version=1,
            record_id="idem_x",
            tenant_context=model.TenantContext("o", "w"),
            operation="op",
            key="k",
            owner="o",
            request_fingerprint="f",
            status=model.IdempotencyStatus.RESERVED,
            first_seen_at_ms=0,
            last_seen_at_ms=0,
        ),
        token,
    )
    outcome = model.Outcome(outcome_kind="k", details={"secret": "s3cret"})
    draft = model.Draft(lane="l", target="t", payload={"secret": "s3cret"})
    for thing in (row, claim, lease, acquisition, reservation, outcome, draft, [claim]):
        assert token not in repr(thing) + str(thing)
        assert "s3cret" not in repr(thing) + str(thing), type(thing)
    assert "<Lease n held by o fence 7>" in repr(acquisition)
    lease.lost.set()
    assert repr(lease) == "<Lease n lost by o fence 7>"


def test_the_gate_shows_no_secrets() -> None:
    """Neither tokens, nor what a call carries, brought back or failed with."""
    token, secret = "t" * 22, "s3cret"
    source = Source(kind="k")
    call = PreSendEvent(
        dispatch_id="d", tool="t", source=source, args={"body": secret}, payload_digest=secret
    )
    event = LedgerEvent(
        tool="t",
        source=source,
        policy_outcome="allowed",
        status="failed",
        dispatch_id="d",
        error=secret,
        approval_requirement={"why": secret},
    )
    receipt = Receipt(
        outbox_id="o",
        idempotency_key="d",
        token=token,
        fence=7,
        attempts=1,
        granted_at_ms=0,
        lease_expires_at_ms=10,
        deadline_s=0.0,
    )
    fact = Fact(at_ms=1, kind="failed", fence=7, applied=True, error=secret, result=secret)
    intent = Intent(
        outbox_id="o",
        operation="t",
        status=IntentStatus.FAILED,
        created_at_ms=0,
        updated_at_ms=1,
        cause="failed",
        revision=2,
        metadata={"dispatch_error": secret},
        facts=(fact,),
    )
    permit = Permit(None, call, receipt)  # type: ignore[arg-type]
    question = Question(intent, "d", 8, 1, 10)
    things = (call, event, receipt, fact, intent, permit, question, applied(secret), [receipt])
    for thing in (*things, undecidable(secret)):
        assert token not in repr(thing) + str(thing), type(thing)
        assert secret not in repr(thing) + str(thing), type(thing)
    assert repr(permit) == "<Permit d fence 7>"
    assert repr(fact) == "<Fact failed at 1 fence 7>"


def test_what_a_gate_holds_to_can_be_written_down() -> None:
    """GatePolicy is compared and shown by value, and refuses what it does not know."""
    assert leasekit.GatePolicy() == leasekit.GatePolicy(lease_ms=300_000)
    for wrong in (
        {"on_expiry": "stop"},
        {"on_expiry_by_tier": {"external_send": "stop"}},
        {"lease_ms": 0},
        {"keep_ms": 3_599_999},
        {"durability": "most"},
    ):
        with pytest.raises(errors.InvalidInput):
            leasekit.GatePolicy(**wrong)  # type: ignore[arg-type]
