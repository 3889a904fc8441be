"""The trainer as processes of a gang: it reports, it ends with a cause, and it leaves logs."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from helpers.trainer_processes import TrainerGang
from shardyard.v1 import spec_pb2
from shardyard.worker.v1 import worker_pb2


@pytest.fixture
def start() -> Iterator[Callable[..., TrainerGang]]:
    gangs = []

    def begin(*arguments: object, **options: object) -> TrainerGang:
        gangs.append(TrainerGang(*arguments, **options))  # type: ignore[arg-type]
        return gangs[-1]

    yield begin
    for gang in gangs:
        gang.close()


def attempt_of(folder: Path, *, world_size: int = 2, steps: int = 6, rows: int = 60) -> worker_pb2.AttemptSpec:
    """A classifier on words that tell their label."""
    data = folder / "train.tsv"
    if not data.exists():
        lines = [f"{'good fine nice' if row % 2 else 'bad poor sad'} word{row % 7}\t{row % 2}" for row in range(rows)]
        data.write_text("text\tlabel\n" + "\n".join(lines) + "\n")
    attempt = worker_pb2.AttemptSpec(
        job_name="projects/p/jobs/j",
        job_uid="1" * 32,
        epoch=1,
        job_dir=str(folder),
        attempt_dir=str(folder / "e000001"),
        export_dir=str(folder / "model"),
        world_size=world_size,
        threads_per_rank=1,
        rendezvous=f"file://{folder}/e000001/rendezvous",
        log_interval_s=0.05,
    )
    attempt.locations.data_roots.append(str(folder))
    attempt.locations.cache_dir = str(folder / "cache")
    spec = attempt.spec
    spec.fine_tuning.text_classification.problem = spec_pb2.TextClassification.PROBLEM_SINGLE_LABEL
    spec.fine_tuning.text_classification.max_length = 16
    spec.model.architecture.model_type = "bert"
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
    spec.model.architecture.overrides.update(sizes)
    spec.tokenizer.train.algorithm = spec_pb2.TrainedTokenizer.ALGORITHM_WORDPIECE
    spec.tokenizer.train.vocab_size = 100
    spec.train_data.uri = str(data)
    spec.optimization.max_steps = steps
    spec.optimization.global_batch_size = 8
    spec.optimization.learning_rate = 1e-3
    spec.resources.workers = world_size
    spec.parallelism.zero_stage = 1 if world_size > 1 else 0
    return attempt


def test_two_ranks_train_a_classifier_and_leave_a_model_and_logs(
    tmp_path: Path, start: Callable[..., TrainerGang]
) -> None:
    gang = start(attempt_of(tmp_path))
    assert gang.wait() == [0, 0]
    assert not gang.failures()
    # Six steps may be too few to learn anything, of which a warning says.
    kinds = [kind for kind in gang.kinds() if kind not in {"phase", "warning", "metrics"}]
    assert kinds[:2] == ["ready", "resumed"] and kinds[-2:] == ["finished", "exported"]
    assert kinds.index("checkpoint") < kinds.index("canary")
    # Of the other rank there is only what its process uses.
    assert {event.rank for event in gang.events if event.WhichOneof("payload") != "metrics"} == {0}
    for rank in (0, 1):
        assert min(gang.series(f"system/rss_bytes/{rank}").values()) > 50e6
        assert max(gang.series(f"system/cpu_percent/{rank}").values()) > 0
    assert (tmp_path / "model" / "model.safetensors").exists()
    logs = {path.name for path in (tmp_path / "e000001" / "logs").iterdir()}
    assert logs == {f"rank-{rank}.{name}.log" for rank in (0, 1) for name in ("stdout", "stderr")}
    told = [(tmp_path / "e000001" / "logs" / f"rank-{rank}.stderr.log").read_text() for rank in (0, 1)]
    committed = [event.checkpoint.path for event in gang.events if event.HasField("checkpoint")]
    assert committed and all(path in told[0] and path not in told[1] for path in committed)


def test_an_evaluation_with_one_answer_is_warned_about(tmp_path: Path, start: Callable[..., TrainerGang]) -> None:
    attempt = attempt_of(tmp_path, world_size=1)
    (tmp_path / "test.tsv").write_text("text\tlabel\n" + "good word1\t1\n" * 4)
    attempt.spec.eval_data.uri = str(tmp_path / "test.tsv")
    gang = start(attempt)
    assert gang.wait() == [0]
    told = [event.warning for event in gang.events if event.HasField("warning")]
    assert [(each.reason, "mcc is 0" in each.message) for each in told if each.reason != "NEW_HEAD"] == [
        ("ONE_ANSWER", True)
    ]


def test_a_run_that_answers_everything_alike_says_so_within_its_first_tenth(
    tmp_path: Path, start: Callable[..., TrainerGang]
) -> None:
    attempt = attempt_of(tmp_path, steps=400)
    # The texts tell nothing of their labels.
    (tmp_path / "train.tsv").write_text("text\tlabel\n" + "good word\t0\ngood word\t1\n" * 80)
    attempt.log_interval_s = 1000.0
    gang = start(attempt)
    gang.wait_for(lambda event: event.warning.reason == "NOT_LEARNING")
    told = next(event.warning.message for event in gang.events if event.warning.reason == "NOT_LEARNING")
    assert "it answers 16 samples of the evaluation data alike (mcc is 0), with a loss of 0." in told
    assert "label frequencies alone give 0.69" in told
    assert not any(event.progress.step > 40 for event in gang.events)


def test_rank_0_asks_at_least_once_a_second_and_a_rank_killed_is_felt_by_its_peer(
    tmp_path: Path, start: Callable[..., TrainerGang]
) -> None:
    gang = start(attempt_of(tmp_path, steps=1_000_000))
    gang.wait_for(lambda event: event.progress.step > 50)
    listening = [
        connection.laddr.ip
        for rank in gang.ranks
        for connection in psutil.Process(rank.pid).net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    assert set(listening) <= {"127.0.0.1", "::1"}
    gang.ranks[1].send_signal(signal.SIGKILL)
    assert gang.wait() == [1, -9]
    times = gang.request_times[0]
    assert max(later - earlier for earlier, later in itertools.pairwise(times)) < 5
    (event,) = gang.failures()
    assert event.rank == 0 and event.failure.reason == "WORKER_LOST" and event.failure.step > 50
    assert event.failure.metadata["secondary"] == "true"


def test_a_directive_stops_the_gang_with_a_checkpoint(tmp_path: Path, start: Callable[..., TrainerGang]) -> None:
    def reply(request: worker_pb2.ReportRequest) -> worker_pb2.ReportReply:
        answer = worker_pb2.ReportReply()
        if any(event.progress.step >= 4 for event in request.events):
            answer.directive.action = worker_pb2.Directive.ACTION_CHECKPOINT_AND_STOP
            answer.directive.reason = "CANCELLED"
        return answer

    gang = start(attempt_of(tmp_path, steps=1_000_000), reply)
    assert gang.wait() == [0, 0]
    [stopped] = [event.stopped for event in gang.events if event.HasField("stopped")]
    assert stopped.reason == "CANCELLED"
    assert (tmp_path / "e000001" / f"step-{stopped.checkpoint_step:09}" / "manifest.json").exists()


def test_a_fenced_rank_exits_at_once_and_leaves_nothing_more(tmp_path: Path, start: Callable[..., TrainerGang]) -> None:
    def reply(request: worker_pb2.ReportRequest) -> worker_pb2.ReportReply:
        return worker_pb2.ReportReply(fenced=any(event.progress.step >= 1 for event in request.events))

    gang = start(attempt_of(tmp_path, world_size=1, steps=1_000_000), reply)
    assert gang.wait() == [3]
    assert not list((tmp_path / "e000001").glob("step-*/manifest.json"))


def test_a_rank_whose_peers_never_come_ends_with_what_it_waited_for(tmp_path: Path) -> None:
    attempt = attempt_of(tmp_path)
    (tmp_path / "e000001").mkdir()
    sent = tmp_path / "sent"
    program = (
        "import sys; from pathlib import Path; from shardyard_trainer import entry; entry.START_LIMIT_S = 0.5\n"
        f"entry.run(bytes.fromhex(sys.argv[1]), 0, 0, lambda request: Path({str(sent)!r}).write_bytes(request) * b'')"
    )
    command = [sys.executable, "-c", program, attempt.SerializeToString().hex()]
    assert subprocess.run(command, timeout=280).returncode == 1
    failure = worker_pb2.ReportRequest.FromString(sent.read_bytes()).events[0].failure
    assert failure.reason == "ENGINE_START_TIMEOUT" and "the ranks to meet" in failure.message


def test_bad_data_is_the_users_failure_and_names_the_line(tmp_path: Path, start: Callable[..., TrainerGang]) -> None:
    (tmp_path / "train.tsv").write_bytes(b"text\tlabel\nfine\t1\nbad\t0\n\xff\xfe\t1\n")
    gang = start(attempt_of(tmp_path, world_size=1), cold=True)
    assert gang.wait() == [1]
    (event,) = gang.failures()
    assert event.failure.reason == "DATA_ERROR" and event.failure.metadata["line"] == "4"
    assert event.failure.rank == 0 and not event.failure.HasField("step")
    log = (tmp_path / "e000001" / "logs" / "rank-0.stderr.log").read_text()
    assert " ERROR " in log
