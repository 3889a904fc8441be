"""The order of candidates: points for what is known of them, each with its reason (docs/choosing.md).

It is a rule, not a forecast: published results on other data, and the planner's arithmetic. The same candidates in the
same state always come in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from shardyard_trainer.choosing.candidates import HUB, Candidate
from shardyard_trainer.choosing.catalogue import Catalogue, Comparison, Score
from shardyard_trainer.choosing.estimates import Estimate, Wanted

OF_HALF_THE_ERRORS = 10.0
"""Points for half the errors of the reference; twice as many cost the same."""

NO_RESULT = -5.0
"""Without a published result: as if it made 1.4 times the errors of the reference."""

OWN_SAME_TASK, OWN_PRETRAINED = 20.0, 10.0
PRETRAINED_TASKS = ("", "causal_lm", "masked_lm", "span_corruption", "masked_image")
"""What a model of the project may have been pretrained with; empty: a bare backbone."""

OF_TWICE_THE_TIME = -1.0
"""Points for each doubling of the time over that of the fastest candidate."""

FEW_ROWS, LARGE_FOR_FEW_ROWS, UNSTABLE = 1000, 200 * 10**6, -3.0
"""Large models that are trained whole on few rows sometimes fail (Devlin et al., 2019; Mosbach et al., 2021)."""

NEEDS_SETTINGS, TIGHT = -2.0, -1.0
GATED, UNCLEAR_TERMS, UNCHECKED_LICENCE, UNCHECKED_WEIGHTS = -1.0, -1.0, -1.0, -1.0


@dataclass
class Ranked:
    """A candidate that meets the request, its points by criterion, and what speaks for and against it."""

    candidate: Candidate
    estimate: Estimate
    points: dict[str, float] = field(default_factory=dict)
    pros: list[str] = field(default_factory=list)
    cons: list[str] = field(default_factory=list)

    @property
    def total(self) -> float:
        """The sum that decides."""
        return sum(self.points.values())

    def add(self, criterion: str, points: float) -> None:
        """Adds points to a criterion."""
        self.points[criterion] = self.points.get(criterion, 0.0) + points


def rank(
    found: Iterable[tuple[Candidate, Estimate]], catalogue: Catalogue, wanted: Wanted, languages: frozenset[str]
) -> list[Ranked]:
    """Candidates that meet the request, the best first; of equal ones the smaller, then by name."""
    ranked = [Ranked(candidate, estimate) for candidate, estimate in found]
    compared = catalogue.compared_by(wanted.task, languages)
    references = reference_scores(catalogue, compared)
    fastest = min((_seconds(each.estimate) for each in ranked), default=1.0)
    for each in ranked:
        if each.candidate.own is not None:
            _judge_own(each, wanted)
        else:
            _judge_quality(each, compared, references)
            _judge_terms(each, catalogue)
        _judge_data(each, wanted)
        _judge_cost(each, fastest)
        _judge_memory(each)
    # Rounded, so that no machine's last digit decides.
    return sorted(ranked, key=lambda each: (-round(each.total, 6), each.estimate.num_parameters, each.candidate.name))


def reference_scores(catalogue: Catalogue, compared: Sequence[Comparison]) -> Mapping[str, Score]:
    """The result of each benchmark's reference model."""
    entries = {entry.id: entry for entry in catalogue.entries}
    return {
        each.benchmark: next(score for score in entries[each.reference].scores if score.benchmark == each.benchmark)
        for each in compared
    }


def errors_ratio(score: Score, reference: Score) -> float:
    """How many errors a result has for each of the reference's; results are percentages, unless less is better."""
    if score.higher_is_better:
        return max(100.0 - score.value, 0.1) / max(100.0 - reference.value, 0.1)
    return score.value / reference.value


def _judge_quality(each: Ranked, compared: Sequence[Comparison], references: Mapping[str, Score]) -> None:
    """The geometric mean of the errors over the benchmarks that candidate and reference share."""
    if not compared or each.candidate.is_new:
        return
    scores = {score.benchmark: score for score in each.candidate.scores}
    shared = [comparison for comparison in compared if comparison.benchmark in scores]
    if not shared:
        each.add("quality", NO_RESULT)
        each.cons.append(f"no published result on {' or '.join(one.benchmark for one in compared)} to compare it by")
        return
    ratios = [errors_ratio(scores[one.benchmark], references[one.benchmark]) for one in shared]
    ratio = math.exp(sum(map(math.log, ratios)) / len(ratios))
    each.add("quality", -OF_HALF_THE_ERRORS * math.log2(ratio))
    names = sorted({one.reference.rpartition("/")[2] for one in shared})
    where = ", ".join(f"{one.benchmark} {scores[one.benchmark].value:g}" for one in shared)
    text = f"{ratio:.2f} times the errors of {' and '.join(names)}: {where}"
    if each.candidate.name.removeprefix(HUB) in {one.reference for one in shared}:
        text = f"the model that the others are compared with: {where}"
    (each.cons if ratio > 1 else each.pros).append(text)


