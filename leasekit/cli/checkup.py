"""What `leasekit doctor` looks at: the server's settings and health, and with --deep the data.

Each check is a pure function from what the server told to one line: ok, warn or fail, what was found,
and what to do. Only fails make the exit code 1.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

import msgspec

from leasekit import doctor, scripts
from leasekit.cli.reading import Document
from leasekit.client import Leasekit, Tenant
from leasekit.connect import Backend, ResponseError, ServerInfo
from leasekit.durability import FSYNC_SETTINGS, Durability
from leasekit.keys import Keys, tenant_parts

__all__ = ["Check", "check_data", "check_server", "look_for_unknown"]

DRIFT_SECONDS = 1.0
OFFSET_WARN_MS = 1_000
DRIFT_WARN_MS = 50
MEMORY_WARN = 0.8
MEMORY_FAIL = 0.95
TENANTS_A_PAGE = 1_000
TENANTS_NAMED = 5
FINDINGS_MAX = 1_000
UNKNOWN_WARN_MS = 86_400_000
TENANTS_A_LOOK = 100
INTENTS_A_PAGE = 500
INTENTS_LOOKED_AT = 10_000
TENANT_NEVER = "doctor.asks"  # only named when rights are asked for; nothing is written to it

Facts = Mapping[str, str]


class Check(msgspec.Struct, frozen=True):
    """One line: `level` is ok, warn or fail; `advice` is empty where there is nothing to do."""

    name: str
    level: str
    what: str
    advice: str = ""


# --- the server: pure functions of what it told ---------------------------------------------------


def check_version(info: ServerInfo) -> Check:
    text = f"{info.name} {'.'.join(map(str, info.version))} at {info.url}"
    if info.name == "memory":
        return Check("server", "warn", text, "for tests only: nothing is durable or shared")
    if not info.shebang:
        advice = "flags of scripts are not enforced and a full memory stops acks: prefer Redis 7"
        return Check("server", "warn", text, advice)
    return Check("server", "ok", text)


def check_eviction(facts: Facts) -> Check:
    policy = facts.get("maxmemory_policy", "unknown")
    evicted = int(facts.get("evicted_keys", "0"))
    if evicted:
        what = f"policy {policy}, and {evicted} keys were evicted since the server started"
        advice = "data is lost: CONFIG SET maxmemory-policy noeviction, then doctor --deep"
        return Check("eviction", "fail", what, advice)
    if policy != "noeviction":
        advice = (
            "CONFIG SET maxmemory-policy noeviction, and write it into the server's configuration: "
            "else rows and leases may vanish when its memory is full"
        )
        return Check("eviction", "fail", f"policy {policy}", advice)
    return Check("eviction", "ok", "policy noeviction")


def check_persistence(persistence: str, facts: Facts) -> Check:
    """Persistence, and what an acknowledged write survives by it."""
    broken = [
        name
        for name in ("aof_last_write_status", "rdb_last_bgsave_status", "aof_last_bgrewrite_status")
        if facts.get(name, "ok") != "ok"
    ]
    if broken:
        advice = "look at the server's log and disk; until then a crash loses what was written"
        return Check("persistence", "fail", f"{persistence}; failing: {', '.join(broken)}", advice)
    always = "acknowledged writes survive a power cut"
    some = "a power cut loses about the last second of acknowledged writes"
    set_always = "CONFIG SET appendfsync always where no acknowledged write may be lost"
    level, what, advice = {
        "aof:always": ("ok", always, ""),
        "aof:everysec": ("warn", some, set_always),
        "aof:no": ("warn", "a power cut loses what the system had not written yet", set_always),
        "rdb": ("warn", "a crash loses all since the last snapshot", "CONFIG SET appendonly yes"),
        "none": ("warn", "a restart loses everything", "CONFIG SET appendonly yes"),
        "memory": ("warn", "the end of this process loses everything", "use a real server"),
    }.get(persistence, ("warn", "the server does not tell", "allow this user +config|get"))
    return Check("persistence", level, f"{persistence}: {what}", advice)


def _replicas(facts: Facts) -> tuple[int, int]:
    """How many replicas are connected, and how many of them are online."""
    connected = int(facts.get("connected_slaves", "0"))
    links = [facts.get(f"slave{number}", "") for number in range(connected)]
    return connected, sum("state=online" in link.split(",") for link in links)


def check_replication(facts: Facts) -> Check:
    role = facts.get("role", "master")
    if role != "master":
        advice = "name the primary in the URL: a replica refuses writes"
        return Check("replication", "fail", f"this server is a {role}", advice)
    connected, online = _replicas(facts)
    what = f"a primary with {connected} replicas, {online} of them online"
    if online < connected:
        advice = "look at the log of the others: nothing reaches them until they have caught up"
        return Check("replication", "warn", what, advice)
    return Check("replication", "ok", what if connected else "no replicas")


def check_durability(
    who: str,
    durability: Durability,
    persistence: str,
    facts: Facts,
    settings: Mapping[str, str | None],
) -> Check:
    """What a class of durability gives here. settings: those of FSYNC_SETTINGS, None = not told."""
    name = f"durability of the {who}"
    connected, online = _replicas(facts)
    if durability.kind == "replicated":
        return _check_replicated(name, durability, connected, online)
    if durability.kind == "fsync":
        wrong = [key for key, wanted in FSYNC_SETTINGS.items() if settings.get(key) != wanted]
        if wrong:
            found = ", ".join(f"{key} {settings.get(key) or 'not told'}" for key in wrong)
            what = f"{durability}, which is not so: {found}"
            fix = "; ".join(f"CONFIG SET {key} {FSYNC_SETTINGS[key]}" for key in wrong)
            return Check(name, "fail", what, f"allow this user +config|get, or: {fix}")
        what = f"{durability}, verified: an answered write is on this server's disk"
    else:
        what = f"{durability}: an answered write is where this server keeps it ({persistence})"
    if not connected:
        return Check(name, "ok", what)
    what += f"; {connected} replicas follow behind, and a failover to one can lose it"
    advice = (
        f"durability='replicated({connected})' where no answered write may be lost by a failover"
    )
    return Check(name, "warn", what, advice)


def _check_replicated(name: str, durability: Durability, connected: int, online: int) -> Check:
    wanted = durability.replicas
    what = f"{durability}: an answered write has reached {wanted} of the {online} replicas online"
    if online < wanted:
        what = f"{durability}, and {online} replicas are online: every write is answered NotDurable"
        return Check(name, "fail", what, "bring the replicas back, or ask for fewer")
    if wanted < connected:
        what += "; a failover may promote one that lacks it"
        advice = f"replicated({connected}), or let only a replica be promoted that has most"
        return Check(name, "warn", what, advice)
    return Check(name, "ok", what)


def check_memory(facts: Facts) -> Check:
    used = int(facts.get("used_memory", "0"))
    most = int(facts.get("maxmemory", "0"))
    told = "of maxmemory"
    if not most:
        most, told = int(facts.get("total_system_memory", "0")), "of the machine's; no maxmemory"
    if not used or not most:
        return Check("memory", "ok", "the server does not tell")
    share = used / most
    what = f"{used / 2**20:.0f} MiB used, {share:.0%} {told} ({most / 2**20:.0f} MiB)"
    advice = (
        "finish or purge rows, keep fewer of them, or raise maxmemory: enqueues are refused soon"
    )
    if share >= MEMORY_FAIL:
        return Check("memory", "fail", what, advice)
    return (
        Check("memory", "warn", what, advice)
        if share >= MEMORY_WARN
        else Check("memory", "ok", what)
    )


def check_clock(offset_ms: float, drift_ms: float) -> Check:
    """Offset: server less local. Drift: how much that changed over DRIFT_SECONDS."""
    what = f"the server is {abs(offset_ms):.0f} ms {'ahead of' if offset_ms > 0 else 'behind'} here"
    what += f"; {abs(drift_ms):.0f} ms of drift in {DRIFT_SECONDS:g} s"
    if abs(drift_ms) > DRIFT_WARN_MS:
        advice = "a clock is being set, or steps: leases may end early; let one NTP daemon slew it"
        return Check("clock", "warn", what, advice)
    if abs(offset_ms) > OFFSET_WARN_MS:
        advice = "leases count on the server's clock alone; available_at_ms of yours is off by this"
        return Check("clock", "warn", what, advice)
    return Check("clock", "ok", what)


def check_scripts(loaded: Mapping[str, bool]) -> Check:
    missing = [name for name, is_there in loaded.items() if not is_there]
    if missing:
        what = f"{len(missing)} of {len(loaded)} are not loaded: {', '.join(missing[:5])}"
        advice = "allow this user script|load: clients load what is missing when they connect"
        return Check("scripts", "fail", what, advice)
    return Check("scripts", "ok", f"all {len(loaded)} loaded, each with this version's sha")


def check_errors(facts: Facts) -> Check:
    """Errors that no healthy client causes, since the server started or its statistics were reset."""
    found = {
        name.removeprefix("errorstat_"): value.removeprefix("count=")
        for name, value in facts.items()
        if name.startswith("errorstat_LK_") or name in ("errorstat_OOM", "errorstat_WRONGTYPE")
    }
    if not found:
        return Check("errors", "ok", "no LK_ error, WRONGTYPE or OOM in errorstats")
    what = ", ".join(f"{name} {count}" for name, count in sorted(found.items()))
    if any(name != "OOM" for name in found):
        advice = "a bug or damage: doctor --deep, and report it; CONFIG RESETSTAT starts anew"
        return Check("errors", "fail", what, advice)
    return Check("errors", "warn", what, "the memory was full: raise maxmemory or keep fewer rows")


def check_unknown(old: Mapping[str, int], buried: Mapping[str, int]) -> Check:
    """What nobody knows for longer than a day, and what nobody will be asked about again; by tenant."""
    told = []
    if old:
        told.append(f"{sum(old.values())} unknown for more than a day ({_by_tenant(old)})")
    if buried:
        told.append(
            f"{sum(buried.values())} that no destination could tell of ({_by_tenant(buried)})"
        )
    if told:
        advice = "leasekit unknown and intents --status dead_lettered list them; leasekit resolve"
        return Check("unknown", "warn", f"intents and parked rows: {'; '.join(told)}", advice)
    what = "no intent is unknown for more than a day, nor a parked row, as far as claims noted it"
    return Check("unknown", "ok", what)


def _by_tenant(counts: Mapping[str, int]) -> str:
    most = sorted(counts, key=lambda tag: (-counts[tag], tag))
    named = ", ".join(f"{_name(tag)} {counts[tag]}" for tag in most[:TENANTS_NAMED])
    return named + (", ..." if len(most) > TENANTS_NAMED else "")


def check_rights(refused: list[str] | None) -> Check:
    if refused is None:
        return Check(
            "rights", "ok", "this server does not tell; what was needed so far was allowed"
        )
    if refused:
        advice = "allow them in the user's ACL: connecting, repeats or writing need them"
        return Check("rights", "fail", f"this user may not: {', '.join(refused)}", advice)
    return Check("rights", "ok", "this user may do what leasekit does")


async def check_server(kit: Leasekit) -> list[Check]:
    """All checks of the server, in the order in which they are shown."""
    backend = kit.backend
    facts = await _facts(backend)
    settings = await _settings(backend)
    first_ms = await _offset_ms(kit)
    await asyncio.sleep(DRIFT_SECONDS)
    second_ms = await _offset_ms(kit)
    return [
        check_version(kit.server),
        *([check_eviction(facts)] if kit.server.name != "memory" else []),
        check_persistence(kit.server.persistence, facts),
        check_replication(facts),
        *(
            check_durability(who, durability, kit.server.persistence, facts, settings)
            for who, durability in (("client", kit.durability), ("gate", kit.gate_durability))
        ),
        check_memory(facts),
        check_clock(second_ms, second_ms - first_ms),
        check_scripts(await _loaded(backend)),
        check_errors(facts),
        check_rights(await _refused(kit)),
    ]


async def _facts(backend: Backend) -> dict[str, str]:
    facts: dict[str, str] = {}
    for section in ("everything", "errorstats"):
        reply = await backend.ask("INFO", section) or b""
        lines = reply.decode("utf-8", "replace").splitlines()
        facts |= dict(line.split(":", 1) for line in lines if ":" in line)
    return facts


async def _settings(backend: Backend) -> dict[str, str | None]:
    """The settings that `fsync` depends on, as they are now; None for what this user may not see."""
    found: dict[str, str | None] = {}
    for name in FSYNC_SETTINGS:
        reply = await backend.ask("CONFIG", "GET", name)
        value = reply.get(name.encode()) if isinstance(reply, dict) else None
        found[name] = value.decode() if value is not None else None
    return found


async def _offset_ms(kit: Leasekit) -> float:
    """Server's clock less the local one, taken at the middle of the question."""
    before_s = time.time()
    server_ms = await kit.now_ms()
    return server_ms - (before_s + time.time()) / 2 * 1_000


