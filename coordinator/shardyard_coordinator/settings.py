"""The operator's settings: by keyword, else from the environment (`SHARDYARD_…`), else defaults."""

from __future__ import annotations

import ipaddress
import os
import re
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from shardyard_coordinator.control.remote import MOST_BYTES, Remote
from shardyard_coordinator.launch.rank_env import torch_hub_cache
from shardyard_coordinator.redaction import redacted
from shardyard_coordinator.remote_settings import folder_complaint, remote_complaint, remote_of, secrets_complaint
from shardyard_coordinator.serve.protection import Authentication, Issuer, TlsFiles
from shardyard_coordinator.serve.protection import url_complaint as issuer_complaint
from shardyard_coordinator.serve.validation.text import id_complaint
from shardyard_coordinator.store.postgres_url import url_complaint

TORCH_HUB_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*:[0-9a-f]{40}")
"""A repository of PyTorch Hub at a commit."""

# Of the extra `tracing`; parents first, because looking for a child imports its parent.
_TRACING = ("opentelemetry", "opentelemetry.sdk", "opentelemetry.exporter", "opentelemetry.exporter.otlp")


class LauncherKind(StrEnum):
    """Where gangs run: on Ray, or as processes of this machine."""

    RAY = "ray"
    LOCAL = "local"


class LogFormat(StrEnum):
    """How a line of the log is written: for people, or as one JSON object."""

    TEXT = "text"
    JSON = "json"


