"""A service with TLS and tokens on both of its ports, and callers who may more or less."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import shardyard
from helpers.certificates import HERE, Authority
from helpers.web import Web, answering
from helpers.workplace import fill

PROJECT = "team"
SUBMITTER = "alice"
VIEWER = "vera"
OUTSIDER = "olga"
EXPIRED = "emil"
NOBODY = "nobody"


@dataclass(frozen=True)
class Protected:
    """The service, its data, and the token of each caller by name."""

    web: Web
    folder: Path
    tokens: Mapping[str, str]

    @property
    def data(self) -> Path:
        """What `helpers.workplace.fill` writes; jobs may name it."""
        return self.folder / "data"

    @property
    def ca(self) -> Path:
        """The authority that signed the service's certificate."""
        return self.folder / "ca.pem"

    @property
    def other_ca(self) -> Path:
        """One that did not."""
        return self.folder / "other.pem"

    def environment(self, who: str = SUBMITTER, **variables: str) -> dict[str, str]:
        """What leads every client to the service as this caller; `variables` are changed in it."""
        return {
            **self.web.service.environment,
            "SHARDYARD_URL": f"https://{self.web.address}",
            "SHARDYARD_CA": str(self.ca),
            "SHARDYARD_TOKEN": self.tokens[who],
            "SHARDYARD_PROJECT": PROJECT,
            "SHARDYARD_CONFIG": str(self.folder / "none.toml"),
            **variables,
        }

    def run(
        self, *command: str, who: str = SUBMITTER, text: str = "", **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs a client in its own folder."""
        return subprocess.run(
            command,
            cwd=self.data,
            env=self.environment(who, **variables),
            input=text,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    def client(self, who: str = SUBMITTER) -> shardyard.Client:
        """The SDK."""
        return shardyard.Client(self.web.service.address, self.tokens[who], PROJECT, ca=self.ca)


@contextlib.contextmanager
def protected(folder: Path) -> Iterator[Protected]:
    """The service; the first admin's token makes those of the callers."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data").mkdir()
    fill(folder / "data")
    authority = Authority()
    certificate, key = authority.sign(*HERE).write(folder, "server")
    (folder / "ca.pem").write_bytes(authority.pem)
    (folder / "other.pem").write_bytes(Authority("another authority").pem)
    tls = ("--tls-cert", str(certificate), "--tls-key", str(key), "--auth")
    places = ("--data-root", str(folder / "data"), "--project", PROJECT, "--project", "other")
    with answering(folder / "service", *tls, *places) as web:
        admin = (web.service.state / "admin-token").read_text().strip()
        with shardyard.Client(web.service.address, admin, ca=folder / "ca.pem") as client:
            tokens = _tokens(client)
        yield Protected(web, folder, tokens)


def _tokens(client: shardyard.Client) -> dict[str, str]:
    expired, secret = client.access.create_token(EXPIRED, ttl="1s")
    for member, role, project in ((SUBMITTER, "submitter", PROJECT), (VIEWER, "viewer", PROJECT)):
        client.access.grant(member, role, project=project)
    client.access.grant(OUTSIDER, "submitter", project="other")
    made = {who: client.access.create_token(who)[1] for who in (SUBMITTER, VIEWER, OUTSIDER)}
    assert expired.expire_time is not None
    time.sleep(max(0.0, expired.expire_time.timestamp() - time.time()))
    return {**made, EXPIRED: secret, NOBODY: ""}