def _judge_own(each: Ranked, wanted: Wanted) -> None:
    model = each.candidate.own
    assert model is not None
    if model.task == wanted.task:
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in sorted(model.metrics.items())[:4])
        each.add("own", OWN_SAME_TASK)
        each.pros.append(f"a {model.task} model of this project{f' ({numbers})' if numbers else ''}")
    elif model.task in PRETRAINED_TASKS:
        each.add("own", OWN_PRETRAINED)
        how = f"pretrained by {model.task}" if model.task else "a model without a head"
        each.pros.append(f"{how} in this project" if model.source_job else f"{how}, uploaded to this project")
    else:
        each.add("own", 0.0)
        each.cons.append(f"trained for {model.task}: its head is not used")
    each.cons.append("its languages and its licence are not on record")


def _judge_data(each: Ranked, wanted: Wanted) -> None:
    parameters, rows = each.estimate.num_parameters, wanted.rows
    if not rows:
        return
    if each.candidate.is_new:
        tokens = rows * each.estimate.length
        if parameters > tokens:
            each.add("data", -math.log2(parameters / tokens))
            each.cons.append(f"{parameters:,} parameters start at random, and the data has about {tokens:,} tokens")
        return
    is_whole = "spec.fine_tuning.lora.rank" not in each.estimate.settings
    if rows < FEW_ROWS and parameters > LARGE_FOR_FEW_ROWS and is_whole and wanted.trains:
        each.add("data", UNSTABLE)
        each.cons.append(f"{parameters:,} parameters on {rows:,} rows: some runs of large models fail on so few")


def _judge_cost(each: Ranked, fastest: float) -> None:
    seconds = _seconds(each.estimate)
    each.add("cost", OF_TWICE_THE_TIME * math.log2(max(seconds / max(fastest, 1e-9), 1.0)))
    if seconds > 2 * fastest:
        what = "train" if each.estimate.time is not None else "read an input"
        times = seconds / fastest
        shown = f"{times:,.0f}" if times >= 10 else f"{times:.1f}"
        each.cons.append(f"takes {shown} times as long to {what} as the fastest of these")


def _judge_memory(each: Ranked) -> None:
    estimate = each.estimate
    if estimate.settings:
        each.add("settings", NEEDS_SETTINGS)
        words = ", ".join(f"{path}={value}" for path, value in sorted(estimate.settings.items()))
        each.cons.append(f"fits only with {words}")
    if estimate.is_tight:
        each.add("settings", TIGHT)
        each.cons.append("its memory is close to what a worker has")
    available = estimate.memory.available
    if available:
        each.pros.append(f"needs {estimate.memory.total:,} bytes of a worker's {available:,}")


def _judge_terms(each: Ranked, catalogue: Catalogue) -> None:
    candidate = each.candidate
    if candidate.gated:
        each.add("terms", GATED)
        each.cons.append("the Hub gives it only to accounts that accepted its terms")
    if not candidate.is_new and not catalogue.commercial_use.get(candidate.licence, False):
        each.add("terms", UNCLEAR_TERMS)
        each.cons.append(
            f"its licence ({candidate.licence}) has terms of its own, and is not known to allow commercial use: read it"
        )
    if "licence" in candidate.unchecked:
        each.add("terms", UNCHECKED_LICENCE)
    if candidate.unchecked:
        each.cons.append(f"not checked against any source: {', '.join(candidate.unchecked)}")
    if candidate.weights == "unknown":
        each.add("terms", UNCHECKED_WEIGHTS)
        each.cons.append("not checked whether the Hub has its weights as safetensors: the plan says it")


def _seconds(estimate: Estimate) -> float:
    if estimate.time is None:
        return estimate.reading_s
    return estimate.time.expected.seconds + estimate.time.expected.nanos / 1e9
