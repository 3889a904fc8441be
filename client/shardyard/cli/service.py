"""`serve`, `stop`, `health`, `doctor`: the service on this machine."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from shardyard.cli import serve_options as options
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
    listen: options.Listen = None,
    state_dir: StateDir = None,
    storage_root: options.StorageRoot = None,
    store: Store = None,
    standby: options.Standby = False,
    data_root: options.DataRoots = None,
    torch_hub_repo: options.TorchHubRepos = None,
    projects: options.Projects = None,
    launcher: options.Launcher = None,
    ray_address: options.RayAddress = None,
    cpus: options.Cpus = None,
    gpus: options.Gpus = None,
    slot_hour_price: options.SlotHourPrice = None,
    currency: options.Currency = None,
    http: options.Http = None,
    webhook_allow: options.WebhookNetworks = None,
    remote_root: options.RemoteRoots = None,
    remote_export_root: options.RemoteExportRoots = None,
    s3_endpoint: options.S3Endpoint = None,
    s3_region: options.S3Region = None,
    object_cache_bytes: options.ObjectCacheBytes = None,
    secret: options.Secrets = None,
    secrets_dir: options.SecretsDir = None,
    tls_cert: options.TlsCert = None,
    tls_key: options.TlsKey = None,
    client_ca: options.ClientCa = None,
    auth: options.Auth = False,
    oidc_issuer: options.OidcIssuer = None,
    oidc_audience: options.OidcAudience = None,
    oidc_principal_claim: options.OidcPrincipalClaim = None,
    oidc_groups_claim: options.OidcGroupsClaim = None,
    admin_listen: options.AdminListen = None,
    otlp_endpoint: options.OtlpEndpoint = None,
    log_format: options.LogFormat = None,
    log_level: options.LogLevel = None,
    insecure: options.Insecure = False,
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
        "remote_roots": tuple(remote_root) if remote_root else None,
        "remote_export_roots": tuple(remote_export_root) if remote_export_root else None,
        "s3_endpoint": s3_endpoint,
        "s3_region": s3_region,
        "object_cache_bytes": object_cache_bytes,
        "secrets": tuple(secret) if secret else None,
        "secrets_dir": secrets_dir,
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
