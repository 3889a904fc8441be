"""Runs the code of a repository of PyTorch Hub: a function of its `hubconf.py`, which returns a module.

This is the only place that runs code of others. It is reached from processes of the trainer alone: a rank, or a
confined process that inspects or answers; never from the coordinator. Its callers have checked that the operator
allows the repository (`torch_hub.find_repository`, `folder.check_may_run`).
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import inspect
import random
import socket
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import torch
from torch import nn

from shardyard_trainer.data.errors import listed, nearest, shorten
from shardyard_trainer.models.door import FolderInvalid
from shardyard_trainer.reading import reading

HUBCONF = "hubconf.py"
_OF_LOAD = frozenset(
    name for name, each in inspect.signature(torch.hub.load).parameters.items() if each.kind is not each.VAR_KEYWORD
)
"""Parameters of `torch.hub.load` itself: an argument of such a name would not reach the function."""

_SHARED = frozenset({"torch", "numpy", "transformers", *sys.stdlib_module_names})
"""Modules that a repository shares with this process, whatever its files are called."""

_RUN: set[Path] = set()


class HubCodeFailed(FolderInvalid):
    """The code of a repository gives no model; `part` is the field of the source that it is about."""

    def __init__(self, message: str, *, part: str, **metadata: str) -> None:
        super().__init__(message, **metadata)
        self.part = part


def run_entrypoint(code: Path, entrypoint: str, arguments: Mapping[str, Any]) -> nn.Module:
    """What a function of `hubconf.py` in `code` returns, in evaluation mode and fp32, on the CPU.

    Its random numbers are the same each time, and the caller's stay as they are. Raises HubCodeFailed.
    """
    reading(f"{HUBCONF}, which runs {entrypoint}")
    _check_dependencies(code)
    with _apart(code), torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        _check_call(code, entrypoint, arguments)
        torch.manual_seed(0)
        with _said_of(code, "entrypoint", f"{entrypoint}({_shown(arguments)})"):
            load: Any = torch.hub.load
            found = load(str(code), entrypoint, source="local", trust_repo=True, **arguments)
    if isinstance(found, torch.jit.ScriptModule):
        text = f"{entrypoint} of {HUBCONF} returns a compiled TorchScript module, which cannot be fine-tuned"
        raise HubCodeFailed(f"{text}; return the torch.nn.Module that it was made of", part="entrypoint", file=HUBCONF)
    if not isinstance(found, nn.Module):
        text = f"{entrypoint} of {HUBCONF} returns {_kind(found)}, which is not a torch.nn.Module"
        raise HubCodeFailed(f"{text}; use a function that returns the module alone", part="entrypoint", file=HUBCONF)
    if not any(parameter.numel() for parameter in found.parameters()):
        text = f"{entrypoint} of {HUBCONF} returns a {_kind(found)} without parameters, so nothing can be trained"
        raise HubCodeFailed(f"{text}; use a function that returns a model", part="entrypoint", file=HUBCONF)
    return found.float().requires_grad_(True).eval()


def _check_dependencies(code: Path) -> None:
    """Names all packages of `dependencies` that are missing, before anything runs."""
    try:
        tree = ast.parse((code / HUBCONF).read_bytes())
    except (SyntaxError, ValueError) as error:
        where = f"line {error.lineno}: {error.msg}" if isinstance(error, SyntaxError) else str(error)
        raise HubCodeFailed(f"{HUBCONF} is not Python: {where}; correct it", part="repo", file=HUBCONF) from None
    missing = [name for name in _dependencies(tree) if not _is_there(name, code)]
    if missing:
        raise HubCodeFailed(
            f"{HUBCONF} needs {listed(missing)} (`dependencies`), which this service does not have; have the operator "
            "install what is missing beside the service, or use a repository that does without",
            part="repo",
            file=HUBCONF,
            missing=", ".join(missing),
        )


def _dependencies(tree: ast.Module) -> list[str]:
    """The names in `dependencies`; those that are computed show when they are imported."""
    for statement in tree.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == "dependencies" for target in targets):
            with contextlib.suppress(ValueError, TypeError):
                return [str(name) for name in ast.literal_eval(statement.value)]  # type: ignore[attr-defined]
    return []


def _is_there(name: str, code: Path) -> bool:
    if (code / name).is_dir() or (code / f"{name}.py").is_file():
        return True
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError, AttributeError):  # A part of a package that is missing, or no name of a module.
        return False


def _check_call(code: Path, entrypoint: str, arguments: Mapping[str, Any]) -> None:
    """Imports `hubconf.py` to see that it has the function, and that the arguments fit it."""
    with _said_of(code, "repo", f"importing {HUBCONF}"):
        spec = importlib.util.spec_from_file_location(HUBCONF, code / HUBCONF)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    function = getattr(module, entrypoint, None)
    if not callable(function) or entrypoint.startswith("_"):
        known = sorted(_entrypoints(module))
        there = f"it has {listed(known)}" if known else "it has none; define one that returns a torch.nn.Module"
        raise HubCodeFailed(
            f"{HUBCONF} has no function {shorten(entrypoint)!r}{nearest(entrypoint, known)}; {there}",
            part="entrypoint",
            file=HUBCONF,
            supported=", ".join(known),
        )
    if taken := sorted(_OF_LOAD & set(arguments)):
        text = f"{taken[0]}: torch.hub.load has a parameter of this name itself, so it does not reach {entrypoint}"
        raise HubCodeFailed(f"{text} of {HUBCONF}; leave it out", part=f"arguments.{taken[0]}", file=HUBCONF)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # Some callables have none: calling them shows.
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        text = f"{entrypoint}{signature} of {HUBCONF} does not take ({_shown(arguments)}): {error}"
        raise HubCodeFailed(f"{text}; correct the arguments", part="arguments", file=HUBCONF) from None


def _entrypoints(module: Any) -> Iterator[str]:
    """The functions of a `hubconf.py`, as `torch.hub.list` has them, without modules' classes and the like."""
    for name, value in vars(module).items():
        if callable(value) and not name.startswith("_"):
            yield name


