"""The barest scripts that this layout allows, and leasekit's own, both as commands by hand.

Barest: docs, state and due, no check but the token's; no fence, duplicates, tallies, lanes, hints,
repeats, limits or kept rows. They are the floor that the server time of leasekit is compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rig import ByHand

import leasekit
from leasekit import outbox as outbox_module
from leasekit import scripts
from leasekit.keys import route_of

LANE, TARGET, CONSUMER = "bench", "destination", "dispatcher-1"
LEASE_MS = 60_000
PAYLOAD = {"body": "x" * 189}
PAYLOAD_JSON = b'{"body":"' + b"x" * 189 + b'"}'  # 200 bytes

_CLOCK = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local now_text = string.format('%.0f', now)
"""

_ENQUEUE = (
    _CLOCK
    + """
local docs, due = {}, {}
for i = 1, #ARGV, 2 do
  docs[i], docs[i + 1] = ARGV[i], ARGV[i + 1]
  due[i], due[i + 1] = now_text, ARGV[i]
end
redis.call('HSET', KEYS[1], unpack(docs))
redis.call('ZADD', KEYS[2], 'NX', unpack(due))
return #ARGV / 2
"""
)

_CLAIM = (
    _CLOCK
    + """
local lease_end = string.format('%.0f', now + 60000)
local ids = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now_text, 'LIMIT', '0', ARGV[1])
if #ids == 0 then
  return {}
end
local docs = redis.call('HMGET', KEYS[1], unpack(ids))
local lines = redis.call('HMGET', KEYS[3], unpack(ids))
local due, state, reply = {}, {}, {}
for i = 1, #ids do
  local attempt = 1
  if lines[i] then
    attempt = tonumber(string.match(lines[i], '^(%d+)')) + 1
  end
  local j = 2 * i
  due[j - 1], due[j] = lease_end, ids[i]
  state[j - 1], state[j] = ids[i], attempt .. ':' .. ARGV[2]
  reply[i] = { ids[i], docs[i], attempt }
end
redis.call('ZADD', KEYS[2], unpack(due))
redis.call('HSET', KEYS[3], unpack(state))
return reply
"""
)

_ACK = """
local token, ids, held = ARGV[1], {}, {}
for i = 2, #ARGV do
  ids[i - 1] = ARGV[i]
end
local lines = redis.call('HMGET', KEYS[3], unpack(ids))
for i = 1, #ids do
  if lines[i] and string.match(lines[i], ':(.*)$') == token then
    held[#held + 1] = ids[i]
  end
end
if #held > 0 then
  redis.call('ZREM', KEYS[2], unpack(held))
  redis.call('HDEL', KEYS[1], unpack(held))
  redis.call('HDEL', KEYS[3], unpack(held))
end
return #held
"""


class Barest:
    """Commands of the barest scripts for one tenant."""

    def __init__(self, shas: Sequence[str], tenant: str) -> None:
        docs, due, state = (f"bare:{{{tenant}}}:{noun}" for noun in ("docs", "due", "state"))
        self._enqueue = ("EVALSHA", shas[0], 2, docs, due)
        self._claim = ("EVALSHA", shas[1], 3, docs, due, state)
        self._ack = ("EVALSHA", shas[2], 3, docs, due, state)

    @classmethod
    async def open(cls, by_hand: ByHand, tenant: str) -> Barest:
        loads = [("SCRIPT", "LOAD", text) for text in (_ENQUEUE, _CLAIM, _ACK)]
        return cls([sha.decode() for sha in await by_hand.many(loads)], tenant)

    def enqueue(self, ids: Sequence[str]) -> tuple[Any, ...]:
        return (*self._enqueue, *[field for id in ids for field in (id, PAYLOAD_JSON)])

    def claim(self, token: str, limit: int) -> tuple[Any, ...]:
        return (*self._claim, limit, token)

    def claimed(self, reply: Any) -> list[bytes]:
        return [row[0] for row in reply]

    def ack(self, ids: Sequence[bytes], token: str) -> tuple[Any, ...]:
        return (*self._ack, token, *ids)


class Ours:
    """leasekit's own commands for one tenant, with the keys and arguments that the client gives them."""

    def __init__(self, tenant: leasekit.Tenant) -> None:
        outbox = tenant.outbox
        self._shebang = outbox._scope.shared.backend.info.shebang
        self._route = route_of(LANE, TARGET)
        self._draft = f"0 5 reclaim {self._route} ~ ~\n".encode() + PAYLOAD_JSON
        self._bound = {
            one.name: outbox._bind(one, (self._route, "", LEASE_MS), False)
            for one in (outbox_module._ENQUEUE, outbox_module._CLAIM, outbox_module._ACK)
        }

    def _call(self, one: scripts.Script, items: Sequence[Any]) -> tuple[Any, ...]:
        return scripts.call_command(one, self._bound[one.name], items, shebang=self._shebang)

    def enqueue(self, ids: Sequence[str]) -> tuple[Any, ...]:
        items = [field for id in ids for field in (id, self._draft, 0, "")]
        return self._call(outbox_module._ENQUEUE, items)

    def claim(self, token: str, limit: int) -> tuple[Any, ...]:
        return self._call(outbox_module._CLAIM, (token, limit, CONSUMER))

    def claimed(self, reply: Any) -> list[bytes]:
        item = reply[outbox_module._CLAIM_HEAD]
        ids: list[bytes] = item[3 :: outbox_module._ROW_WIDTH]
        return ids

    def ack(self, ids: Sequence[bytes], token: str) -> tuple[Any, ...]:
        return self._call(outbox_module._ACK, [field for id in ids for field in (id, token)])
