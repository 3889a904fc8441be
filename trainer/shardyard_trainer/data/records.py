"""Rows of any task: for each role the cell of its column, found by mapping, by the role's name, or by an alias.

Texts with labels have rules of their own (`columns`): there a column may also be found as the only candidate.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from shardyard.v1 import spec_pb2
from shardyard_trainer.data.bad_rows import BadRows
from shardyard_trainer.data.errors import DataError, listed, nearest, raise_all, shorten
from shardyard_trainer.data.readers import Layout, Table, layout_hint, open_table
from shardyard_trainer.data.sources import DataFile
from shardyard_trainer.reading import about, reading

Made = TypeVar("Made")


_NUMBERS_OF_ROWS = frozenset({"id", "_id", "idx", "index", "uid", "uuid", "row_id", "unnamed: 0", "__index_level_0__"})
"""Columns that nobody expects to be learnt: nothing is said of them."""


@dataclass(frozen=True)
class Role:
    """A role of columns: its name in a spec, and other names of such columns, matched in any case."""

    name: str
    aliases: tuple[str, ...] = ()
    is_optional: bool = False
    is_time: bool = False
    """Whether its column may hold points in time."""
    languages: tuple[str, ...] = ()
    """Languages whose column may also name a region (`zh-CN`), if no column has another of the role's names."""
    refusal: str = ""
    """Why a file with such a column is not read in this layout; `columns` may say that it is, by its other roles."""
    unless: tuple[str, ...] = ()
    """Roles of the layout beside which such a column is passed over."""


@dataclass(frozen=True)
class Record:
    """One row: file and line, the cell of each role that has a column, class names for numbers, and the columns."""

    file: str
    line: int
    cells: Mapping[str, Any]
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    """The column of each role."""
    unread: tuple[str, ...] = ()
    """The other columns of its file."""

    def also(self, role: str) -> str:
        """The name that a role's column has in the file, to follow a message; empty if that is the role's own."""
        name = self.columns.get(role, role)
        return "" if name.casefold() == role else f" (the {role} is the column {shorten(name)!r})"


def read_records(
    files: Sequence[DataFile],
    source: spec_pb2.DataSource,
    layouts: Sequence[Sequence[Role]],
    *,
    field: str,
    bad: BadRows | None = None,
    has_pictures: bool = False,
    only_one: bool = False,
) -> Iterator[Record]:
    """The rows of all files, in order. A file has the columns of the first of `layouts` that it has all roles of.

    With `only_one`, a file that has those of several is refused, unless the mapped roles are of one alone.
    Rows that cannot be read go to `bad`, if the caller has one and finishes it. Raises DataError for `field`, for
    too many of them, and for a file that has none of the layouts, or two columns for one role.
    """
    own, num_rows = bad or BadRows(source), 0
    for file in files:
        about(field, "DATA_INVALID")
        reading(file.name)
        try:
            for record in _file_records(file, source, layouts, own, has_pictures=has_pictures, only_one=only_one):
                num_rows += 1
                yield record
        except DataError as error:
            found = [each.at(_place(field, each, layouts)) for each in error.all() if isinstance(each, DataError)]
            found[0].others = tuple(found[1:])
            raise found[0] from None
    if bad is None:
        own.finish(num_rows, field)


class RowFault(ValueError):
    """What is wrong with a row; `column` is the role of the cell to correct, empty if it is not one alone."""

    def __init__(self, column: str, message: str) -> None:
        super().__init__(message)
        self.column = column


def read_as(
    make: Callable[[Record], Made],
    files: Sequence[DataFile],
    source: spec_pb2.DataSource,
    layouts: Sequence[Sequence[Role]],
    *,
    field: str,
    bad: BadRows | None = None,
    only_one: bool = False,
) -> Iterator[Made]:
    """What `make` makes of each row of `read_records`; a row for which it raises ValueError is a bad one."""
    own, num_rows = bad or BadRows(source), 0
    for record in read_records(files, source, layouts, field=field, bad=own, only_one=only_one):
        try:
            made = make(record)
        except ValueError as error:
            column = error.column if isinstance(error, RowFault) else ""
            message = f"{error}{record.also(column)}"
            own.skip(DataError(message, file=record.file, line=record.line, column=column, field=field))
            continue
        num_rows += 1
        yield made
    if bad is None:
        own.finish(num_rows, field)


