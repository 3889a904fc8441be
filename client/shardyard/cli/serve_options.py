"""The options of `serve`, one for each of the service's settings that is not shared with other commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shardyard.cli.options import a_path

Listen = Annotated[
    str | None,
    typer.Option(
        "--listen",
        "--address",
        envvar="SHARDYARD_ADDRESS",
        help="host:port [127.0.0.1:7400].",
        show_default=False,
    ),
]
StorageRoot = Annotated[
    Path | None,
    typer.Option(
        "--storage-root", metavar="<path>", parser=a_path, help="A folder that every node sees [in the state]."
    ),
]
Standby = Annotated[
    bool, typer.Option("--standby", help="While another service leads the store: wait, then take over.")
]
DataRoots = Annotated[
    list[str] | None, typer.Option("--data-root", help="A folder whose files jobs may name; may be repeated.")
]
TorchHubRepos = Annotated[
    list[str] | None,
    typer.Option(
        "--torch-hub-repo",
        metavar="<repo>",
        help="A folder with a hubconf.py under a data root, or owner/name:commit in torch's cache, "
        "whose code jobs may run; may be repeated.",
    ),
]
Projects = Annotated[list[str] | None, typer.Option("--project", help="Another project; may be repeated.")]
Launcher = Annotated[str | None, typer.Option("--launcher", help="ray or local (no Ray) [ray].")]
RayAddress = Annotated[str | None, typer.Option("--ray-address", help="Join this Ray cluster instead of starting one.")]
Cpus = Annotated[int | None, typer.Option("--cpus", min=1, help="Slots on this machine [its cores].")]
Gpus = Annotated[int | None, typer.Option("--gpus", min=0, help="GPUs on this machine [those found].")]
SlotHourPrice = Annotated[
    float | None, typer.Option("--slot-hour-price", min=0, help="What plans say that an hour of a slot costs.")
]
Currency = Annotated[str | None, typer.Option("--currency", help="Its currency, such as EUR.")]
Http = Annotated[str | None, typer.Option("--http", help="Also answer JSON over HTTP on this HOST:PORT.")]
WebhookNetworks = Annotated[
    list[str] | None,
    typer.Option(
        "--webhook-allow",
        metavar="<network>",
        help="A private network, such as 10.1.0.0/16, to which webhooks may be sent; may be repeated.",
    ),
]
RemoteRoots = Annotated[
    list[str] | None,
    typer.Option(
        "--remote-root",
        metavar="<uri>",
        help="An s3://bucket/prefix whose objects jobs may name; with keys, s3://bucket/prefix=secret://name; "
        "may be repeated.",
    ),
]
RemoteExportRoots = Annotated[
    list[str] | None,
    typer.Option(
        "--remote-export-root",
        metavar="<uri>",
        help="An s3://bucket/prefix=secret://name below which models may be copied; may be repeated.",
    ),
]
S3Endpoint = Annotated[str | None, typer.Option("--s3-endpoint", help="URL of the object store [Amazon S3].")]
S3Region = Annotated[str | None, typer.Option("--s3-region", help="Region of its buckets [us-east-1].")]
ObjectCacheBytes = Annotated[
    int | None, typer.Option("--object-cache-bytes", min=1024**2, help="Of all copies of objects together [256 GiB].")
]
Secrets = Annotated[
    list[str] | None,
    typer.Option(
        "--secret",
        metavar="<name>=<project>",
        help="A secret, and a project whose jobs may use it; may be repeated.",
    ),
]
SecretsDir = Annotated[
    Path | None,
    typer.Option(
        "--secrets-dir", metavar="<path>", parser=a_path, help="A file for each secret [secrets in the state]."
    ),
]
TlsCert = Annotated[
    Path | None,
    typer.Option("--tls-cert", metavar="<path>", parser=a_path, help="TLS: the certificate, a PEM file [no TLS]."),
]
TlsKey = Annotated[
    Path | None, typer.Option("--tls-key", metavar="<path>", parser=a_path, help="TLS: the certificate's key.")
]
ClientCa = Annotated[
    Path | None,
    typer.Option(
        "--client-ca", metavar="<path>", parser=a_path, help="TLS: the authority of client certificates [none]."
    ),
]
Auth = Annotated[bool, typer.Option("--auth", help="Ask for tokens on loopback, too.")]
OidcIssuer = Annotated[str | None, typer.Option("--oidc-issuer", help="Accept the JWTs of this OpenID Connect issuer.")]
OidcAudience = Annotated[str | None, typer.Option("--oidc-audience", help="The audience that they must be for.")]
OidcPrincipalClaim = Annotated[
    str | None, typer.Option("--oidc-principal-claim", help="Their claim that says who calls [sub].")
]
OidcGroupsClaim = Annotated[
    str | None, typer.Option("--oidc-groups-claim", help="Their claim with the caller's groups [groups].")
]
AdminListen = Annotated[
    str | None,
    typer.Option("--admin-listen", help="host:port of metrics and probes, such as 127.0.0.1:7401 [none]."),
]
OtlpEndpoint = Annotated[
    str | None, typer.Option("--otlp-endpoint", help="Send traces there, such as http://127.0.0.1:4317 [none].")
]
LogFormat = Annotated[str | None, typer.Option("--log-format", help="text or json [text].")]
LogLevel = Annotated[
    str | None,
    typer.Option("--log-level", help="info (also calls and jobs), warning or error [warning]."),
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Listen beyond this machine without TLS or tokens: for labs.")
]
