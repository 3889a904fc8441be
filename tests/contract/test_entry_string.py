"""Coordinator and trainer never import each other: they meet through strings, which are resolved here."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys

from helpers.repository import python_files, relative
from shardyard_coordinator.launch.rank_process import TRAINER

NAMED = re.compile(r"[\"'](shardyard_trainer(?:\.\w+)+:\w+)[\"']")


def resolve(name: str) -> object:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def strings_of_the_coordinator() -> dict[str, str]:
    return {
        name: relative(path)
        for path in python_files()
        if relative(path).startswith("coordinator/")
        for name in NAMED.findall(path.read_text(encoding="utf-8"))
    }


def test_every_string_that_names_the_trainer_leads_to_a_function() -> None:
    names = strings_of_the_coordinator()
    assert names
    assert {name: where for name, where in names.items() if not callable(resolve(name))} == {}


def test_the_program_takes_what_the_launchers_give_it() -> None:
    done = subprocess.run([sys.executable, "-m", TRAINER, "--help"], capture_output=True, text=True, check=True)
    assert {"spec", "--rank", "--local-rank", "--report-fd"} <= set(done.stdout.replace("[", "").split())