def _place(field: str, error: DataError, layouts: Sequence[Sequence[Role]]) -> str:
    roles = {role.name for layout in layouts for role in layout}
    return f"{field}.columns" if error.column in roles else field


def _file_records(
    file: DataFile,
    source: spec_pb2.DataSource,
    layouts: Sequence[Sequence[Role]],
    bad: BadRows,
    *,
    has_pictures: bool,
    only_one: bool,
) -> Iterator[Record]:
    names = [name for layout in layouts for role in layout for name in (role.name, *role.aliases)]
    spelled = {way for name in names for way in (name, name.capitalize(), name.title(), name.upper())}
    of_time = {role.name: (role.name, *role.aliases) for layout in layouts for role in layout if role.is_time}
    times = [name for role, known in of_time.items() for name in (source.columns.get(role, ""), *known)]
    layout = Layout.of(source, spelled, has_records=True, times=times, bad=bad)
    table = open_table(file, replace(layout, has_pictures=has_pictures))
    if only_one:
        layouts = _only_fitting(table, source.columns, layouts)
    chosen = _choose(table, source.columns, layouts)
    roles = list(chosen)
    class_names = {role: table.class_names[name] for role, name in chosen.items() if name in table.class_names}
    others = (name for name in (*table.columns, *table.left_out) if name not in chosen.values())
    unread = tuple(name for name in others if name.casefold() not in _NUMBERS_OF_ROWS)
    num_rows = 0
    for line, cells in table.rows([table.index(chosen[role]) for role in roles]):
        num_rows += 1
        yield Record(file.name, line, dict(zip(roles, cells, strict=True)), class_names, chosen, unread)
    for name in unread:
        bad.pass_over(f"column {shorten(name)!r}", num_rows)


def _choose(table: Table, mapping: Mapping[str, str], layouts: Sequence[Sequence[Role]]) -> dict[str, str]:
    """The column of each role of the layout that the file has. Each mapped role must be one of the layout's."""
    _check_mapped(table, mapping)
    # A role of none of the layouts is one that the task can do without.
    mapped = set(mapping) & {role.name for layout in layouts for role in layout}
    having = [layout for layout in layouts if mapped <= {role.name for role in layout}]
    for layout in having:
        columns = {role: _column_of(table, mapping, role) for role in layout}
        if all(column or role.is_optional for role, column in columns.items()):
            found = {role.name: column for role, column in columns.items() if column and not role.refusal}
            _refuse_unread(table, mapping, layout, found)
            for role, name in found.items():
                if (times := table.columns.count(name)) > 1:
                    message = f"{times} columns are called {shorten(name)!r}; rename one"
                    raise DataError(message, file=table.file.name, column=role, value=name)
            return found
    _refuse_alone(table, mapping, mapped, [layout for layout in layouts if layout not in having])
    ways = [" and ".join(f"`{role.name}`" for role in layout if not role.is_optional) for layout in layouts]
    wanted = " or ".join(dict.fromkeys(ways))
    missing = _missing(table, mapping, having or layouts)
    raise DataError(
        f"no columns {wanted}; there are: {listed(table.columns)}; map them in columns, as "
        f"{', '.join(f'{name}: NAME' for name in missing)}{layout_hint(table)}{_text_hint(table)}",
        file=table.file.name,
        column=missing[0],
    )


def _missing(table: Table, mapping: Mapping[str, str], layouts: Sequence[Sequence[Role]]) -> list[str]:
    """The roles that the file lacks of the layout that it is nearest to: most roles, and no more than its columns."""
    ways = []
    for layout in layouts:
        wanted = [role for role in layout if not role.is_optional]
        lacking = [role.name for role in wanted if not _names_of(table, mapping, role)]
        num_found = len(wanted) - len(lacking)
        num_free = len(table.columns) - num_found
        ways.append((-num_found, abs(num_free - len(lacking)), lacking))
    return min(ways, key=lambda way: way[:2])[2]