class LogLevel(StrEnum):
    """Which lines are logged: `info` has one for each call and each change of a job's state."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def default_state_dir() -> Path:
    """`$SHARDYARD_STATE_DIR`, else `shardyard` in `$XDG_STATE_HOME`, else in `~/.local/state`."""
    if given := os.environ.get("SHARDYARD_STATE_DIR"):
        return Path(given)
    home = os.environ.get("XDG_STATE_HOME")
    return (Path(home) if home else Path.home() / ".local" / "state") / "shardyard"


class Settings(BaseSettings):
    """Settings of one coordinator. Lists in the environment are separated by commas."""

    model_config = SettingsConfigDict(env_prefix="SHARDYARD_", extra="forbid", frozen=True, hide_input_in_errors=True)

    state_dir: Path = Field(default_factory=default_state_dir)
    storage_root: Path | None = None
    store: str = Field(default="", repr=False)
    standby: bool = False
    listen: str = "127.0.0.1:7400"
    http: str = ""
    insecure: bool = False
    tls_cert: Path | None = None
    tls_key: Path | None = None
    client_ca: Path | None = None
    auth: bool = False
    oidc_issuer: str = ""
    oidc_audience: str = ""
    oidc_principal_claim: str = Field(default="sub", min_length=1, max_length=200)
    oidc_groups_claim: str = Field(default="groups", min_length=1, max_length=200)
    admin_listen: str = ""
    otlp_endpoint: str = ""
    log_format: LogFormat = LogFormat.TEXT
    log_level: LogLevel = LogLevel.WARNING
    data_roots: Annotated[tuple[str, ...], NoDecode] = ()
    torch_hub_repos: Annotated[tuple[str, ...], NoDecode] = ()
    projects: Annotated[tuple[str, ...], NoDecode] = ("default",)
    launcher: LauncherKind = LauncherKind.RAY
    ray_address: str = ""
    cpus: int = Field(default_factory=lambda: len(os.sched_getaffinity(0)), ge=1)
    gpus: int | None = Field(default=None, ge=0)
    compute_workers: int = Field(default=1, ge=1)
    inspection_s: float = Field(default=30.0, gt=0)
    compute_memory_bytes: int = Field(default=4 * 1024**3, ge=256 * 1024**2)
    event_retention_days: int = Field(default=0, ge=0)
    drain_s: float = Field(default=20.0, ge=0)
    slot_hour_price: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    currency: str = Field(default="", max_length=16)
    webhook_allow: Annotated[tuple[str, ...], NoDecode] = ()
    remote_roots: Annotated[tuple[str, ...], NoDecode] = ()
    remote_export_roots: Annotated[tuple[str, ...], NoDecode] = ()
    s3_endpoint: str = ""
    s3_region: str = ""
    object_cache_bytes: int = Field(default=MOST_BYTES, ge=1024**2)
    secrets: Annotated[tuple[str, ...], NoDecode] = ()
    secrets_dir: Path | None = None
    max_project_jobs: int = Field(default=10_000, ge=1)
    max_project_upload_bytes: int = Field(default=100 * 1024**3, ge=0)
    submits_per_s: int = Field(default=50, ge=1)

    @field_validator(
        *("data_roots", "torch_hub_repos", "projects", "webhook_allow"),
        *("remote_roots", "remote_export_roots", "secrets"),
        mode="before",
    )
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("store")
    @classmethod
    def _postgres(cls, value: str) -> str:
        if value and (complaint := url_complaint(value)):
            raise ValueError(complaint)
        return value

    @field_validator("data_roots")
    @classmethod
    def _absolute(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for root in value:
            if not Path(root).is_absolute():
                raise ValueError(f"the data root {root!r} is not an absolute path; give one")
        return value

    @field_validator("torch_hub_repos")
    @classmethod
    def _repositories(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for repo in value:
            if not (Path(repo).is_absolute() or TORCH_HUB_REPO.fullmatch(repo)):
                raise ValueError(
                    f"{repo!r} is not the absolute path of a folder with a hubconf.py, nor owner/name:commit with all "
                    "40 digits of the commit; give one of them"
                )
        return value

    @field_validator("remote_roots", "remote_export_roots", "secrets", "s3_endpoint", "s3_region")
    @classmethod
    def _of_objects(cls, value: Any, info: ValidationInfo) -> Any:
        if complaint := remote_complaint(str(info.field_name), value):
            raise ValueError(complaint)
        return value

    @field_validator("webhook_allow")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for network in value:
            try:
                ipaddress.ip_network(network, strict=False)
            except ValueError:
                raise ValueError(
                    f"{network!r} is not a network to which webhooks may be sent; give one such as 10.1.0.0/16, or one "
                    "address such as 127.0.0.1"
                ) from None
        return value

    @field_validator("listen", "admin_listen", "http")
    @classmethod
    def _host_and_port(cls, value: str, info: ValidationInfo) -> str:
        if not value and info.field_name != "listen":
            return value
        _, colon, port = value.rpartition(":")
        if not colon or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65_535:
            raise ValueError(
                f"{value!r} is not HOST:PORT with a port from 0 (any that is free) to 65535; "
                "listen on 127.0.0.1:7400, or on [::1]:7400"
            )
        return value

    @field_validator("otlp_endpoint")
    @classmethod
    def _collector(cls, value: str) -> str:
        if value and not re.fullmatch(r"https?://[^\s/@]+:[0-9]{1,5}/?", value):
            raise ValueError(
                f"{redacted(value)!r} is not http://HOST:PORT or https://HOST:PORT of a collector that takes OTLP over "
                "gRPC; give one, such as http://127.0.0.1:4317 (headers go into $OTEL_EXPORTER_OTLP_HEADERS)"
            )
        if value and any(find_spec(name) is None for name in _TRACING):
            raise ValueError("traces need further packages; install them with: pip install 'shardyard[tracing]'")
        return value

    @field_validator("projects")
    @classmethod
    def _ids(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for project in value:
            if complaint := id_complaint(project):
                raise ValueError(complaint)
        return tuple(dict.fromkeys(("default", *value)))

    @model_validator(mode="after")
    def _protected_beyond_loopback(self) -> Settings:
        if not self.insecure and not is_loopback(self.host) and self.tls_cert is None:
            raise ValueError(
                f"{self.listen!r} is not a loopback address, and without TLS everyone on the way can read tokens; give "
                "--tls-cert and --tls-key, listen on 127.0.0.1, or give --insecure if the network is trusted"
            )
        if not self.insecure and self.http and not is_loopback(host_of(self.http)) and self.tls_cert is None:
            raise ValueError(
                f"{self.http!r} is not a loopback address, and without TLS everyone on the way can read tokens; give "
                "--tls-cert and --tls-key, answer on 127.0.0.1, or give --insecure if the network is trusted"
            )
        return self

    @model_validator(mode="after")
    def _a_lease_to_wait_for(self) -> Settings:
        if self.standby and not self.store:
            raise ValueError(
                "--standby waits for another machine's service to end, so it needs a store that both reach; "
                "give --store postgresql://USER@HOST:PORT/DATABASE, or leave --standby out"
            )
        return self

    @model_validator(mode="after")
    def _files_that_belong_together(self) -> Settings:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key go together: a certificate is of no use without its key")
        if self.client_ca is not None and self.tls_cert is None:
            raise ValueError("--client-ca needs --tls-cert and --tls-key: client certificates are sent over TLS alone")
        return self

    @model_validator(mode="after")
    def _whole_issuer(self) -> Settings:
        if bool(self.oidc_issuer) != bool(self.oidc_audience):
            raise ValueError("--oidc-issuer and --oidc-audience go together: a JWT for others must not be accepted")
        if self.oidc_issuer and (complaint := issuer_complaint(self.oidc_issuer)):
            raise ValueError(f"--oidc-issuer: {complaint}")
        return self

    @model_validator(mode="after")
    def _folders_of_code_under_roots(self) -> Settings:
        for repo in self.torch_hub_repos:
            if Path(repo).is_absolute() and not any(Path(repo).is_relative_to(root) for root in self.data_roots):
                raise ValueError(
                    f"the torch hub folder {repo!r} is not under a data root, so no job could name it; "
                    f"add --data-root {repo}, or a folder above it"
                )
        return self

    @model_validator(mode="after")
    def _nothing_private_under_roots(self) -> Settings:
        if self.authentication.is_required and (found := self.exposed):
            raise ValueError(
                f"{'; '.join(found)}: every job could read it; give --data-root folders that have data alone, or move "
                "what is private (--state-dir, --tls-key)"
            )
        return self

    @property
    def shared_storage(self) -> list[str]:
        """The data roots that have parts of the storage: there, projects can read each other's models and data sets."""
        roots, storage = self.data_roots, self.storage
        return [root for root in roots if _contains(root, storage) or _contains(str(storage), Path(root))]

    @property
    def exposed(self) -> list[str]:
        """Which data roots contain what no job may read, in words: every job may name any file under a data root."""
        return [
            f"the data root {root!r} contains {what} {str(path)!r}"
            for root in self.data_roots
            for what, path in self._private_under(root)
        ]

    def _private_under(self, root: str) -> list[tuple[str, Path]]:
        """What no job may read under a data root, but for what is in a folder that is named already."""
        private = {"the state directory": self.state_dir, "the key": self.tls_key, "the secrets": self.secrets_folder}
        found = [(what, path.absolute()) for what, path in private.items() if path and _contains(root, path)]
        return [(what, path) for what, path in found if not any(other in path.parents for _, other in found)]

    @property
    def is_state_hidden(self) -> bool:
        """Whether ranks cannot read the state directory; otherwise a rank could ask for one with more rights."""
        return not any(_contains(root, self.state_dir) for root in (*self.data_roots, str(self.storage)))

    @model_validator(mode="after")
    def _secrets_of_projects(self) -> Settings:
        if complaint := secrets_complaint(self.remote, self.projects):
            raise ValueError(complaint)
        open_to_jobs = [*self.data_roots, str(self.storage)]
        if self.secrets_dir and (
            complaint := folder_complaint(self.secrets_dir.absolute(), open_to_jobs, str(self.state_dir.absolute()))
        ):
            raise ValueError(complaint)
        return self

    @property
    def remote(self) -> Remote:
        """What may be read and written elsewhere, and with which secrets."""
        return remote_of(
            self.remote_roots,
            self.remote_export_roots,
            self.secrets,
            self.s3_endpoint,
            self.s3_region,
            most_bytes=self.object_cache_bytes,
        )

    @property
    def secrets_folder(self) -> Path:
        """The folder with a file for each secret."""
        return (self.secrets_dir or self.state_dir / "secrets").absolute()

    @property
    def torch_hub(self) -> dict[str, str]:
        """The repositories whose code may run, as they were given → their folders."""
        cache = torch_hub_cache()
        return {
            repo: repo if Path(repo).is_absolute() else str(cache / re.sub("[/:]", "_", repo))
            for repo in self.torch_hub_repos
        }

    @property
    def authentication(self) -> Authentication:
        """How callers are recognised: not at all on loopback, and with `insecure`, unless it is asked for."""
        issuer = None
        if self.oidc_issuer:
            issuer = Issuer(self.oidc_issuer, self.oidc_audience, self.oidc_principal_claim, self.oidc_groups_claim)
        hosts = [self.host, *([host_of(self.http)] if self.http else [])]
        is_exposed = not self.insecure and not all(is_loopback(host) for host in hosts)
        return Authentication(self.auth or issuer is not None or self.client_ca is not None or is_exposed, issuer)

    @property
    def tls(self) -> TlsFiles | None:
        """The files of TLS; None: without it."""
        if self.tls_cert is None or self.tls_key is None:
            return None
        return TlsFiles(self.tls_cert, self.tls_key, self.client_ca)

    @property
    def host(self) -> str:
        """The host of `listen`."""
        return host_of(self.listen)

    @property
    def admin_host(self) -> str:
        """The host of `admin_listen`."""
        return host_of(self.admin_listen)

    @property
    def storage(self) -> Path:
        """The root that every node sees."""
        return (self.storage_root or self.state_dir / "storage").absolute()

    @property
    def database(self) -> Path:
        """The path of the store's file; unused if `store` names another database."""
        return self.state_dir.absolute() / "store.db"


def _contains(root: str, path: Path) -> bool:
    """Whether a path, or what it leads to, is the folder or in it."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def host_of(address: str) -> str:
    """The host of HOST:PORT."""
    return address.rpartition(":")[0].strip("[]")


def is_loopback(host: str) -> bool:
    """Whether an address is reachable from this machine only; names other than localhost are not."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
