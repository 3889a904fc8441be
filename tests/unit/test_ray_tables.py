"""What is read out of Ray's tables: whose processes are whose, and what of a node is held."""

from __future__ import annotations

from typing import Any

import pytest

from shardyard_coordinator.launch.ray_tables import living, node_of, place_of, processes_of

NAME = "sy-job-1"


def address(node: str, port: int) -> dict[str, Any]:
    return {"NodeID": node, "Port": port}


def actor(pid: int, *, name: str = "", kind: str = "RankActor", node: str = "one", owner: int = 7, **times: int) -> Any:
    """A row of the table of actors; a supervisor listens on the port that its ranks have as their owner's."""
    return {
        "Name": name,
        "Pid": pid,
        "ActorClassName": kind,
        "Address": address(node, owner if name else 1000 + pid),
        "OwnerAddress": address("one", owner),
        "StartTime": times.get("start", 100),
        "EndTime": times.get("end", 0),
    }


SUPERVISOR = actor(1, name=NAME, kind="Supervisor", end=200)
CASES: dict[str, tuple[list[Any], dict[str, list[int]]]] = {
    "ranks on two nodes": ([actor(2), actor(3, node="two")], {"one": [1, 2], "two": [3]}),
    "a rank of another supervisor": ([actor(2, owner=8)], {"one": [1]}),
    "a rank of a later one with the same port": ([actor(2, start=201)], {"one": [1]}),
    "a rank of an earlier one with the same port": ([actor(2, start=99)], {"one": [1]}),
    "an actor of another kind": ([actor(2, kind="ComputeActor")], {"one": [1]}),
    "a rank on a node that is gone": ([actor(2, node="gone")], {"one": [1]}),
    "a rank that never got a process": ([actor(0)], {"one": [1]}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_processes_of_a_supervisor_are_its_own_and_those_of_its_ranks(case: str) -> None:
    others, expected = CASES[case]
    nodes = living({"NodeID": node, "Alive": node != "gone"} for node in ("one", "two", "gone"))
    assert processes_of([*others, SUPERVISOR], NAME, children="RankActor", nodes=nodes) == expected


def test_the_newest_supervisor_of_a_name_is_the_one_that_is_named_to_people() -> None:
    again = actor(5, name=NAME, kind="Supervisor", node="two")
    assert place_of([SUPERVISOR, actor(2), again], NAME) == ", process 5 on node two,"
    assert place_of([actor(2)], NAME) == ""


@pytest.mark.parametrize(
    ("free", "used"),
    [
        (None, (0, 0)),
        ({}, (8, 2)),
        ({"CPU": 6.5, "GPU": 1.0}, (2, 1)),
        ({"CPU": 9.0, "GPU": 3.0}, (0, 0)),
    ],
)
def test_what_others_hold_of_a_node_is_what_is_not_free(free: dict[str, float] | None, used: tuple[int, int]) -> None:
    node = {"NodeID": "one", "NodeManagerAddress": "127.0.0.1", "Resources": {"CPU": 8.0, "GPU": 2.0, "memory": 1e9}}
    found = node_of(node, free)
    assert (found["used_cpus"], found["used_gpus"]) == used
    assert (found["cpus"], found["gpus"], found["memory_bytes"]) == (8, 2, 10**9)
