"""The kinds of columns that tables are made of, alike in SQLite and PostgreSQL."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Integer, LargeBinary, Text, text

# SQLite numbers rows by itself only if the key's type is exactly INTEGER.
IDENTITY = BigInteger().with_variant(Integer(), "sqlite")


def number_column(name: str, default: int = 0) -> Column[int]:
    """A whole number, or a time in microseconds; it has the default if it is not given."""
    return Column(name, BigInteger(), nullable=False, server_default=text(str(default)))


def text_column(name: str) -> Column[str]:
    """Text, empty if it is not given."""
    return Column(name, Text(), nullable=False, server_default=text("''"))


def bytes_column(name: str) -> Column[bytes]:
    """Bytes, NULL if they are not given: an empty literal that both databases read as bytes does not exist."""
    return Column(name, LargeBinary(), nullable=True)
