"""The folders that processes which open clients' files may use, and whether they are still the same ones."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from shardyard_coordinator.launch.confine import Identities, holds, identities

_HUB = "https://huggingface.co"
_AMAZON = "https://s3.amazonaws.com"

# The longest wait for a mount whose server does not answer; requests for other paths do not wait.
_PATIENCE_S = 1.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Folders:
    """The folders that the processes may read and write, beside the environment; without `cache` they are not confined.

    `hidden` is the state folder, which they never see as a whole. `objects` has the copies of objects, which ranks
    only read; `ports` are those of the object store.
    """

    reads: tuple[str, ...] = ()
    cache: str = ""
    hidden: str = ""
    objects: str = ""
    ports: tuple[int, ...] = ()

    def confine(self, environment: Mapping[str, str]) -> Mapping[str, object]:
        """The argument of `compute_worker --confine`."""
        if not self.cache:
            return {}
        ports = sorted({*hub_ports(environment), *self.ports})
        return {"reads": self.reads, "writes": self._writes, "hidden": self.hidden, "ports": ports}

    @property
    def ranks(self) -> str:
        """The folder of the `fork_server`; empty: without a state folder, or if ranks may read it, there is none.

        Who can open that folder can have a process started that is not confined.
        """
        return "" if any(holds(path, self.hidden) for path in self.reads) else warm_folder(self.hidden)

    @property
    def paths(self) -> tuple[str, ...]:
        """All paths of `confine`, in the order in which the process reports what it found there."""
        return (*self.reads, *self._writes) if self.cache else ()

    @property
    def _writes(self) -> tuple[str, ...]:
        return (self.cache, f"{self.cache}/tmp", *filter(None, [self.objects]))

    def environment(self) -> Mapping[str, str]:
        """Environment variables that say where libraries may write."""
        return {"TMPDIR": f"{self.cache}/tmp", "HF_HOME": f"{self.cache}/home"} if self.cache else {}


class FolderWatch:
    """Detects folders that were exchanged since a process was confined to them.

    Landlock's rules apply to the files at a path when they were made: a folder that was removed and made again, a link
    that leads elsewhere, or a new mount is not allowed. The kernel does not reuse the inode numbers of a rule's
    files.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self._paths = tuple(paths)
        self._look: asyncio.Task[Identities] | None = None
        self._since_s = 0.0

    async def exchanged(self, then: Identities) -> bool:
        """Whether another file or folder is at one of the paths by now; a missing one may come back unchanged."""
        if not then:
            return False
        now_s = asyncio.get_running_loop().time()
        if self._look is None or self._look.done():
            self._look, self._since_s = asyncio.create_task(asyncio.to_thread(identities, self._paths)), now_s
        await asyncio.wait([self._look], timeout=max(0.0, self._since_s + _PATIENCE_S - now_s))
        if not self._look.done():
            return False
        return any(now is not None and now != before for now, before in zip(self._look.result(), then, strict=True))


def warm_folder(hidden: str) -> str:
    """Where ranks find their `fork_server`: in the state folder, of which they see only their own part."""
    return f"{hidden}/warm" if hidden else ""


def is_offline(environment: Mapping[str, str]) -> bool:
    """Whether the Hub is not to be asked."""
    return environment.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}


def hub_ports(environment: Mapping[str, str]) -> list[int]:
    """The ports of the Hub, of a proxy for it, and of DNS over TCP."""
    if is_offline(environment):
        return []
    return _ports([environment.get("HF_ENDPOINT") or _HUB, _HUB], environment)


def object_ports(endpoint: str, environment: Mapping[str, str]) -> list[int]:
    """The ports of an object store (empty: Amazon's), of a proxy for it, and of DNS over TCP."""
    return _ports([endpoint or _AMAZON], environment)


def _ports(urls: Sequence[str], environment: Mapping[str, str]) -> list[int]:
    proxies = {"http_proxy", "https_proxy", "all_proxy"}
    urls = [*urls, *(value for name, value in environment.items() if name.lower() in proxies)]
    ports = {53}
    for url in filter(None, urls):
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            ports.add(parts.port or (443 if parts.scheme == "https" else 80))
        except ValueError:
            _log.warning("%r is not a URL; its port stays closed to compute processes", url)
    return sorted(ports)
