"""The budgets of the house: lines of files and functions, parameters of an `__init__`; modules say what they are."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

from helpers.repository import python_files, relative

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 100
MAX_INIT_PARAMETERS = 10


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def num_parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    arguments = node.args
    return len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs) - 1


def test_no_file_is_longer_than_600_lines() -> None:
    lines = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in python_files()}
    assert {name: count for name, count in lines.items() if count > MAX_FILE_LINES} == {}


def test_no_function_is_longer_than_100_lines() -> None:
    lengths = {
        f"{relative(path)}:{node.lineno} {node.name}": length(node)
        for path in python_files()
        for node in functions(path)
    }
    assert {name: count for name, count in lengths.items() if count > MAX_FUNCTION_LINES} == {}


def test_no_init_has_more_than_10_parameters() -> None:
    counts = {
        f"{relative(path)}:{node.lineno}": num_parameters(node)
        for path in python_files()
        for node in functions(path)
        if node.name == "__init__"
    }
    assert {name: count for name, count in counts.items() if count > MAX_INIT_PARAMETERS} == {}


def test_every_module_says_what_it_is() -> None:
    silent = [relative(path) for path in python_files() if tree(path).body and not ast.get_docstring(tree(path))]
    assert silent == []


def test_every_test_asserts_something() -> None:
    quiet = [
        f"{relative(path)}:{node.lineno} {node.name}"
        for path in python_files()
        if relative(path).startswith("tests/")
        for node in functions(path)
        if node.name.startswith("test_") and not asserts(node)
    ]
    assert quiet == []


def asserts(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether it has an assert, a `with` (pytest.raises), or calls something that asserts by its name."""
    return any(
        isinstance(node, ast.Assert | ast.With | ast.AsyncWith)
        or (isinstance(node, ast.Call) and ("assert" in ast.unparse(node.func) or "check" in ast.unparse(node.func)))
        for node in ast.walk(function)
    )