@contextlib.contextmanager
def _said_of(code: Path, part: str, doing: str) -> Iterator[None]:
    try:
        yield
    except (MemoryError, FolderInvalid):
        raise
    except (Exception, SystemExit) as error:  # edge: code of others may raise anything.
        advice = "correct it there, or give other arguments"
        if isinstance(error, URLError | ConnectionError | socket.gaierror):
            advice = "nothing is downloaded here: have the operator put the file into torch's cache (hub/checkpoints)"
        raise HubCodeFailed(
            f"{doing} raises {type(error).__name__}: {shorten(str(error)) or 'without a word'}{_place(error, code)}; "
            f"{advice}",
            part=part,
            file=HUBCONF,
        ) from None


def _place(error: BaseException, code: Path) -> str:
    """The last line of the repository's own code on the way to an error."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_relative_to(code):
            return f" ({path.relative_to(code)}, line {frame.lineno})"
    return ""


@contextlib.contextmanager
def _apart(code: Path) -> Iterator[None]:
    """The import system for one repository: its folder first, and no modules of others with the same names.

    Its modules stay imported, as in `torch.hub.load`, because functions may import them again when they run; unless
    this process had imported a module of such a name before, which then comes back.
    Nothing is compiled into its folder. What the code does to Python's and NumPy's random numbers is undone.
    """
    own = {path.stem for path in code.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()} - _SHARED
    hidden = {}
    for name, module in list(sys.modules.items()):
        file = Path(getattr(module, "__file__", None) or "/")
        if any(file.is_relative_to(other) for other in _RUN if other != code):
            del sys.modules[name]
        elif name.partition(".")[0] in own and not file.is_relative_to(code):
            hidden[name] = sys.modules.pop(name)
    _RUN.add(code)
    before = sys.dont_write_bytecode, random.getstate(), np.random.get_state()
    sys.dont_write_bytecode = True
    random.seed(0)
    np.random.seed(0)
    sys.path.insert(0, str(code))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(code))
        sys.dont_write_bytecode = before[0]
        random.setstate(before[1])
        np.random.set_state(before[2])
        tops = {name.partition(".")[0] for name in hidden}
        for name in [name for name in sys.modules if name.partition(".")[0] in tops]:
            del sys.modules[name]
        sys.modules.update(hidden)


def _shown(arguments: Mapping[str, Any]) -> str:
    return shorten(", ".join(f"{name}={value!r}" for name, value in arguments.items()))


def _kind(found: Any) -> str:
    if isinstance(found, tuple | list):
        return f"a {type(found).__name__} of {len(found)}"
    return f"{type(found).__name__}"
