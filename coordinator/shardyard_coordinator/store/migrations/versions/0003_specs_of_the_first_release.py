"""Specs as the first release writes them: lengths belong to the tasks, columns are a map from roles.

The stored messages are rewritten field by field, without the generated code: that knows the new form only, and a
migration must stay what it is.
"""

from collections.abc import Callable, Iterator

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_AT_ONCE = 500
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MODEL, _DATASET = 1, 2

Field = tuple[int, int, bytes]
"""Number, wire type, and the value as it is written (of `_BYTES`: without its length)."""


def upgrade() -> None:
    """Rewrites spec, resolved spec and plan of every job; plans that were kept for later are forgotten."""
    connection = op.get_bind()
    job = sa.table("job", *(sa.column(name) for name in ("id", "spec", "resolved_spec", "plan")))
    last = 0
    while rows := connection.execute(sa.select(job).where(job.c.id > last).order_by(job.c.id).limit(_AT_ONCE)).all():
        for row in rows:
            values = {
                "spec": _new(row.spec, _spec),
                "resolved_spec": _new(row.resolved_spec, _spec),
                "plan": _new(row.plan, _plan),
            }
            connection.execute(sa.update(job).where(job.c.id == row.id).values(**values))
        last = rows[-1].id
    connection.execute(sa.text("DELETE FROM plan"))


def _new(data: bytes | None, change: Callable[[list[Field]], list[Field]]) -> bytes | None:
    return data if data is None else _written(change(list(_fields(bytes(data)))))


def _plan(plan: list[Field]) -> list[Field]:
    found = [(number, kind, _spec_bytes(value) if number == 1 else value) for number, kind, value in plan]
    specs = [value for number, _, value in plan if number == 1]
    makes_data = any(number == 3 for spec in specs for number, _, _ in _fields(spec))
    return [*found, (19, _VARINT, _varint(_DATASET if makes_data else _MODEL))]


def _spec_bytes(spec: bytes) -> bytes:
    return _written(_spec(list(_fields(spec))))


def _spec(spec: list[Field]) -> list[Field]:
    # Training and evaluation data name the same label columns.
    named = [name for number, _, value in spec if number in {12, 13} for name in _columns(value).get(4, [])]
    labels: list[Field] = [(7, _BYTES, name) for name in dict.fromkeys(named)]
    changes: dict[int, Callable[[bytes], bytes]] = {
        # The length of a sequence: field 1 of causal_lm, 3 of masked_lm.
        1: lambda value: _into_task(value, {1: 1, 2: 3}, []),
        2: lambda value: _into_task(value, {1: 8}, labels),
        3: lambda value: _written([(n, k, _data(v) if n == 1 else v) for n, k, v in _fields(value)]),
        12: _data,
        13: _data,
    }
    return [(number, kind, changes[number](value) if number in changes else value) for number, kind, value in spec]


def _into_task(family: bytes, places: dict[int, int], more: list[Field]) -> bytes:
    """A family of tasks whose length, field 10, goes into its task's own message."""
    fields = list(_fields(family))
    lengths = [value for number, _, value in fields if number == 10]
    return _written(
        [
            (number, kind, _written([*_fields(value), *((places[number], _VARINT, each) for each in lengths), *more]))
            for number, kind, value in fields
            if number in places
        ]
        + [each for each in fields if each[0] != 10 and each[0] not in places]
    )


def _data(source: bytes) -> bytes:
    """A data source whose columns, field 12, become entries of a map, field 16."""
    columns = _columns(source)
    found = [each for each in _fields(source) if each[0] != 12]
    for number, role in ((1, b"text"), (2, b"text_pair"), (3, b"label")):
        for name in columns.get(number, []):
            if name:
                found.append((16, _BYTES, _written([(1, _BYTES, role), (2, _BYTES, name)])))
    return _written(found)


def _columns(source: bytes) -> dict[int, list[bytes]]:
    found: dict[int, list[bytes]] = {}
    for number, _, value in _fields(source):
        if number == 12:
            for part, _, name in _fields(value):
                found.setdefault(part, []).append(name)
    return found


def _fields(data: bytes) -> Iterator[Field]:
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            _, end = _read_varint(data, at)
        elif kind == _BYTES:
            size, at = _read_varint(data, at)
            end = at + size
        else:
            end = at + {_FIXED64: 8, _FIXED32: 4}[kind]
        yield number, kind, data[at:end]
        at = end


def _written(fields: list[Field]) -> bytes:
    out = bytearray()
    for number, kind, value in fields:
        out += _varint(number << 3 | kind)
        if kind == _BYTES:
            out += _varint(len(value))
        out += value
    return bytes(out)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