async def _loaded(backend: Backend) -> dict[str, bool]:
    names = list(scripts.read_scripts())
    found = await backend.ask(*scripts.exists_command(shebang=backend.info.shebang))
    answers = found or [0] * len(names)
    return {name: bool(is_there) for name, is_there in zip(names, answers, strict=True)}


def _needed(prefix: str, *, waits: bool) -> Sequence[tuple[str, ...]]:
    """The commands that leasekit cannot do without, as they would be sent; `waits`: for replicas."""
    keys, sha = Keys(prefix, TENANT_NEVER), next(iter(scripts.read_scripts().values())).sha
    return (
        ("evalsha", sha(shebang=True), "1", keys.fence),
        ("hset", keys.outbox_docs, "field", "value"),
        ("zadd", keys.outbox_done, "1", "member"),
        scripts.load_commands(shebang=True)[0],
        ("info",),
        ("time",),
        ("client", "id"),
        ("client", "kill", "id", "1"),
        *([("wait", "1", "1")] if waits else []),
    )


async def _refused(kit: Leasekit) -> list[str] | None:
    """The commands that the server would refuse this user; None where it cannot be asked."""
    backend = kit.backend
    user = await backend.ask("ACL", "WHOAMI")
    if user is None:
        return None
    refused = []
    waits = "replicated" in (kit.durability.kind, kit.gate_durability.kind)
    for command in _needed(kit.prefix, waits=waits):
        answer = await backend.ask("ACL", "DRYRUN", user, *command)
        if answer is None:
            return None
        if answer != b"OK":
            refused.append(command[0].lower())
    return refused


