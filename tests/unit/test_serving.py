"""Questions to one model: what is computed together, who comes next, and that neighbours change nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from helpers.tiny_folders import WORDS, save_folder
from shardyard.v1 import model_service_pb2 as pb
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.answering.infer import EMBED, PREDICT, answerer, embed, predict
from shardyard_trainer.answering.serving import Answerer, Steps, Work
from shardyard_trainer.inputs.text import EncodedText as Encoded
from shardyard_trainer.tasks.base import Parts, at_once


def counted(request: bytes) -> Steps:
    """`key count`: answers with how many texts each of its passes had."""
    key, _, count = request.decode().partition(" ")
    sizes = []
    for start in range(0, int(count), 64):
        texts = [Encoded([_BAD if key == "bad" else 1] * 4, [0] * 4)] * min(64, int(count) - start)
        found = yield Work("good" if key == "bad" else key, partial(turn, how_many), texts, range(len(texts)))
        sizes.append(found[0])
    return str(sizes).encode()


_BAD = 9


def turn(compute: Callable[[Sequence[Encoded]], list[int]], some: Sequence[Encoded], _: Sequence[int]) -> Parts:
    return at_once(lambda: compute(some))


def how_many(texts: Sequence[Encoded]) -> list[int]:
    if any(_BAD in text.ids for text in texts):
        raise ValueError("no")
    return [len(texts)] * len(texts)


def all_answers(many: Answerer) -> dict[int, bytes | str]:
    found: dict[int, bytes | str] = {}
    while many.busy:
        many.choose()
        found |= {number: str(error) if error else answer for number, answer, error in many.compute()}
    return found


def asked(*questions: tuple[str, str]) -> Answerer:
    many = Answerer({"count": counted})
    for number, (caller, text) in enumerate(questions):
        many.add(number, "count", (caller,), text.encode())
    return many


def test_what_waits_is_computed_together_as_far_as_a_pass_goes() -> None:
    found = all_answers(asked(*[(str(index), "a 1") for index in range(16)], ("x", "b 2"), ("y", "a 60")))
    assert [found[number] for number in range(16)] == [b"[16]"] * 16
    assert found[16] == b"[2]" and found[17] == b"[60]"


def test_a_small_question_waits_for_less_than_two_passes_of_a_large_one() -> None:
    many = asked(("a", "a 1000"))
    many.choose(), many.compute(), many.choose(), many.compute()
    many.add(1, "count", ("a",), b"b 1")
    passes = []
    while 1 not in passes:
        many.choose()
        passes += [number for number, *_ in many.compute()] or [0]
    # One turn makes it tokens, one may be the large one's, one is its own.
    assert len(passes) <= 3 and many.busy


def test_a_small_question_comes_next_after_the_pass_that_it_met() -> None:
    many = asked(("a", "a 1000"))
    for _ in range(4):
        many.choose()
        assert not many.compute()
    many.add(1, "count", ("b",), b"b 1")
    passes, answered = 0, list[int]()
    while 1 not in answered:
        passes += many.choose() == [0]
        answered += [number for number, *_ in many.compute()]
    assert passes == 0


def test_a_callers_many_questions_do_not_come_before_anothers_one() -> None:
    many = asked(*[("a", "a 64")] * 10, ("b", "b 1"))
    order = []
    while many.busy:
        many.choose()
        order += [number for number, *_ in many.compute()]
    assert order.index(10) <= 1


def test_one_that_fails_fails_alone() -> None:
    found = all_answers(asked(("a", "good 1"), ("b", "bad 1"), ("c", "good 1")))
    assert found[0] == found[2] == b"[1]" and found[1] == "no"


def test_a_question_that_is_cancelled_is_not_answered() -> None:
    many = asked(("a", "a 200"), ("b", "a 200"))
    many.choose(), many.compute(), many.choose()
    many.cancel(0)
    assert set(all_answers(many)) == {1}


@pytest.mark.parametrize(
    ("kind", "function"),
    [("BertForSequenceClassification", PREDICT), ("BertForMaskedLM", PREDICT), ("BertModel", EMBED),
     ("GPT2LMHeadModel", PREDICT), ("GPT2LMHeadModel", EMBED)],
)  # fmt: skip
def test_an_answer_does_not_depend_on_who_else_asks(tmp_path: Path, kind: str, function: str) -> None:
    folder = str(save_folder(tmp_path / "model", kind))
    mask = " [MASK]" if kind == "BertForMaskedLM" else ""
    texts = [" ".join(WORDS[: 1 + index % 7]) + mask for index in range(12)]
    calls = []
    for text in texts:
        instances = [pb.Instance(text=text)]
        if function == PREDICT:
            sampled = kind == "GPT2LMHeadModel"
            request = pb.PredictRequest(instances=instances)
            if sampled:
                request.generation.max_new_tokens, request.generation.temperature = 20, 0.8
            calls.append(worker_pb2.PredictCall(folder=folder, request=request).SerializeToString())
        else:
            request = pb.EmbedRequest(instances=instances)
            calls.append(worker_pb2.EmbedCall(folder=folder, request=request).SerializeToString())
    many = answerer(b"")
    for number, call in enumerate(calls):
        many.add(number, function, (str(number),), call)
    together = all_answers(many)
    alone = [(predict if function == PREDICT else embed)(call) for call in calls]
    for number, expected in enumerate(alone):
        assert numbers(function, together[number]) == pytest.approx(numbers(function, expected), abs=1e-5)
        assert words(function, together[number]) == words(function, expected)


def numbers(function: str, reply: bytes | str) -> list[float]:
    """All numbers of an answer."""
    assert isinstance(reply, bytes), reply
    if function == EMBED:
        return list(worker_pb2.EmbedReply.FromString(reply).response.embeddings[0].values)
    (prediction,) = worker_pb2.PredictReply.FromString(reply).response.predictions
    scores = [each.score for mask in prediction.masked_tokens.masks for each in mask.candidates]
    return [*prediction.logits, *scores]


def words(function: str, reply: bytes | str) -> list[str]:
    """All texts of an answer."""
    assert isinstance(reply, bytes)
    if function == EMBED:
        return []
    (prediction,) = worker_pb2.PredictReply.FromString(reply).response.predictions
    masked = [each.token for mask in prediction.masked_tokens.masks for each in mask.candidates[:1]]
    return [prediction.generated_text, prediction.classification.label, *masked]
