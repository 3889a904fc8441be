"""What the service says when it starts: how it is reached, what is dangerous, and where the first token is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TextIO

from shardyard_coordinator.serve.first_admin import FILE
from shardyard_coordinator.settings import Settings, is_loopback

DEFAULT_ADDRESS: Final = "127.0.0.1:7400"


@dataclass(frozen=True)
class Said:
    """Addresses of gRPC, of HTTP and of metrics, empty if there is none; and where the first admin's token is."""

    address: str
    http: str
    metrics: str
    first_token: str


def greet(settings: Settings, said: Said, *, output: TextIO, errors: TextIO) -> None:
    """Prints the warnings, and where the service answers."""
    for warning in warnings_of(settings):
        print(warning, file=errors, flush=True)
    named = _named(said.address)
    where = "" if named == DEFAULT_ADDRESS else f"SHARDYARD_ADDRESS={named} "
    where += "SHARDYARD_CA=CA.pem " if settings.tls else ""
    lines = [f"Shardyard serves on {said.address}; next: {where}shardyard submit FILE.yaml", said.first_token]
    if said.metrics:
        if not is_loopback(settings.admin_host):
            print("--admin-listen: everyone who reaches the port may read the metrics", file=errors, flush=True)
        lines.append(f"Metrics are on http://{said.metrics}/metrics")
    if said.http:
        scheme = "https" if settings.tls else "http"
        lines.append(f"JSON over HTTP on {scheme}://{said.http}; its calls are described at /openapi.json")
    print("\n".join(filter(None, lines)), file=output, flush=True)


def login_of(settings: Settings, address: str) -> str:
    """The command that saves the service, with a token from the standard input; `CA.pem`: the authority of its TLS."""
    named = _named(address)
    where = "" if named == DEFAULT_ADDRESS else f" --address {named}"
    return f"shardyard login{where}" + (" --ca CA.pem" if settings.tls else "")


def _named(address: str) -> str:
    """The address as clients write it: `HOST` is for any of this machine's names."""
    host, _, port = address.rpartition(":")
    return f"HOST:{port}" if host in ("0.0.0.0", "[::]") else address


def greet_standby(settings: Settings, output: TextIO) -> None:
    """Prints what a service that may wait for days waits for."""
    print("--standby: this service takes over when the one that leads the store ends", file=output, flush=True)
    if settings.authentication.is_required:
        text = (
            f"the token of the first admin is made once, as {FILE} in the state directory of the service that leads "
            "first; that service says where, `shardyard tokens` too, and this one when it takes over"
        )
        print(text, file=output, flush=True)


def warnings_of(settings: Settings) -> list[str]:
    """What the operator should know about how the service is reached, and about what jobs can read."""
    cold = "" if settings.is_state_hidden else ", and ranks start cold"
    readable = [f"{each}: every job can read it{cold}; give folders that have data alone" for each in settings.exposed]
    if settings.authentication.is_required:
        text = "has parts of the storage: jobs of every project can read the models and data sets of all"
        readable += [f"the data root {root!r} {text}; give a folder beside it" for root in settings.shared_storage]
    if cold and not settings.exposed:
        readable.append("the storage contains the state directory, so ranks start cold; move that (--state-dir)")
    return [*_reached(settings), *readable]


def _reached(settings: Settings) -> list[str]:
    if not settings.insecure:
        return []
    if settings.authentication.is_required:
        return ["--insecure: calls are not encrypted, so everybody on the way can read tokens"] * (not settings.tls)
    return ["--insecure: everyone who reaches the port may do everything"]