# --- the data -------------------------------------------------------------------------------------


async def check_data(
    kit: Leasekit, tenant: Tenant | None, progress: Callable[[int], None]
) -> AsyncIterator[Check]:
    """The registry against the keys that there are, then each tenant's sweep, finding by finding."""
    found = await doctor.scan_keys(kit.backend, kit.prefix, tenant.tag if tenant else None)
    if tenant is None:
        # Read after the keys: a tenant is registered before its first key is written.
        registered = await _registered(kit)
        for check in check_registry(registered, await _with_data(kit, registered, set(found))):
            yield check
    for tag in sorted([tenant.tag] if tenant else found):
        count = 0
        name = _name(tag)
        async for finding in doctor.sweep(
            kit.backend, kit.prefix, tag, keys_found=found.get(tag, set()), on_progress=progress
        ):
            count += 1
            if count > FINDINGS_MAX:
                what = f"more than {FINDINGS_MAX} findings: the rest was not looked for"
                yield Check(f"data of {name}", "fail", what, "restore this tenant from a backup")
                break
            where = f"{finding.key} {finding.id}" if finding.id else finding.key
            what = f"{finding.kind} at {where}: {finding.what}"
            yield Check(f"data of {name}", "fail", what, finding.advice)
        if not count:
            yield Check(f"data of {name}", "ok", "every row, list, count and lease agrees")


