"""Integrated gradients: against integrals by hand and captum's own, to words and regions, and what has none."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn

from helpers.command import modules_after
from helpers.tiny_folders import WORDS, save_folder
from shardyard.v1 import model_service_pb2 as pb
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.answering.explain import EXPLAIN, explain
from shardyard_trainer.answering.infer import PREDICT, answerer
from shardyard_trainer.explaining.embeddings import line_of_tokens
from shardyard_trainer.explaining.integral import FIRST_STEPS, Integral, Line, Unexplainable, integrate
from shardyard_trainer.explaining.regions import shares_of_regions
from shardyard_trainer.explaining.words import Token, shares_of_words
from shardyard_trainer.inputs.image_settings import PictureSettings, box_seen, processed

LABELS = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}


def run(steps: Generator[None, None, Integral]) -> tuple[Integral, int]:
    """What a computation returns, and how many turns it took."""
    turns = 1
    try:
        while True:
            next(steps)
            turns += 1
    except StopIteration as end:
        return end.value, turns


def along(start: list[float], end: list[float], output: Callable[[torch.Tensor], torch.Tensor]) -> Line:
    return Line(torch.tensor([start]), torch.tensor([end]), output, 1)


def ask(folder: Path, instance: pb.Instance, **fields: Any) -> worker_pb2.ExplainReply:
    request = pb.ExplainPredictionRequest(model="m", instance=instance, **fields)
    call = worker_pb2.ExplainCall(folder=str(folder), request=request)
    return worker_pb2.ExplainReply.FromString(explain(call.SerializeToString()))


def test_the_shares_of_a_sum_are_its_parts_exactly() -> None:
    weights = torch.tensor([2.0, -3.0, 0.5])
    found, _ = run(integrate(along([1.0, 1, 1], [4.0, 2, -7], lambda rows: rows @ weights), 256))
    assert found.shares.tolist() == [[6.0, -3.0, -4.0]]
    assert (found.output, found.baseline_output, found.error, found.steps) == (-1.5, -0.5, 0.0, FIRST_STEPS)


def test_the_shares_of_a_product_are_those_by_hand() -> None:
    """x y along (1, 2) + t (2, 3): of x 2 ∫ (2 + 3t) dt = 7, of y 3 ∫ (1 + 2t) dt = 6; z³ along 1 + t: 2³ - 1 = 7."""
    line = along([1.0, 2, 1], [3.0, 5, 2], lambda rows: rows[:, 0] * rows[:, 1] + rows[:, 2] ** 3)
    found, _ = run(integrate(line, 256))
    assert found.shares[0].tolist() == pytest.approx([7.0, 6.0, 7.0], abs=1e-5)
    assert found.is_complete and found.output - found.baseline_output == pytest.approx(20)


def test_a_jump_is_found_and_halved_until_the_shares_add_up() -> None:
    """All of the change is in the last hundredth of the line, between the first gradients."""
    line = along([0.0, 0.0], [1.0, 1.0], lambda rows: torch.relu(rows[:, 0] - 0.991) * 1000 + 0.01 * rows[:, 1])
    found, _ = run(integrate(line, 256))
    assert found.is_complete and FIRST_STEPS < found.steps < 128
    assert found.shares[0].tolist() == pytest.approx([9.0, 0.01], rel=0.02)
    few, _ = run(integrate(line, FIRST_STEPS))
    assert (few.is_complete, few.steps) == (False, FIRST_STEPS)
    assert few.error > 0.02 and few.error == pytest.approx(abs(float(few.shares.sum()) - 9.01) / 9.01, rel=1e-3)


def test_a_step_has_no_gradients_that_add_up_and_it_says_so_within_its_bound() -> None:
    line = along([0.0], [1.0], lambda rows: (rows[:, 0] > 0.3).float() * 5 + rows[:, 0])
    found, _ = run(integrate(line, 64))
    assert not found.is_complete and found.steps <= 64 and found.error == pytest.approx(5 / 6, rel=1e-3)


def test_an_input_that_is_its_own_baseline_has_no_shares() -> None:
    found, _ = run(integrate(along([1.0, 2.0], [1.0, 2.0], lambda rows: rows.sum(1) ** 2), 256))
    assert found.shares.tolist() == [[0.0, 0.0]] and (found.error, found.is_complete) == (0.0, True)


@pytest.mark.parametrize("positions", [1, 100, 300, 5000])
def test_a_turn_has_few_positions_and_long_inputs_are_as_exact(positions: int) -> None:
    rows_at_once = 0

    def output(rows: torch.Tensor) -> torch.Tensor:
        nonlocal rows_at_once
        rows_at_once = max(rows_at_once, len(rows))
        return torch.tanh(rows).prod(1)

    line = Line(torch.tensor([[0.1, -0.4]]), torch.tensor([[1.5, 2.0]]), output, positions)
    found, turns = run(integrate(line, 256))
    assert found.is_complete
    assert rows_at_once <= max(512 // positions, 1) and (turns > FIRST_STEPS or positions < 300)


def test_what_gives_no_gradient_or_no_number_is_refused() -> None:
    with pytest.raises(Unexplainable, match="gradients do not reach"):
        run(integrate(along([0.0], [1.0], lambda rows: rows.detach()[:, 0] * 2), 64))
    with pytest.raises(Unexplainable, match="gradients do not reach"):
        run(integrate(along([0.0], [1.0], lambda rows: torch.ones(len(rows), requires_grad=True) * 2), 64))
    with pytest.raises(Unexplainable, match="nan"):
        run(integrate(along([0.0], [1.0], lambda rows: rows[:, 0] * math.nan), 64))
    with pytest.raises(Unexplainable, match="not numbers"):
        run(integrate(along([0.0], [1.0], lambda rows: torch.sqrt(rows[:, 0] * 0.0) + rows[:, 0]), 64))


def test_the_shares_of_tokens_are_those_of_captum(tmp_path: Path) -> None:
    """By the layer's own method of captum on transformers' model, with many steps."""
    from captum.attr import LayerIntegratedGradients

    folder = save_folder(tmp_path / "m", "BertForSequenceClassification", **LABELS)
    found = ask(folder, pb.Instance(text="the dog is not cute ."), target="good", max_steps=2048).response
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ids = transformers.AutoTokenizer.from_pretrained(folder)("the dog is not cute .", return_tensors="pt").input_ids
    blank = torch.where((ids == 2) | (ids == 3), ids, 4)
    by_layer = LayerIntegratedGradients(lambda given: model(given).logits[:, 1], model.bert.embeddings.word_embeddings)
    wanted = by_layer.attribute(ids, blank, n_steps=400, method="gausslegendre", internal_batch_size=50)
    scores = [each.score for each in found.attributions]
    assert [each.text for each in found.attributions] == ["the", "dog", "is", "not", "cute", "."]
    assert scores == pytest.approx(wanted.sum(-1)[0, 1:-1].tolist(), rel=0.05, abs=0.05 * max(map(abs, scores)))
    assert sum(scores) == pytest.approx(found.output - found.baseline_output, rel=0.02)
    with torch.no_grad():
        assert found.output == pytest.approx(model(ids).logits[0, 1].item(), abs=1e-5)
        assert found.baseline_output == pytest.approx(model(blank).logits[0, 1].item(), abs=1e-5)


class Bag(nn.Module):
    """The sum of the tokens' weights, read as a test wants it."""

    def __init__(self, read: Callable[[nn.Embedding, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.config = SimpleNamespace(is_encoder_decoder=False, model_type="bag")
        self.table, self._read = nn.Embedding(50, 3), read
        self.other = nn.Embedding(50, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self._read(self.table, ids).sum((1, 2))


IDS, BLANKS = [7, 9, 7, 30], [7, 4, 4, 30]


def of_bag(bag: Bag) -> Line:
    return line_of_tokens(bag, IDS, BLANKS, lambda count: bag(torch.tensor([IDS]).expand(count, -1)))


READS: dict[str, Callable[[nn.Embedding, torch.Tensor], torch.Tensor]] = {
    "as usual": lambda table, ids: table(ids),
    "by name": lambda table, ids: table(input=ids),
    "changed in place": lambda table, ids: table(ids).mul_(2),
    "turned": lambda table, ids: table(ids.T).transpose(0, 1),
    "row by row": lambda table, ids: torch.cat([table(row[None]) for row in ids]),
    "with more behind": lambda table, ids: table(torch.nn.functional.pad(ids, (0, 1), value=3)),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_tokens_are_exchanged_however_a_model_reads_them(
    read: Callable[[nn.Embedding, torch.Tensor], torch.Tensor],
) -> None:
    bag = Bag(read)
    line = of_bag(bag)
    found, _ = run(integrate(line, 64))
    factor = 2 if read is READS["changed in place"] else 1
    with torch.no_grad():
        wanted = factor * (bag.table(torch.tensor(IDS)) - bag.table(torch.tensor(BLANKS))).sum(-1)
    assert torch.allclose(found.shares[0, :4].float(), wanted, atol=1e-5)
    assert found.output == pytest.approx(float(bag(torch.tensor([IDS])).detach()), abs=1e-5)


def test_a_model_whose_tokens_cannot_be_exchanged_is_refused() -> None:
    both = Bag(lambda table, ids: table(ids))
    both._read = lambda table, ids: table(ids) + both.other(ids)
    with pytest.raises(Unexplainable, match="2 layers"):
        of_bag(both)
    with pytest.raises(Unexplainable, match="no layer"):
        of_bag(Bag(lambda table, ids: table.weight[ids]))


def test_words_lose_no_share() -> None:
    draw = random.Random(7)
    for _ in range(300):
        text = "".join(draw.choices("ab ,\n'é\u0301東🙂", k=draw.randrange(20)))
        starts = [draw.randrange(len(text) + 1) for _ in range(draw.randrange(8))]
        tokens = [Token("text", at, min(at + draw.randrange(6), len(text)), draw.uniform(-5, 5)) for at in starts]
        rest = draw.uniform(-1, 1)
        found = shares_of_words({"text": text}, tokens, rest)
        total = sum(token.share for token in tokens) + rest
        assert sum(each.score for each in found.attributions) + found.rest == pytest.approx(total, abs=1e-6)
        ends = [(each.start, each.end) for each in found.attributions]
        assert ends == sorted(ends) and all(one[1] <= other[0] for one, other in itertools.pairwise(ends))
        assert [each.text for each in found.attributions] == [text[start:end] for start, end in ends]


def test_tokens_become_the_words_that_they_are_of() -> None:
    text = "Unhappily, don't 🙂 go\n\nhome 東京"
    pieces = [(0, 2), (2, 9), (9, 10), (10, 14), (14, 16), (16, 18), (17, 18), (18, 21), (21, 23), (23, 27), (27, 30)]
    found = shares_of_words({"text": text}, [Token("text", *piece, 1.0) for piece in pieces], 0.0)
    assert [(each.text, each.score) for each in found.attributions] == [
        ("Unhappily", 2), (",", 1), ("don", 1), ("'t", 1), ("🙂", 2), ("go", 1), ("\n\n", 1), ("home", 1), ("東京", 1),
    ]  # fmt: skip


@pytest.mark.parametrize(("side", "patch", "rows"), [((24, 24), 8, 3), ((30, 50), None, 14), ((8, 7), 0, 8)])
def test_regions_lose_no_share_and_are_the_patches(side: tuple[int, int], patch: int | None, rows: int) -> None:
    shares = torch.rand(1, *side, dtype=torch.float64) - 0.5
    settings = PictureSettings(side, None, None, 2, 1 / 255, (0.5,) * 3, (0.5,) * 3)
    found = shares_of_regions(shares, SimpleNamespace(patch_size=patch), settings, (100, 60))
    assert found.rows == rows and len(found.values) == found.rows * found.columns
    assert sum(found.values) == pytest.approx(float(shares.sum()), abs=1e-9)
    if patch == 8:
        assert found.values[1] == pytest.approx(float(shares[0, :8, 8:16].sum()))
    assert (found.left, found.top, found.right, found.bottom, found.width, found.height) == (0, 0, 100, 60, 100, 60)


@pytest.mark.parametrize("size", [(120, 80), (64, 200), (64, 64)])
def test_the_part_that_a_model_sees_is_where_it_says(size: tuple[int, int]) -> None:
    """Of a picture whose colours are its places."""
    across, down = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    picture = Image.fromarray(np.stack([across, down, 0 * down], -1).astype(np.uint8))
    settings = PictureSettings(None, 40, (32, 32), 2, 1.0, (0.0,) * 3, (1.0,) * 3)
    seen, (left, top, right, bottom) = processed(picture, settings), box_seen(size, settings)
    middle = seen[:2, 15:17, 15:17].mean((1, 2)) / 255
    assert middle == pytest.approx([(left + right) / 2 / size[0], (top + bottom) / 2 / size[1]], abs=0.02)
    corner = seen[:2, 0, 0] / 255
    assert corner == pytest.approx([left / size[0], top / size[1]], abs=0.03)


def test_a_border_around_a_smaller_picture_is_part_of_what_a_model_sees() -> None:
    settings = PictureSettings(None, None, (32, 32), 2, 1.0, (0.0,) * 3, (1.0,) * 3)
    assert box_seen((16, 20), settings) == (-8.0, -6.0, 24.0, 26.0)


def test_others_are_answered_while_an_explanation_is_computed(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "m", "BertForSequenceClassification", **LABELS)
    instance = pb.Instance(text=" ".join(WORDS[:13] * 2))
    why = pb.ExplainPredictionRequest(model="m", instance=instance, max_steps=2048)
    what = pb.PredictRequest(model="m", instances=[instance])
    many = answerer(b"")
    many.add(1, EXPLAIN, ("a",), worker_pb2.ExplainCall(folder=str(folder), request=why).SerializeToString())
    for _ in range(4):  # It is read, predicted, and begun.
        many.choose()
        assert not many.compute()
    many.add(2, PREDICT, ("b",), worker_pb2.PredictCall(folder=str(folder), request=what).SerializeToString())
    order = []
    while many.busy:
        many.choose()
        order += [number for number, _, error in many.compute() if error is None]
    assert order == [2, 1]


def test_an_explanation_draws_nothing() -> None:
    code = "from shardyard_trainer.explaining.integral import _method; _method()"
    assert {"captum", "torch"} <= (found := {name.split(".")[0] for name in modules_after(code)})
    assert "matplotlib" not in found
