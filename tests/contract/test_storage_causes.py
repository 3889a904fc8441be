"""Coordinator and trainer, which never import each other, call an error of the storage by the same name."""

from __future__ import annotations

import errno
import os

import pytest

from shardyard_coordinator.launch.protocols import storage_cause
from shardyard_trainer.failures import storage_failure

CAUSES = {
    "STORAGE_FULL": ("ENOSPC", "EDQUOT", "EFBIG"),
    "STORAGE_NOT_WRITABLE": ("EROFS", "EACCES", "EPERM", "ENOTDIR", "EISDIR", "EEXIST", "ELOOP", "ENAMETOOLONG"),
    "STORAGE_UNAVAILABLE": (
        *("ENOENT", "ESTALE", "EIO", "ENODEV", "ENXIO", "ENOTCONN", "EREMOTEIO", "EUCLEAN", "ETIMEDOUT", "EHOSTDOWN"),
    ),
}


@pytest.mark.parametrize(("name", "cause"), [(name, cause) for cause, names in CAUSES.items() for name in names])
def test_an_error_of_the_storage_has_one_name_on_both_sides(name: str, cause: str) -> None:
    number = getattr(errno, name)
    error = OSError(number, os.strerror(number), "/storage/x")
    failed = storage_failure(error, "a checkpoint", on_storage=True)
    assert failed is not None and failed.cause == storage_cause(error) == cause
    assert "/storage/x" in failed.message and os.strerror(number) in failed.message and failed.next_step