async def look_for_unknown(kit: Leasekit, tenant: Tenant | None) -> Check:
    """`check_unknown` of one tenant, or of all that are registered."""
    try:
        return check_unknown(*await _count_unknown(kit, tenant))
    except ResponseError as error:
        what = f"what is unknown cannot be counted: the server answers {str(error).split()[0]}"
        return Check("unknown", "fail", what, "doctor --deep says which keys are damaged")


async def _count_unknown(
    kit: Leasekit, tenant: Tenant | None
) -> tuple[dict[str, int], dict[str, int]]:
    """By tenant, what is unknown for more than a day, and what is buried as undecidable.

    Reads no intent that is known.
    """
    before_ms = await kit.now_ms() - UNKNOWN_WARN_MS
    tags = [tenant.tag] if tenant else sorted(await _registered(kit))
    old: dict[str, int] = {}
    buried: dict[str, int] = {}
    for start in range(0, len(tags), TENANTS_A_LOOK):
        some = tags[start : start + TENANTS_A_LOOK]
        named = [Keys(kit.prefix, tag) for tag in some]
        counts = await kit.backend.look(
            *[("ZCOUNT", keys.gate_expiring, "-inf", before_ms) for keys in named],
            *[("ZCOUNT", keys.outbox_unknown, "-inf", before_ms) for keys in named],
            *[("ZCARD", keys.gate_unknown) for keys in named],
            *[("ZCARD", keys.gate_dead) for keys in named],
        )
        for i, (tag, keys) in enumerate(zip(some, named, strict=True)):
            ended, rows, unknown, dead = [int(count) for count in counts[i :: len(some)]]
            if unknown:
                # The list stands in the order of its questions: how old one is says its state line.
                ended += await _count_states(
                    kit, keys, keys.gate_unknown, lambda state: state.lease_end_ms <= before_ms
                )
            if ended + rows:
                old[tag] = ended + rows
            if dead and (
                count := await _count_states(
                    kit, keys, keys.gate_dead, lambda state: state.cause == "undecidable"
                )
            ):
                buried[tag] = count
    return old, buried


