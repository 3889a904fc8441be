"""`serve`, `stop`, `health`, `doctor`: the service on this machine."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from shardyard.cli.options import Address, Json, Project, a_path, open_client, open_probe

StateDir = Annotated[
    Path | None,
    typer.Option(
        "--state-dir",
        envvar="SHARDYARD_STATE_DIR",
        metavar="<path>",
        parser=a_path,
        help="The folder for the service's state.",
        show_default=False,
    ),
]

Store = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="<url>",
        help="postgresql://USER@HOST:PORT/DATABASE [$SHARDYARD_STORE, else SQLite in the state].",
        show_default=False,
    ),
]


def serve(
    *,
    listen: Annotated[
        str | None,
        typer.Option(
            "--listen",
            "--address",
            envvar="SHARDYARD_ADDRESS",
            help="host:port [127.0.0.1:7400].",
            show_default=False,
        ),
    ] = None,
    state_dir: StateDir = None,
    storage_root: Annotated[
        Path | None,
        typer.Option(
            "--storage-root", metavar="<path>", parser=a_path, help="A folder that every node sees [in the state]."
        ),
    ] = None,
    store: Store = None,
    standby: Annotated[
        bool, typer.Option("--standby", help="While another service leads the store: wait, then take over.")
    ] = False,
    data_root: Annotated[
        list[str] | None, typer.Option("--data-root", help="A folder whose files jobs may name; may be repeated.")
    ] = None,
    torch_hub_repo: Annotated[
        list[str] | None,
        typer.Option(
            "--torch-hub-repo",
            metavar="<repo>",
            help="A folder with a hubconf.py under a data root, or owner/name:commit in torch's cache, "
            "whose code jobs may run; may be repeated.",
        ),
    ] = None,
    projects: Annotated[list[str] | None, typer.Option("--project", help="Another project; may be repeated.")] = None,
    launcher: Annotated[str | None, typer.Option("--launcher", help="ray or local (no Ray) [ray].")] = None,
    ray_address: Annotated[
        str | None, typer.Option("--ray-address", help="Join this Ray cluster instead of starting one.")
    ] = None,
    cpus: Annotated[int | None, typer.Option("--cpus", min=1, help="Slots on this machine [its cores].")] = None,
    gpus: Annotated[int | None, typer.Option("--gpus", min=0, help="GPUs on this machine [those found].")] = None,
    slot_hour_price: Annotated[
        float | None, typer.Option("--slot-hour-price", min=0, help="What plans say that an hour of a slot costs.")
    ] = None,
    currency: Annotated[str | None, typer.Option("--currency", help="Its currency, such as EUR.")] = None,
    http: Annotated[str | None, typer.Option("--http", help="Also answer JSON over HTTP on this HOST:PORT.")] = None,
    webhook_allow: Annotated[
        list[str] | None,
        typer.Option(
            "--webhook-allow",
            metavar="<network>",
            help="A private network, such as 10.1.0.0/16, to which webhooks may be sent; may be repeated.",
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option("--tls-cert", metavar="<path>", parser=a_path, help="TLS: the certificate, a PEM file [no TLS]."),
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option("--tls-key", metavar="<path>", parser=a_path, help="TLS: the certificate's key.")
    ] = None,
    client_ca: Annotated[
        Path | None,
        typer.Option(
            "--client-ca", metavar="<path>", parser=a_path, help="TLS: the authority of client certificates [none]."
        ),
    ] = None,
    auth: Annotated[bool, typer.Option("--auth", help="Ask for tokens on loopback, too.")] = False,
    oidc_issuer: Annotated[
        str | None, typer.Option("--oidc-issuer", help="Accept the JWTs of this OpenID Connect issuer.")
    ] = None,
    oidc_audience: Annotated[
        str | None, typer.Option("--oidc-audience", help="The audience that they must be for.")
    ] = None,
    oidc_principal_claim: Annotated[
        str | None, typer.Option("--oidc-principal-claim", help="Their claim that says who calls [sub].")
    ] = None,
    oidc_groups_claim: Annotated[
        str | None, typer.Option("--oidc-groups-claim", help="Their claim with the caller's groups [groups].")
    ] = None,
    admin_listen: Annotated[
        str | None,
        typer.Option("--admin-listen", help="host:port of metrics and probes, such as 127.0.0.1:7401 [none]."),
    ] = None,
    otlp_endpoint: Annotated[
        str | None, typer.Option("--otlp-endpoint", help="Send traces there, such as http://127.0.0.1:4317 [none].")
    ] = None,
    log_format: Annotated[str | None, typer.Option("--log-format", help="text or json [text].")] = None,
    log_level: Annotated[
        str | None,
        typer.Option("--log-level", help="info (also calls and jobs), warning or error [warning]."),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen beyond this machine without TLS or tokens: for labs.")
    ] = False,
) -> None:
    """Run the service. Ctrl-C stops it; running jobs continue if Ray holds them."""
    given = {
        "listen": listen,
        "state_dir": state_dir,
        "storage_root": storage_root,
        "store": store,
        "standby": standby or None,
        "data_roots": tuple(data_root) if data_root else None,
        "torch_hub_repos": tuple(torch_hub_repo) if torch_hub_repo else None,
        "projects": tuple(projects) if projects else None,
        "launcher": launcher,
        "ray_address": ray_address,
        "cpus": cpus,
        "gpus": gpus,
        "slot_hour_price": slot_hour_price,
        "currency": currency,
        "http": http,
        "webhook_allow": tuple(webhook_allow) if webhook_allow else None,
        "tls_cert": tls_cert,
        "tls_key": tls_key,
        "client_ca": client_ca,
        "auth": auth or None,
        "oidc_issuer": oidc_issuer,
        "oidc_audience": oidc_audience,
        "oidc_principal_claim": oidc_principal_claim,
        "oidc_groups_claim": oidc_groups_claim,
        "admin_listen": admin_listen,
        "otlp_endpoint": otlp_endpoint,
        "log_format": log_format,
        "log_level": log_level,
        "insecure": insecure or None,
    }
    settings = load_settings({name: value for name, value in given.items() if value is not None})
    raise typer.Exit(importlib.import_module("shardyard_coordinator.main").run_coordinator(settings))


def stop(
    cancel_jobs: Annotated[
        bool | None,
        typer.Option(
            "--cancel-jobs/--keep-jobs", help="End live jobs, or keep them for the next start.", show_default=False
        ),
    ] = None,
    state_dir: StateDir = None,
    json: Json = False,
) -> None:
    """Stop the service and the Ray that it started."""
    from shardyard.cli.output import print_json
    from shardyard.cli.stopping import stop_service

    stopped = stop_service(state_of(state_dir), cancel_jobs=cancel_jobs)
    if json:
        print_json(stopped.to_dict())
    else:
        for line in stopped.lines():
            print(line)


def doctor(
    address: Address = None, project: Project = "default", state_dir: StateDir = None, json: Json = False
) -> None:
    """Say what works on this machine, and what does not.

    Each problem comes with what to do about it.
    """
    from shardyard.cli.checks import examine
    from shardyard.cli.output import print_json

    with open_client(address, project) as client:
        findings = examine(client, state_dir)
    if json:
        print_json([vars(finding) for finding in findings])
    else:
        for finding in findings:
            print(finding.line())
            if finding.next_step:
                print(f"{'':8}{finding.next_step}")
    raise typer.Exit(1 if any(finding.verdict == "broken" for finding in findings) else 0)


def health(
    address: Address = None,
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds to wait for an answer.")] = 5.0,
    json: Json = False,
) -> None:
    """Ask whether the service serves calls; exit code 1 if not. For probes of containers."""
    from shardyard.cli.output import print_json

    with open_probe(address, timeout) as client:
        serves = client.is_serving()
    if json:
        print_json({"serving": serves})
    else:
        print("serving" if serves else "not serving: the service is starting, or stopping")
    raise typer.Exit(0 if serves else 1)


def load_settings(given: dict[str, Any]) -> Any:
    """The coordinator's Settings; invalid ones are usage errors, and so is a password that everybody can see."""
    module = server("settings")
    _refuse_seen_password(given.get("store") or "")
    try:
        return module.Settings(**given)
    except ValueError as error:  # pydantic's error is a ValueError; `errors()` lists each complaint.
        complaints: list[Any] = getattr(error, "errors", list)()
        words = "; ".join(
            f"{'.'.join(map(str, each['loc'])) or 'settings'}: {each['msg'].removeprefix('Value error, ')}"
            for each in complaints
        )
        raise typer.BadParameter(words or str(error)) from None


def _refuse_seen_password(url: str) -> None:
    """Raises BadParameter for a password among the arguments, which every account can read with `ps`."""
    urls = server("store.postgres_url")
    if url and not urls.url_complaint(url) and urls.has_password(url):
        raise typer.BadParameter(
            "store: the URL holds a password, which other accounts of this machine can read with `ps`; put the whole "
            "URL into SHARDYARD_STORE, or leave the password to PGPASSWORD or ~/.pgpass"
        )


def server(module: str) -> Any:
    """A module of the coordinator, by name: the SDK never imports it."""
    try:
        return importlib.import_module(f"shardyard_coordinator.{module}")
    except ModuleNotFoundError as error:
        print(
            f"shardyard: the service needs `{error.name}`; install it with: pip install 'shardyard[all]'",
            file=sys.stderr,
        )
        raise typer.Exit(2) from None


def state_of(given: Path | None) -> Path:
    """The state directory that the service would use."""
    return given if given is not None else Path(server("settings").default_state_dir())
