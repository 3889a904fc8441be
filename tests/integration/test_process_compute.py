"""Compute processes: a fork an inspection, with limits; a process a model; and what neither of them may do."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import time
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from helpers.launches import TESTS, gone
from shardyard_coordinator.launch.allowed import Folders
from shardyard_coordinator.launch.confine import landlock_version
from shardyard_coordinator.launch.forks import WarmProcess, WarmProcessGone, rotate
from shardyard_coordinator.launch.process_compute import ProcessCompute, Size
from shardyard_coordinator.launch.protocols import ComputeFailed, ComputeUnavailable, InputFailed

ME = ("local", "mine")
OTHERS = ("local", "theirs")
# Most of it is for a new warm process, which imports torch; without a watch no call would be answered for 200 s.
PATIENCE_S = 60


def made(folder: Path, **settings: object) -> ProcessCompute:
    return ProcessCompute(
        log=folder / "compute.log",
        warm=["helpers.fake_compute"],
        answerer="helpers.fake_compute:answerer",
        environment={"PYTHONPATH": str(TESTS)},
        **settings,  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
async def compute(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ProcessCompute]:
    processes = made(tmp_path_factory.mktemp("compute"), size=Size(memory_bytes=200 * 1024**2))
    await processes.start()
    yield processes
    await processes.close()


async def look(compute: ProcessCompute, name: str, request: bytes = b"", **options: object) -> bytes:
    settings = {"caller": ME, "cpu_s": 20.0, **options}
    return await compute.inspect(f"helpers.fake_compute:{name}", request, **settings)  # type: ignore[arg-type]


async def ask(compute: ProcessCompute, request: bytes, *, caller: tuple[str, ...] = ME, turn_s: float = 20) -> bytes:
    return await compute.ask("fake:ask", "model", request, caller=caller, turn_s=turn_s)


async def test_each_inspection_has_a_process_of_its_own_unless_it_is_about_the_same_files(
    compute: ProcessCompute,
) -> None:
    payload = bytes(range(256)) * 10_000
    assert await look(compute, "echo", payload) == payload
    alone = {await look(compute, "pid") for _ in range(3)}
    assert len(alone) == 3
    same = {await look(compute, "pid", route=b"files") for _ in range(3)}
    assert len(same) == 1 and not same & alone


async def test_a_kept_process_that_is_gone_is_not_the_inputs_fault(compute: ProcessCompute) -> None:
    kept = int(await look(compute, "pid", route=b"kept"))
    os.kill(kept, signal.SIGKILL)
    assert int(await look(compute, "pid", route=b"kept")) != kept


async def test_an_order_ends_at_once_when_the_warm_process_is_killed(tmp_path: Path) -> None:
    warm = await WarmProcess.start(
        warm=["helpers.fake_compute"],
        confine={},
        environment={**os.environ, "PYTHONPATH": str(TESTS)},
        log=tmp_path / "compute.log",
    )
    os.kill(warm.pid, signal.SIGSTOP)  # It leaves the order without an answer.
    order = asyncio.create_task(warm.fork(serve="", memory_bytes=1, network=False))
    await asyncio.sleep(0.1)
    warm.kill()
    async with asyncio.timeout(5):
        with pytest.raises(WarmProcessGone):
            await order
        await warm.close()


async def test_the_end_of_an_order_whose_caller_has_left_is_not_an_error_of_the_loop(tmp_path: Path) -> None:
    said: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context))
    warm = await WarmProcess.start(
        warm=["helpers.fake_compute"],
        confine={},
        environment={**os.environ, "PYTHONPATH": str(TESTS)},
        log=tmp_path / "compute.log",
    )
    os.kill(warm.pid, signal.SIGSTOP)
    order = asyncio.create_task(warm.fork(serve="", memory_bytes=1, network=False))
    await asyncio.sleep(0.1)
    order.cancel()
    with pytest.raises(asyncio.CancelledError):
        await order
    await warm.close()
    gc.collect()  # asyncio reports an unretrieved exception when the task is collected.
    await asyncio.sleep(0)
    assert said == []


async def test_a_fork_whose_caller_has_left_is_ended_and_collected(tmp_path: Path) -> None:
    warm = await WarmProcess.start(
        warm=["helpers.fake_compute"],
        confine={},
        environment={**os.environ, "PYTHONPATH": str(TESTS)},
        log=tmp_path / "compute.log",
    )
    try:
        for _ in range(3):
            order = asyncio.create_task(warm.fork(serve="", memory_bytes=2**30, network=False))
            await asyncio.sleep(0)  # The order is sent, and not answered yet.
            await asyncio.sleep(0)
            order.cancel()
            with pytest.raises(asyncio.CancelledError):
                await order
        # Orders are answered one after the other: what was ordered before this one has been done.
        wanted = await warm.fork(serve="", memory_bytes=2**30, network=False)
        await wanted.end()
        assert psutil.Process(warm.pid).children() == []
    finally:
        await warm.close()


@pytest.mark.parametrize(
    ("name", "request_", "cpu_s", "how"),
    [
        ("fail", b"no such column", 20, "unexpected error"),
        ("die", b"train.csv", 20, "SIGKILL"),
        ("grow", b"300", 20, "memory"),
        ("spin", b"", 1, "takes more than 1 s"),
    ],
)
async def test_what_ends_its_process_is_the_inputs_fault(
    compute: ProcessCompute, name: str, request_: bytes, cpu_s: float, how: str
) -> None:
    with pytest.raises(InputFailed, match=how) as raised:
        await look(compute, name, request_, cpu_s=cpu_s)
    assert raised.value.what == ("train.csv" if name == "die" else "")
    assert await look(compute, "echo", b"on") == b"on"


@pytest.mark.parametrize("name", ["fail_of_the_system", "fail_of_the_system_in_rust"])
async def test_what_the_system_fails_is_not_the_inputs_fault(compute: ProcessCompute, name: str) -> None:
    with pytest.raises(ComputeFailed, match="No space left"):
        await look(compute, name)


async def test_one_that_waits_for_long_without_computing_may_do_better_later(compute: ProcessCompute) -> None:
    with pytest.raises(ComputeUnavailable, match="without computing"):
        await look(compute, "sleep", b"30", cpu_s=0.2)


async def test_the_wait_for_a_turn_does_not_count_and_callers_take_turns(compute: ProcessCompute) -> None:
    await look(compute, "echo")
    begin = time.monotonic()
    many = [asyncio.create_task(look(compute, "sleep", b"0.4", cpu_s=0.3)) for _ in range(6)]
    await asyncio.sleep(0.1)
    assert await look(compute, "echo", b"theirs", caller=OTHERS) == b"theirs"
    assert time.monotonic() - begin < 0.4 + 0.4
    assert await asyncio.gather(*many) == [b"awake"] * 6


async def test_a_caller_that_leaves_before_its_turn_has_none(compute: ProcessCompute) -> None:
    await look(compute, "echo")
    first = asyncio.create_task(look(compute, "sleep", b"0.5"))
    await asyncio.sleep(0.1)
    begin = time.monotonic()
    for _ in range(3):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await look(compute, "sleep", b"20")
    assert await look(compute, "echo", b"next") == b"next"
    assert await first == b"awake" and time.monotonic() - begin < 3


async def test_a_warm_process_that_is_killed_is_replaced_and_no_call_fails(compute: ProcessCompute) -> None:
    fork = psutil.Process(int(await look(compute, "pid", route=b"warm")))
    asked = asyncio.create_task(look(compute, "sleep", b"1"))
    await asyncio.sleep(0.2)
    fork.parent().kill()  # type: ignore[union-attr]
    assert await asked == b"awake"
    await gone(fork.pid)
    assert await look(compute, "echo", b"on") == b"on"


async def test_processes_that_are_all_stopped_are_replaced_and_their_questions_answered(
    compute: ProcessCompute,
) -> None:
    kept = psutil.Process(int(await look(compute, "pid", route=b"stopped")))
    model = psutil.Process(int(await ask(compute, b"pid")))
    warm = kept.parent()
    assert warm is not None
    under_way = asyncio.create_task(look(compute, "sleep", b"1", caller=OTHERS))
    await asyncio.sleep(0.1)
    for each in (warm, *warm.children()):
        each.suspend()
    old = {warm.pid, kept.pid, model.pid}
    async with asyncio.timeout(PATIENCE_S):
        found = await asyncio.gather(look(compute, "pid", route=b"stopped"), ask(compute, b"pid"), under_way)
    assert found[2] == b"awake" and not old & {int(found[0]), int(found[1])}
    for pid in old:
        await gone(pid)


@pytest.mark.parametrize("size", [4, 4 * 1024**2], ids=["a small question", "one over what a socket holds"])
async def test_a_process_that_is_stopped_alone_is_replaced_and_its_question_answered(
    compute: ProcessCompute, size: int
) -> None:
    kept = psutil.Process(int(await look(compute, "pid", route=b"alone")))
    model = psutil.Process(int(await ask(compute, b"pid")))
    warm = kept.parent()
    for each in (kept, model):
        each.suspend()
    async with asyncio.timeout(PATIENCE_S):
        answers = await asyncio.gather(
            look(compute, "echo", bytes(size), route=b"alone"), ask(compute, b"pid" + b" " * size)
        )
    assert answers[0] == bytes(size) and int(answers[1]) != model.pid
    assert warm == psutil.Process(int(await look(compute, "pid", route=b"alone"))).parent()


async def test_a_question_whose_processes_are_stopped_again_and_again_is_not_at_fault(compute: ProcessCompute) -> None:
    asked = asyncio.create_task(look(compute, "stop"))
    with pytest.raises(ComputeUnavailable, match="SIGSTOP"):
        await asked
    with pytest.raises(ComputeUnavailable, match="ended again and again"):
        await ask(compute, b"stop")


async def test_a_process_that_is_stopped_while_it_warms_up_is_replaced(tmp_path: Path) -> None:
    processes = made(tmp_path)
    await processes.start()
    try:
        while not (started := psutil.Process().children()):
            await asyncio.sleep(0.01)
        first = max(started, key=psutil.Process.create_time)
        first.suspend()
        async with asyncio.timeout(PATIENCE_S):
            assert await look(processes, "echo", b"on") == b"on"
        await gone(first.pid)
    finally:
        await processes.close()


async def test_questions_to_a_model_that_come_together_are_computed_together(compute: ProcessCompute) -> None:
    await ask(compute, b"size")
    sizes = await asyncio.gather(*(ask(compute, b"size", caller=("local", str(i))) for i in range(16)))
    assert max(map(int, sizes)) >= 8


async def test_a_small_question_goes_between_the_slices_of_a_large_one(compute: ProcessCompute) -> None:
    await ask(compute, b"size")
    large = [asyncio.create_task(ask(compute, b"size 64")) for _ in range(20)]
    await asyncio.sleep(0.03)
    begin = time.monotonic()
    await ask(compute, b"size", caller=OTHERS)
    assert time.monotonic() - begin < 0.25 and not all(each.done() for each in large)
    await asyncio.gather(*large)


async def test_a_question_that_kills_its_process_fails_alone(compute: ProcessCompute) -> None:
    asked = [asyncio.create_task(ask(compute, word, caller=("local", str(i)))) for i, word in enumerate([b"size"] * 8)]
    with pytest.raises(InputFailed, match="SIGKILL"):
        await ask(compute, b"die")
    assert all(int(each) for each in await asyncio.gather(*asked))
    with pytest.raises(InputFailed, match="unexpected error"):
        await ask(compute, b"fail")
    with pytest.raises(InputFailed, match=r"takes more than 0\.5 s"):
        await ask(compute, b"spin", turn_s=0.5)
    assert await ask(compute, b"size") == b"1"


async def test_closing_ends_the_processes(tmp_path: Path) -> None:
    processes = made(tmp_path)
    await processes.start()
    pids = [int(await look(processes, "pid", route=b"kept")), int(await ask(processes, b"pid"))]
    await processes.close()
    for pid in pids:
        await gone(pid)
        assert not Path(f"/proc/{pid}").exists()


@pytest.mark.skipif(not landlock_version(), reason="the kernel has no Landlock")
async def test_processes_that_open_strangers_files_see_nothing_else(tmp_path: Path) -> None:
    state, data = tmp_path / "state", tmp_path / "data"
    for folder in (state / "storage" / "cache", data):
        folder.mkdir(parents=True)
    (state / "store.db").write_text("tokens")
    (data / "rows.csv").write_text("text")
    folders = Folders((str(data), str(state / "storage")), str(state / "storage" / "cache"), hidden=str(state))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        hub, other = listener.getsockname()[1], free_port()
        processes = ProcessCompute(
            log=state / "compute.log",
            warm=["helpers.fake_compute"],
            folders=folders,
            environment={"PYTHONPATH": str(TESTS), "HF_ENDPOINT": f"http://127.0.0.1:{hub}"},
        )
        await processes.start()
        try:
            rows = [
                ("read", data / "rows.csv", b"text"),
                ("read", state / "store.db", b"not allowed"),
                ("read", "/etc/passwd", b"not allowed"),
                ("read", f"/proc/{os.getpid()}/environ", b"not allowed"),
                ("write", state / "storage" / "cache" / "tokens", b"written"),
                ("write", data / "rows.csv", b"not allowed"),
                ("write", state / "storage" / "model", b"not allowed"),
                ("connect", hub, b"not allowed"),
                ("signal_parent_of_parent", os.getpid(), b"not allowed"),
            ]
            seen = [await look(processes, name, str(what).encode()) for name, what, _ in rows]
            assert seen == [answer for _, _, answer in rows]
            assert await look(processes, "connect", str(hub).encode(), network=True) == b"connected"
            assert await look(processes, "connect", str(other).encode(), network=True) == b"not allowed"
            assert (await processes.confinement())["landlock"] == f"version {landlock_version()}"
        finally:
            await processes.close()


async def test_processes_that_open_strangers_files_inherit_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "RAY_AUTH_TOKEN", "SHARDYARD_TOKEN_CACHE_BYTES"):
        monkeypatch.setenv(name, "1")
    processes = made(tmp_path)
    await processes.start()
    try:
        names = set((await look(processes, "environment")).split())
    finally:
        await processes.close()
    assert {b"PATH", b"PYTHONPATH", b"SHARDYARD_TOKEN_CACHE_BYTES"} <= names
    assert not names & {b"AWS_SECRET_ACCESS_KEY", b"HF_TOKEN", b"RAY_AUTH_TOKEN"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_a_log_that_has_grown_is_rotated_and_one_earlier_is_kept(tmp_path: Path) -> None:
    log = tmp_path / "compute.log"
    with log.open("ab", buffering=0) as writer:
        writer.write(b"x" * 2000)
        rotate(log, most_bytes=1000)
        writer.write(b"after")
    assert log.read_bytes() == b"after"
    assert (tmp_path / "compute.log.1").read_bytes() == b"x" * 1000


def test_a_log_of_any_size_is_rotated_in_little_memory(tmp_path: Path) -> None:
    log = tmp_path / "compute.log"
    log.touch()
    os.truncate(log, 256 * 1024**2)
    tracemalloc.start()
    try:
        rotate(log, most_bytes=1000)
        assert tracemalloc.get_traced_memory()[1] < 1024**2
    finally:
        tracemalloc.stop()
    assert (log.stat().st_size, (tmp_path / "compute.log.1").stat().st_size) == (0, 1000)


async def test_questions_that_wait_for_the_hub_hold_up_no_others(compute: ProcessCompute) -> None:
    callers = [("local", f"hub-{number}") for number in range(4)]
    stuck = [asyncio.create_task(look(compute, "sleep", b"600", caller=each, network=True)) for each in callers]
    await asyncio.sleep(0)
    assert await look(compute, "echo", b"quick", caller=OTHERS) == b"quick"
    assert await look(compute, "echo", b"mine", caller=ME) == b"mine"
    assert not any(task.done() for task in stuck)
    for task in stuck:
        task.cancel()
