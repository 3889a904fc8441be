"""What code of others may do to this process while it runs: imports of its own, and settings that are then undone."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils import _device

CACHE = "torch_cache"
"""The folder in a copy of a repository for the files that its code read out of torch's cache, laid out like that."""

CHECKPOINTS = "checkpoints"
"""The folder in torch's cache of the files that `torch.hub.load_state_dict_from_url` loads."""

_SHARED = frozenset({"torch", "numpy", "transformers", *sys.stdlib_module_names})
"""Modules that a repository shares with this process, whatever its files are called."""

_RUN: set[Path] = set()


_READ: list[list[str]] = []
"""Names of files that are opened, for each `files_read` that is running."""


class _Setting(NamedTuple):
    get: Callable[[], Any]
    set: Callable[[Any], Any]


_SETTINGS = (
    _Setting(torch.is_grad_enabled, torch.set_grad_enabled),
    _Setting(torch.get_default_dtype, torch.set_default_dtype),
    _Setting(torch.get_num_threads, torch.set_num_threads),
    _Setting(torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    _Setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    _Setting(torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    _Setting(os.getcwd, os.chdir),
    _Setting(lambda: sys.dont_write_bytecode, lambda value: setattr(sys, "dont_write_bytecode", value)),
    _Setting(random.getstate, random.setstate),
    _Setting(np.random.get_state, np.random.set_state),
    _Setting(lambda: logging.root.manager.disable, logging.disable),
    _Setting(lambda: logging.root.level, logging.root.setLevel),
)
"""What imported code changes for the whole process; torch's own random numbers are the caller's matter."""


@contextlib.contextmanager
def apart(code: Path) -> Iterator[None]:
    """The process for one repository: its folder is imported from first, and torch computes as it does by default.

    What its code does to the settings of torch, Python and the environment is undone, and nothing is compiled into its
    folder. Only then are modules fit to be trained: a `torch.set_grad_enabled(False)` would hold for all that follows.
    """
    with _settings_kept(), _own_modules(code), _own_cache(code), _device_kept(), torch.enable_grad():
        torch.set_default_dtype(torch.float32)
        sys.dont_write_bytecode = True
        random.seed(0)
        np.random.seed(0)
        yield
    # nn.TransformerEncoder and its parts compute by one fused kernel in evaluation, which reads the weights beside any
    # adapter, takes frozen layers for a model that only answers, and cuts off columns of padding.
    torch.backends.mha.set_fastpath_enabled(False)


@contextlib.contextmanager
def _settings_kept() -> Iterator[None]:
    before = [setting.get() for setting in _SETTINGS]
    environment, handlers = dict(os.environ), list(logging.root.handlers)
    try:
        with warnings.catch_warnings():
            yield
    finally:
        for setting, value in zip(_SETTINGS, before, strict=True):
            setting.set(value)
        logging.root.handlers[:] = handlers
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


@contextlib.contextmanager
def _device_kept() -> Iterator[None]:
    """Undoes `torch.set_default_device`, which also ends every `with torch.device(…)` around it."""
    modes = _taken()
    _push(modes)
    before = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None), _device.CURRENT_DEVICE
    try:
        yield
    finally:
        _taken()
        _push(modes)
        torch._GLOBAL_DEVICE_CONTEXT.device_context, _device.CURRENT_DEVICE = before


def _taken() -> list[Any]:
    """Takes all of torch's modes, the innermost first."""
    stack: Any = torch._C
    return [stack._pop_torch_function_stack() for _ in range(stack._len_torch_function_stack())]


def _push(modes: list[Any]) -> None:
    stack: Any = torch._C
    for mode in reversed(modes):
        stack._push_on_torch_function_stack(mode)


@contextlib.contextmanager
def _own_cache(code: Path) -> Iterator[None]:
    """The files that the code reads out of torch's cache come from its own copy of them, if it has one."""
    if not (code / CACHE).is_dir():
        yield
        return
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(code / CACHE))
    try:
        yield
    finally:
        torch.hub.set_dir(before)


@contextlib.contextmanager
def _own_modules(code: Path) -> Iterator[None]:
    """The import system for one repository: its folder first, and no modules of others with the same names.

    Its modules stay imported, as in `torch.hub.load`, because functions may import them again when they run; unless
    this process had imported a module of such a name before, which then comes back. Folders inside it that it adds to
    the import path stay there too, but last: this process's own imports come first.
    """
    own = {path.stem for path in code.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()} - _SHARED
    others = tuple(f"{other}/" for other in _RUN if other != code)
    hidden = {}
    for name, module in list(sys.modules.items()):
        # As text: a process has thousands of modules, and may have run many repositories.
        file = str(getattr(module, "__file__", None))
        if file.startswith(others):
            del sys.modules[name]
        elif name.partition(".")[0] in own and not file.startswith(f"{code}/"):
            hidden[name] = sys.modules.pop(name)
    _RUN.add(code)
    before = [path for path in sys.path if not any(Path(path).is_relative_to(each) for each in _RUN)]
    sys.path[:] = [str(code), *before]
    importlib.invalidate_caches()
    try:
        yield
    finally:
        added = [path for path in sys.path if Path(path) != code and Path(path).is_relative_to(code)]
        sys.path[:] = [*before, *dict.fromkeys(added)]
        tops = {name.partition(".")[0] for name in hidden}
        for name in [name for name in sys.modules if name.partition(".")[0] in tops]:
            del sys.modules[name]
        sys.modules.update(hidden)


@contextlib.contextmanager
def files_read(folder: Path) -> Iterator[list[Path]]:
    """The files in a folder that are opened meanwhile and are there at the end: the list is full when this ends."""
    _hear()
    names, found = list[str](), list[Path]()
    _READ.append(names)
    try:
        yield found
    finally:
        _READ.remove(names)
    paths = dict.fromkeys(Path(os.path.abspath(name)) for name in names)  # noqa: PTH100 - links stay as they are
    found += [path for path in paths if path.is_relative_to(folder) and path.is_file()]


@functools.cache
def _hear() -> None:
    """Adds the hook, which stays: Python has no way to remove one."""
    sys.addaudithook(_note)


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _READ and event == "open" and isinstance(arguments[0], str):
        for names in _READ:
            names.append(arguments[0])
