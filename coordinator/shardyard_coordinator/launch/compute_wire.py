"""A Compute's calls as payloads between the coordinator and the actor on a cluster that has the processes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from shardyard_coordinator.launch.allowed import Folders
from shardyard_coordinator.launch.frames import Header, pack, unpack
from shardyard_coordinator.launch.process_compute import ProcessCompute, Size
from shardyard_coordinator.launch.protocols import Compute, ComputeFailed, ComputeUnavailable, InputFailed


def settings_of(
    *,
    log: str,
    size: Size,
    folders: Folders,
    warm: tuple[str, ...],
    answerer: str,
    environment: Mapping[str, str],
    secrets_dir: str,
) -> Header:
    """The settings of a ProcessCompute as JSON values."""
    return {
        "log": log,
        "size": [size.inspections, size.memory_bytes, size.threads],
        "folders": [list(folders.reads), folders.cache, folders.hidden, folders.objects, list(folders.ports)],
        "warm": list(warm),
        "answerer": answerer,
        "environment": dict(environment),
        "secrets_dir": secrets_dir,
    }


def made_of(settings: Header) -> ProcessCompute:
    """The ProcessCompute with these settings."""
    reads, cache, hidden, objects, ports = settings["folders"]
    return ProcessCompute(
        log=Path(settings["log"]),
        size=Size(*settings["size"]),
        folders=Folders(tuple(reads), cache, hidden, objects, tuple(ports)),
        warm=settings["warm"],
        answerer=settings["answerer"],
        environment=settings["environment"],
        secrets_dir=settings["secrets_dir"],
    )


async def answer_call(compute: Compute, payload: bytes) -> bytes:
    """Makes the call of a payload, and packs its answer or its error."""
    header, body = unpack(payload)
    options = header["options"] | {"caller": tuple(header["options"]["caller"])}
    try:
        if header["verb"] == "inspect":
            route = bytes.fromhex(options.pop("route"))
            return pack({}, await compute.inspect(header["function"], body, route=route, **options))
        return pack({}, await compute.ask(header["function"], header["model"], body, **options))
    except InputFailed as error:
        note = {"field": error.field, "what": error.what, "reason": error.reason}
        return pack({"error": "input", "how": error.how, "note": note, "log": error.log})
    except ComputeFailed as error:
        return pack({"error": "failed", "how": str(error)})
    except ComputeUnavailable as error:
        return pack({"error": "unavailable", "how": str(error)})


def read_answer(payload: bytes) -> bytes:
    """The answer of `answer_call`. Raises what the call raised there."""
    header, body = unpack(payload)
    match header.get("error"):
        case None:
            return body
        case "input":
            raise InputFailed(header["how"], note=header["note"], log=header["log"])
        case "failed":
            raise ComputeFailed(header["how"])
        case _:
            raise ComputeUnavailable(header["how"])