def _refuse_unread(table: Table, mapping: Mapping[str, str], layout: Sequence[Role], found: Mapping[str, str]) -> None:
    """Raises DataError for a column that says otherwise, unless `columns` names all that the layout needs."""
    needed = [role.name for role in layout if not role.is_optional]
    if set(needed) <= set(mapping):
        return
    for role in layout:
        if role.refusal and not set(role.unless) & set(found) and (names := _names_of(table, mapping, role)):
            own = ", ".join(f"{name}: {found[name]}" for name in needed)
            raise DataError(
                f"the column {shorten(names[0])!r} is not read beside {' and '.join(needed)}: {role.refusal}, or, if "
                f"it says nothing of the kind, set columns to {own}",
                file=table.file.name,
                column=needed[0],
            )


def _refuse_alone(
    table: Table, mapping: Mapping[str, str], mapped: set[str], layouts: Sequence[Sequence[Role]]
) -> None:
    """Raises DataError if the file has one of these layouts, which have not all of the `mapped` roles."""
    for layout in layouts:
        needed = [role for role in layout if not role.is_optional]
        if _num_found(table, mapping, layout) == len(needed):
            names = " and ".join(f"`{_names_of(table, mapping, role)[0]}`" for role in needed)
            alone = min(mapped - {role.name for role in layout})
            message = f"{alone} is not read beside {names}; leave it out of columns"
            raise DataError(message, file=table.file.name, column=alone, value=mapping[alone])


def _num_found(table: Table, mapping: Mapping[str, str], layout: Sequence[Role]) -> int:
    """How many of the roles that a layout needs have a column."""
    return sum(1 for role in layout if not role.is_optional and _names_of(table, mapping, role))


def _only_fitting(
    table: Table, mapping: Mapping[str, str], layouts: Sequence[Sequence[Role]]
) -> Sequence[Sequence[Role]]:
    """The layouts that the mapped roles leave, if the file has the columns of one of them at most."""
    left = [layout for layout in layouts if set(mapping) <= {role.name for role in layout}] or layouts
    fitting = [layout for layout in left if all(role.is_optional or _names_of(table, mapping, role) for role in layout)]
    if len(fitting) < 2:
        return fitting or layouts
    columns = [[_names_of(table, mapping, role)[0] for role in layout if not role.is_optional] for layout in fitting]
    ways = " or ".join(" and ".join(f"`{name}`" for name in names) for names in columns)
    role = next(role for role in fitting[0] if not role.is_optional)
    message = f"it may be read by its columns {ways}; say which in columns, as {role.name}: {columns[0][0]}"
    raise DataError(message, file=table.file.name, column=role.name)


def _text_hint(table: Table) -> str:
    """A hint for a plain text file, which has no columns."""
    if table.file.format != spec_pb2.DATA_FORMAT_TEXT:
        return ""
    return "; if each line is a word followed by its tag, set format to conll; if tabs separate its columns, to tsv"


def _check_mapped(table: Table, mapping: Mapping[str, str]) -> None:
    errors = [
        DataError(
            f"no column {shorten(name)!r}; there are: {listed(table.columns)}"
            f"{nearest(name, [*table.columns, *table.untaken])}{layout_hint(table)}",
            file=table.file.name,
            column=role,
            value=name,
        )
        for role, name in sorted(mapping.items())
        if name not in table.columns
    ]
    raise_all(errors)


def _column_of(table: Table, mapping: Mapping[str, str], role: Role) -> str:
    """The role's column; empty if there is none. Raises DataError if two fit."""
    found = _names_of(table, mapping, role)
    if len(found) > 1 and not role.refusal:
        raise DataError(
            f"the columns {listed(found)} may each be the {role.name}; map one in columns, as {role.name}: {found[0]}",
            file=table.file.name,
            column=role.name,
        )
    return found[0] if found else ""


def _names_of(table: Table, mapping: Mapping[str, str], role: Role) -> list[str]:
    """The columns that may be the role's: the mapped one, the one of its name, or those of its aliases."""
    if role.name in mapping:
        return [mapping[role.name]]
    taken = set(mapping.values())
    free = [name for name in table.columns if name not in taken]
    if role.name in free:
        return [role.name]
    named = {role.name, *role.aliases}
    found = list(dict.fromkeys(name for name in free if name.casefold() in named))
    return found or [name for name in free if any(of_region(name, language) for language in role.languages)]


def of_region(name: str, language: str) -> bool:
    """Whether a name is a language with a region: `en_XX` and `en-GB` are English."""
    return bool(language) and re.split("[-_]", name.casefold())[0] == language.casefold()
