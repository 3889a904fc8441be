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
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from shardyard_trainer.data.errors import listed, nearest, shorten
from shardyard_trainer.models.hub_faults import HUBCONF, HubCodeFailed, said_of
from shardyard_trainer.models.hub_process import apart
from shardyard_trainer.reading import reading

_COMPILED = "_orig_mod"
"""What torch.compile calls the module in its own, which has other names and compiles when it is called."""

_OF_LOAD = frozenset(
    name for name, each in inspect.signature(torch.hub.load).parameters.items() if each.kind is not each.VAR_KEYWORD
)
"""Parameters of `torch.hub.load` itself: an argument of such a name would not reach the function."""


class Made(NamedTuple):
    """What a function returned: the module, whether it came out of torch.compile, and whether all of it was frozen."""

    module: nn.Module
    is_compiled: bool
    was_frozen: bool


def run_entrypoint(code: Path, entrypoint: str, arguments: Mapping[str, Any]) -> Made:
    """What a function of `hubconf.py` in `code` returns, in evaluation mode and fp32, on the CPU.

    Its random numbers are the same each time, and the caller's stay as they are. Parameters that its author froze stay
    frozen, unless all of them are. Raises HubCodeFailed.
    """
    reading(f"{HUBCONF}, which runs {entrypoint}")
    _check_dependencies(code)
    call = f"{entrypoint}({_shown(arguments)})"
    with apart(code), torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        _check_call(code, entrypoint, arguments)
        torch.manual_seed(0)
        with said_of(code, "entrypoint", call):
            load: Any = torch.hub.load
            found = load(str(code), entrypoint, source="local", trust_repo=True, **arguments)
        with said_of(code, "entrypoint", f"what {call} returns"):
            return _made(found, entrypoint)


def _made(found: Any, entrypoint: str) -> Made:
    """The module that a function returned, ready to be tried. Raises HubCodeFailed for what cannot be trained."""
    is_compiled = isinstance(found, nn.Module) and hasattr(found, _COMPILED)
    found = getattr(found, _COMPILED) if is_compiled else found
    if isinstance(found, torch.jit.ScriptModule):
        what, step = "a compiled TorchScript module, which cannot be fine-tuned", "the module that it was made of"
        raise _refused(f"{entrypoint} of {HUBCONF} returns {what}; return {step}")
    if not isinstance(found, nn.Module):
        text = f"{entrypoint} of {HUBCONF} returns {_kind(found)}, which is not a torch.nn.Module"
        raise _refused(f"{text}; use a function that returns the module alone")
    tensors = itertools.chain(found.named_parameters(), found.named_buffers())
    if lazy := next((name for name, tensor in tensors if is_lazy(tensor)), ""):
        text = f"{entrypoint} of {HUBCONF} returns a {_kind(found)} whose {lazy} has no size yet"
        raise _refused(f"{text}; give its lazy layers their sizes (nn.Linear instead of nn.LazyLinear)")
    if not any(parameter.numel() for parameter in found.parameters()):
        text = f"{entrypoint} of {HUBCONF} returns a {_kind(found)} without parameters, so nothing can be trained"
        raise _refused(f"{text}; use a function that returns a model")
    # As statements: a `train` of the module's own may return nothing.
    found.float()
    found._apply(_in_32_bits)  # type: ignore[no-untyped-call]
    found.eval()
    return Made(found, is_compiled, was_frozen=_thaw(found))


def _in_32_bits(tensor: torch.Tensor) -> torch.Tensor:
    """Complex numbers as `float()` leaves the others."""
    return tensor.to(torch.complex64) if tensor.is_complex() else tensor


def _thaw(module: nn.Module) -> bool:
    """Makes a module whose parameters are all frozen, as for inference, fit to be trained; whether it was one."""
    if any(parameter.requires_grad for parameter in module.parameters()):
        return False
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return True


def _refused(text: str) -> HubCodeFailed:
    return HubCodeFailed(text, part="entrypoint", file=HUBCONF)


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
        if isinstance(statement, ast.Assign):
            targets, value = statement.targets, statement.value
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            targets, value = [statement.target], statement.value
        else:
            continue
        if any(isinstance(target, ast.Name) and target.id == "dependencies" for target in targets):
            with contextlib.suppress(ValueError, TypeError):
                return [str(name) for name in ast.literal_eval(value)]
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
    with said_of(code, "repo", f"importing {HUBCONF}"):
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


def _shown(arguments: Mapping[str, Any]) -> str:
    return shorten(", ".join(f"{name}={value!r}" for name, value in arguments.items()))


def _kind(found: Any) -> str:
    if isinstance(found, tuple | list):
        return f"a {type(found).__name__} of {len(found)}"
    return f"{type(found).__name__}"
