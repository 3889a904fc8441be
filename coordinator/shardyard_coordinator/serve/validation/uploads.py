"""Rules of the headers of uploads, which may announce 100,000 files."""

from __future__ import annotations

import dataclasses
import re
from typing import Final

from shardyard.v1 import dataset_service_pb2 as datasets
from shardyard.v1 import model_service_pb2 as models
from shardyard.v1 import transfer_pb2
from shardyard_coordinator.domain.errors import FieldViolation
from shardyard_coordinator.serve.validation import rules
from shardyard_coordinator.serve.validation.names import name_complaint
from shardyard_coordinator.serve.validation.sources import relative_path_complaint
from shardyard_coordinator.serve.validation.text import control_complaint, id_complaint, request_id_complaint, show

# The answer lists the same files with their progress, and clients accept 4 MiB.
MAX_HEADER_BYTES: Final = 3 * 1024 * 1024
MAX_HEADER_VIOLATIONS: Final = 100
_FILES_AT_ONCE: Final = 50

Found = list[FieldViolation]


def rules_of_upload(request: models.CreateModelRequest | datasets.CreateDatasetRequest) -> Found:
    """The rules of the protos, of a few files at a time: reporting the errors of 100,000 files takes seconds.

    The first 100 violations are enough.
    """
    files = request.header.files
    if len(files) <= _FILES_AT_ONCE:
        return rules.violations(request)
    if (size := request.header.ByteSize()) > MAX_HEADER_BYTES:
        text = f"{size:,} bytes in {len(files):,} files; a header has at most {MAX_HEADER_BYTES:,} (3 MiB); "
        return [FieldViolation("header.files", text + "join small files into fewer")]
    found: Found = []
    for at in range(0, len(files), _FILES_AT_ONCE):
        part = transfer_pb2.UploadHeader(files=files[at : at + _FILES_AT_ONCE])
        if at == 0:
            part.display_name = request.header.display_name
        found += [_shifted(each, at) for each in rules.violations(part)]
        if len(found) >= MAX_HEADER_VIOLATIONS:
            return found[:MAX_HEADER_VIOLATIONS]
    return found


def _shifted(violation: FieldViolation, at: int) -> FieldViolation:
    """Moves the index of a violation from a part of the header to the whole header."""
    field = _FILE_INDEX.sub(lambda index: f"files[{int(index[1]) + at}]", violation.field)
    return dataclasses.replace(violation, field=f"header.{field}")


_FILE_INDEX: Final = re.compile(r"^files\[([0-9]+)\]")


def check_upload(request: models.CreateModelRequest | datasets.CreateDatasetRequest, found: Found) -> None:
    """The rules of a header: names, paths, and files that are also folders."""
    if request.WhichOneof("message") == "header":
        _check_header(request.header, found)


def _check_header(header: transfer_pb2.UploadHeader, found: Found) -> None:
    if complaint := name_complaint("project", header.parent):
        found.append(FieldViolation("header.parent", complaint))
    if complaint := id_complaint(header.resource_id):
        found.append(FieldViolation("header.resource_id", complaint))
    if complaint := request_id_complaint(header.request_id, required=True):
        found.append(FieldViolation("header.request_id", complaint))
    if complaint := control_complaint(header.display_name):
        found.append(FieldViolation("header.display_name", complaint))
    if len(found) >= MAX_HEADER_VIOLATIONS or any(each.field == "header.files" for each in found):
        return
    seen: set[str] = set()
    folders = {parent for file in header.files for parent in _parents(file.path)}
    for at, file in enumerate(header.files):
        complaint = relative_path_complaint(file.path) if file.path else None
        if complaint is None and file.path in seen:
            complaint = f"duplicate path {show(file.path)}; leave one out"
        if complaint is None and file.path in folders:
            complaint = f"{show(file.path)} is a file and a folder at once; rename one"
        if complaint is not None:
            found.append(FieldViolation(f"header.files[{at}].path", complaint))
            if len(found) >= MAX_HEADER_VIOLATIONS:
                return
        seen.add(file.path)


def _parents(path: str) -> list[str]:
    parts = path.split("/")[:-1]
    return ["/".join(parts[: at + 1]) for at in range(min(len(parts), 64))]