async def _count_states(
    kit: Leasekit, keys: Keys, members: str, is_meant: Callable[[doctor.IntentState], bool]
) -> int:
    """How many intents of a list are meant, of its first INTENTS_LOOKED_AT."""
    count = 0
    for start in range(0, INTENTS_LOOKED_AT, INTENTS_A_PAGE):
        ids = await kit.backend.command("ZRANGE", members, start, start + INTENTS_A_PAGE - 1)
        if not ids:
            break
        for line in await kit.backend.command("HMGET", keys.gate_state, *ids):
            state = None if line is None else doctor.read_intent_state(line)
            count += state is not None and is_meant(state)
    return count


async def _with_data(kit: Leasekit, registered: set[str], stored: set[str]) -> set[str]:
    """The tenants that have keys; those that got some since the keys were scanned included."""
    late = set()
    for tag in registered - stored:
        keys = Keys(kit.prefix, tag)
        if await kit.backend.command("EXISTS", keys.outbox_docs, keys.lease_docs, keys.fence):
            late.add(tag)
    return stored | late


async def _registered(kit: Leasekit) -> set[str]:
    tags: set[str] = set()
    cursor: str | None = None
    while True:
        page = await kit.tenants(cursor, limit=TENANTS_A_PAGE)
        tags.update(tenant.tag for tenant in page.items)
        cursor = page.next_cursor
        if cursor is None:
            return tags


def check_registry(registered: set[str], stored: set[str]) -> list[Check]:
    """Tenants that the registry names against tenants that have keys."""
    checks = []
    if gone := sorted(registered - stored):
        what = f"{len(gone)} registered tenants have no data: {_names(gone)}"
        advice = "normal where everything was forgotten; else their data is lost"
        checks.append(Check("registry", "warn", what, advice))
    if unknown := sorted(stored - registered):
        what = f"{len(unknown)} tenants have data and are not registered: {_names(unknown)}"
        advice = "lists of tenants leave them out; the next write of a client registers them"
        checks.append(Check("registry", "fail", what, advice))
    return checks or [Check("registry", "ok", f"{len(stored)} tenants, each of them registered")]


def _names(tags: list[str]) -> str:
    named = ", ".join(_name(tag) for tag in tags[:TENANTS_NAMED])
    return named + (", ..." if len(tags) > TENANTS_NAMED else "")


def _name(tag: str) -> str:
    try:
        parts = tenant_parts(tag)
    except ValueError:
        return tag
    return "/".join(part for part in parts if part is not None)


def as_document(kit: Leasekit, checks: list[Check]) -> Document:
    return {
        "server": kit.server.url,
        "healthy": all(check.level != "fail" for check in checks),
        "checks": [msgspec.to_builtins(check) for check in checks],
    }
