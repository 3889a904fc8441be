"""The part of this process's environment that ranks and processes for clients' files inherit."""

from __future__ import annotations

import re
from collections.abc import Mapping

_SECRET_NAMES = re.compile(
    r"""
    ^AWS_ | ^SSH_AUTH_SOCK$ | ^SHARDYARD_STORE$
    | SECRET | PASSWORD | PASSWD | PASSPHRASE | APIKEY | PRIVATE_?KEY | CREDENTIAL
    | CONNECTION_?STRING | WEBHOOK | AUTHORIZATION | _AUTH_
    | (^|_)(TOKEN|KEY|PASS|PAT|JWT|AUTH|COOKIE|DSN)S?$ | _PWDS?$
    """,
    re.VERBOSE | re.IGNORECASE,
)
# As in postgresql://name:password@host; proxies keep theirs.
_PASSWORD_IN_URL = re.compile(r"://[^/\s@]*:[^/\s@]+@")
_KEY_BLOCK = "PRIVATE KEY-----"
_MAY_LEAD_OUT = re.compile(r"_proxy$|^HF_ENDPOINT$", re.IGNORECASE)


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """All variables except those that look like secrets, because settings of libraries and drivers have any name.

    Ray's own token stays, because programs that talk to Ray need it.
    """
    return {
        name: value for name, value in environment.items() if name.startswith("RAY_") or not _is_secret(name, value)
    }


def _is_secret(name: str, value: str) -> bool:
    if _SECRET_NAMES.search(name) or _KEY_BLOCK in value:
        return True
    return bool(_PASSWORD_IN_URL.search(value)) and not _MAY_LEAD_OUT.search(name)
