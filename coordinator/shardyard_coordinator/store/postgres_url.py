"""URLs of PostgreSQL as libpq reads them, without their secrets for everybody else.

Importing this needs neither SQLAlchemy nor psycopg, which `shardyard[postgres]` brings.
"""

from __future__ import annotations

from typing import Any, Final

SCHEMES: Final = ("postgresql://", "postgres://")
_SECRETS: Final = ("password", "sslpassword")
_DRIVER_MISSING = "PostgreSQL needs psycopg; install it with: pip install 'shardyard[postgres]'"


def is_postgres(url: str) -> bool:
    """Whether it is a URL of PostgreSQL."""
    return url.startswith(SCHEMES)


def url_complaint(url: str) -> str:
    """What is wrong with it and the next step, without the URL itself, which may hold a password; empty if valid."""
    if not is_postgres(url):
        return "is not postgresql://USER@HOST:PORT/DATABASE; give such a URL, or leave it out for SQLite in the state"
    try:
        found = parts(url)
    except ModuleNotFoundError:
        return _DRIVER_MISSING
    except ValueError:
        return (
            "cannot be read as postgresql://USER@HOST:PORT/DATABASE; write % and other signs of a password as %25 and "
            "so on, or put the password into PGPASSWORD or ~/.pgpass"
        )
    ports = str(found.get("port") or "0").split(",")
    if not all(port.isdecimal() and int(port) <= 65_535 for port in ports if port):
        return "has a port that is not a number up to 65535; give postgresql://USER@HOST:PORT/DATABASE"
    if not found.get("dbname") and not found.get("service"):
        return "names no database; add it: postgresql://USER@HOST:PORT/DATABASE"
    return ""


def has_password(url: str) -> bool:
    """Whether a valid URL holds a secret."""
    return any(name in parts(url) for name in _SECRETS)


def parts(url: str) -> dict[str, Any]:
    """The parameters of a URL, by libpq's names. Raises: ValueError, ModuleNotFoundError."""
    # Here: only PostgreSQL needs the extra.
    import psycopg
    from psycopg.conninfo import conninfo_to_dict

    try:
        return dict(conninfo_to_dict(url))
    except psycopg.ProgrammingError:
        raise ValueError("not a URL of PostgreSQL") from None  # The driver's own error quotes the password.


def without_secrets(url: str) -> str:
    """The URL as it may be shown: user, host, port and database."""
    found = parts(url)
    hosts = str(found.get("host") or "").split(",")
    ports = str(found.get("port") or "").split(",")
    places = []
    for at, host in enumerate(hosts):
        port = ports[at] if at < len(ports) else ports[0]
        shown = host.replace("/", "%2F")
        places.append(f"{shown}:{port}" if port else shown)
    user = f"{found['user']}@" if found.get("user") else ""
    return f"postgresql://{user}{','.join(places)}/{found.get('dbname') or ''}"
