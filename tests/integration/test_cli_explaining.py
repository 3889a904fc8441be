"""The command `explain`: what it sends for each kind of input, and what it prints and draws of any answer."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from helpers.script import Script
from helpers.scripted_service import serving
from shardyard.cli.app import run
from shardyard.v1 import explanation_pb2
from shardyard.v1 import model_service_pb2 as pb

HOSTILE = '"><script>alert(1)</script>\x1b[2J'


def an_explanation(*shares: tuple[str, float], part: str = "text", complete: bool = True) -> pb.Explanation:
    attributions, at = [], 0
    for text, score in shares:
        attributions.append(
            explanation_pb2.Attribution(part=part, text=text, start=at, end=at + len(text), score=score)
        )
        at += len(text) + 1
    error = 0.001 if complete else float("inf")
    found = pb.Explanation(target="good", output=1.5, baseline_output=0.5, baseline="nothing", steps=16)
    found.completeness_error, found.is_complete = error, complete
    found.attributions.extend(attributions)
    found.prediction.classification.label = "good"
    return found


def of_a_picture() -> pb.Explanation:
    found = an_explanation()
    found.regions.CopyFrom(
        explanation_pb2.Regions(
            rows=1, columns=2, values=[1.0, -0.5], left=4, top=0, right=12, bottom=8, width=16, height=8
        )
    )
    return found


def png() -> bytes:
    made = io.BytesIO()
    Image.new("RGB", (16, 8), "white").save(made, "PNG")
    return made.getvalue()


@pytest.mark.parametrize(
    ("inputs", "given", "kind"),
    [
        (("text", "pair"), ["a film"], "text"),
        (("text", "pair"), ["--pairs", "a film", "a cat"], "pair"),
        (("question", "pair"), ["--question", "Who?", "--context", "Anna."], "question"),
        (("items",), ["tea", "milk"], "items"),
        (("image",), ["rose.png"], "image"),
    ],
)
def test_one_input_of_each_kind_is_sent_with_what_is_asked_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: tuple[str, ...], given: list[str], kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rose.png").write_bytes(png())
    script = Script(ready={"m"}, inputs=inputs)
    options = ["--target", "good", "--word", "3", "--max-steps", "64"]
    with serving(script) as address:
        assert run(["explain", "m", *given, *options, "--address", address]) == 0
        assert run(["explain", "m", *given, "--address", address]) == 0
    first, second = script.asked("ExplainPrediction")
    assert first.instance.WhichOneof("input") == second.instance.WhichOneof("input") == kind
    assert (first.target, first.word, first.max_steps) == ("good", 3, 64)
    assert not any(second.HasField(name) for name in ("target", "word", "max_steps"))


def test_several_inputs_are_refused_before_anything_is_sent(capsys: pytest.CaptureFixture[str]) -> None:
    script = Script(ready={"m"}, inputs=("text",))
    with serving(script) as address:
        assert run(["explain", "m", "a", "b", "--address", address]) == 2
        assert run(["explain", "m", "a", "--overlay", "x.png", "--address", address]) == 2
    assert not script.asked("ExplainPrediction")
    said = capsys.readouterr().err
    assert "2 are given" in said and "--overlay draws on a picture" in said


def test_what_is_not_complete_is_said_and_nothing_of_a_text_is_obeyed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = an_explanation((HOSTILE, 0.75), ("film", -0.25), complete=False)
    found.target, found.baseline, found.attributions[0].part = HOSTILE, HOSTILE, HOSTILE
    page = tmp_path / "page.html"
    with serving(Script(ready={"m"}, inputs=("text",), explain=found)) as address:
        assert run(["explain", "m", "a", "--html", str(page), "--address", address]) == 0
        printed = capsys.readouterr()
        assert run(["explain", "m", "a", "--json", "--address", address]) == 0
    assert "\x1b" not in printed.out and "film[-0.25]" in printed.out and "do not rely on them" in printed.out
    assert "--max-steps" in printed.err
    assert "<script" not in page.read_text() and page.read_text().count("&lt;script&gt;") >= 4
    plain = json.loads(capsys.readouterr().out)
    assert plain["completeness_error"] is None and not plain["is_complete"]


def test_a_picture_is_drawn_where_the_model_saw_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rose.png").write_bytes(png())
    drawn = tmp_path / "drawn.png"
    given = ["explain", "m", str(tmp_path / "rose.png"), "--overlay", str(drawn)]
    with serving(Script(ready={"m"}, inputs=("image",), explain=of_a_picture())) as address:
        assert run([*given, "--address", address]) == 0
    assert "+9 -4" in capsys.readouterr().out  # 4.5 is rounded to an even number.
    pixels = Image.open(drawn).convert("RGB")
    assert pixels.getpixel((1, 4)) == pixels.getpixel((14, 4)) == (255, 255, 255)
    (red, _, blue), (other_red, _, other_blue) = pixels.getpixel((6, 4)), pixels.getpixel((10, 4))  # type: ignore[misc]
    assert blue > red and other_red > other_blue and red < other_blue, "blue raises, orange lowers, and less"


def test_an_overlay_without_pillow_or_a_place_to_write_it_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rose.png").write_bytes(png())
    given = ["explain", "m", str(tmp_path / "rose.png"), "--overlay"]
    with serving(Script(ready={"m"}, inputs=("image",), explain=of_a_picture())) as address:
        assert run([*given, str(tmp_path / "not" / "there.png"), "--address", address]) == 1
        assert "there.png" in capsys.readouterr().err
        monkeypatch.setitem(sys.modules, "PIL", None)
        assert run([*given, str(tmp_path / "drawn.png"), "--address", address]) == 1
    assert "pip install pillow" in capsys.readouterr().err
    assert not (tmp_path / "drawn.png").exists()
