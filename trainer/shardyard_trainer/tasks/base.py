"""The interface of a task: what the planner, a rank, the export and the answering processes need from it.

A task is stateless and listed in `table`. Code that depends on the task asks the task: no name of a task is compared
outside of the table. The loop knows samples only as references in a fixed order and micro batches as tensors
with their counts; a task knows nothing of ranks, steps or DeepSpeed.
Shape suffixes: B samples, T positions, D width, V vocabulary, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch

from shardyard.v1 import model_service_pb2, plan_pb2, spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.explaining.integral import Line
from shardyard_trainer.inputs.base import Inputs, MicroBatch, Samples
from shardyard_trainer.inputs.imagined import Imagined
from shardyard_trainer.models.loaded import Loaded
from shardyard_trainer.models.loading import quiet
from shardyard_trainer.models.sources import ModelChoice
from shardyard_trainer.tasks.adaptation import adapt
from shardyard_trainer.tasks.module import HuggingFaceModule, ModuleOutput

if TYPE_CHECKING:
    from shardyard_trainer.tasks.ingredients import Ingredients

Parts = Generator[None, None, list[Any]]
"""A computation that gives others a turn at each `yield`, and returns one result for each instance."""


class Output(Enum):
    """What a job produces."""

    MODEL = plan_pb2.JOB_OUTPUT_MODEL
    DATASET = plan_pb2.JOB_OUTPUT_DATASET
    METRICS = plan_pb2.JOB_OUTPUT_METRICS
    FORMAT = plan_pb2.JOB_OUTPUT_FORMAT
    COPY = plan_pb2.JOB_OUTPUT_COPY


class TaskWarning(NamedTuple):
    """A warning: reason (such as `NEW_HEAD`), message, and the spec's field. It does not stop the job."""

    reason: str
    message: str
    field: str = ""


class Footprint(NamedTuple):
    """A task's input to the memory formulas.

    `num_logits` is how many outputs a position has (the vocabulary; 0 if a head has a few a sample), `chunk` how many
    positions have their logits in memory at once (0: all of them), `activation_bytes` what the backward pass keeps of a
    position in fp32 (0: by the formula for transformers), `forward_flops` what a forward pass computes for one, each
    product and sum counted, attention included (0: likewise), `encoded` the part of the positions that the encoder of
    an encoder-decoder reads; the others are its decoder's. `predicted` is the part that have outputs at all.
    """

    num_logits: int
    chunk: int
    activation_bytes: int = 0
    forward_flops: int = 0
    encoded: float = 0.0
    predicted: float = 1.0


WriteBatch = Callable[[Callable[..., Any], MicroBatch, Callable[[bool], bool]], Sequence[Sequence[int]]]
"""Generates tokens for each sample of a micro batch with a forward pass of the module. Calls its last argument after
each step, with whether a text is unfinished, and ends when that returns false."""


class Metrics(Protocol):
    """Collects an evaluation's data on one rank; the parts of all ranks are then combined."""

    @property
    def write(self) -> WriteBatch | None:
        """Writes the sequences that the metrics need; None: they need none."""

    def update(self, batch: MicroBatch, output: ModuleOutput) -> None:
        """Takes one micro batch, evaluated with return_outputs=True."""

    def part(self) -> Any:
        """The data of this rank: numpy arrays and numbers, for all_gather_object."""

    def compute(self, parts: Sequence[Any]) -> dict[str, float]:
        """The metrics over all ranks' parts, `loss` (mean a unit) among them."""

    def directions(self) -> Mapping[str, int]:
        """The metrics that evaluations can be compared by: 1 if more is better, -1 if less is; `loss` first.

        `compute` gives a value for each of them, whatever the data is.
        """


class Prepared(Protocol):
    """A task with its model chosen and its data read, as the planner and every rank see it."""

    unit: str
    """`token` or `sample`: what the loss is averaged over."""

    length: int
    """Positions of a packed sequence, or of the longest sample."""

    smallest_batch: int
    """Samples that a step needs at least to learn anything."""

    choice: ModelChoice

    learning_rate: float | None
    """The peak learning rate for a pretrained model if the spec gives none; None: as most tasks have it."""

    # Properties, so that a task can narrow their types.
    @property
    def task(self) -> TrainingTask:
        """The task that prepared it."""

    @property
    def inputs(self) -> Inputs:
        """Encodes inputs, in training and when answering."""

    @property
    def train(self) -> Samples:
        """The training samples."""

    @property
    def eval(self) -> Samples | None:
        """The evaluation samples; None if nothing is evaluated."""

    @property
    def warnings(self) -> Sequence[TaskWarning]:
        """All warnings."""

    def make_module(self, *, meta: bool) -> HuggingFaceModule:
        """Builds the module; random weights come from torch's current generator. `meta`: without weights."""

    def metrics(self) -> Metrics:
        """A new, empty collector of metrics."""

    def resolve(self, message: Any) -> None:
        """Fills the defaults and everything found into the task's own message of the spec."""

    def footprint(self) -> Footprint:
        """The input to the memory formulas."""

    def describe(self) -> Mapping[str, Any]:
        """The content of `shardyard.json`: task, labels, problem, pooling, max_length, head; JSON values only."""

    def judge(self, metrics: Mapping[str, float]) -> TaskWarning | None:
        """A warning if the final metrics show that the model learnt nothing, else None."""


@runtime_checkable
class AnswersWithLabels(Protocol):
    """A prepared task whose model may answer everything with one label, which `judge` then says early in a run too."""

    answers_with_labels: bool


class Predictor(Protocol):
    """A loaded model that answers requests in its task's terms. All violations of a request are found at once.

    `read` turns an instance into an `inputs.base.Encoded`, which only the predictor itself interprets.
    """

    @property
    def parameters(self) -> str:
        """The member of `PredictRequest.parameters` that it takes; empty: none."""

    @property
    def takes(self) -> tuple[str, ...]:
        """The members of `Instance.input` that it answers, the usual one first."""

    def refuse(self, request: model_service_pb2.PredictRequest) -> list[worker_pb2.Violation]:
        """Violations found before reading: parameters of another task, instances of another kind."""

    def read(self, instances: Sequence[model_service_pb2.Instance]) -> list[Any]:
        """Encodes instances for the model. Raises SpecError."""

    def complain(self, encoded: Sequence[Any]) -> list[worker_pb2.Violation]:
        """Violations found in instances that were read."""

    def most_bytes(self, request: model_service_pb2.PredictRequest, encoded: Sequence[Any]) -> list[int]:
        """The maximal size in bytes of the answer to each instance, known before anything is computed."""

    def answer(self, request: model_service_pb2.PredictRequest, encoded: Sequence[Any], places: Sequence[int]) -> Parts:
        """The answers in the order of the instances; `places`, their positions in their calls, seed randomness."""

    def compare(self, live: HuggingFaceModule, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The outputs of a live module and of this model for the same samples, fp32 on the CPU."""


class Explained(NamedTuple):
    """An output to explain: what is integrated over, what the input is compared with, and what the shares mean.

    `fill` puts the shares of the integral (`Integral.shares`) into the answer, with what is explained.
    """

    line: Line
    baseline: str
    fill: Callable[[torch.Tensor, model_service_pb2.Explanation], None]


@runtime_checkable
class Explainer(Predictor, Protocol):
    """A predictor whose answers can be explained."""

    def refuse_target(self, request: model_service_pb2.ExplainPredictionRequest) -> list[worker_pb2.Violation]:
        """Violations in `target` and `word`, found before reading."""

    def complain_target(
        self, request: model_service_pb2.ExplainPredictionRequest, encoded: Any
    ) -> list[worker_pb2.Violation]:
        """Violations in `target` and `word` for an instance that was read."""

    def explain(
        self,
        request: model_service_pb2.ExplainPredictionRequest,
        encoded: Any,
        prediction: model_service_pb2.Prediction,
    ) -> Explained:
        """The output that is explained, of an instance with its answer. Raises Unexplainable."""


class Task(Protocol):
    """One kind of job; stateless."""

    name: str
    output: Output

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that columns of its data can be mapped to."""


class TrainingTask(Task, Protocol):
    """A kind of job that leaves a model."""

    auto: str
    """The transformers class with its head, such as `AutoModelForMaskedLM`."""

    pipeline: str
    """The pipeline tag on the Hub; empty if the Hub has none."""

    example: str
    """An input as a Python expression for the model card, in which `tokenizer` is known."""

    usage: str
    """The model card's code, run in the model's folder, ending with `logits`; empty: the code for a tokenizer."""

    cuts: bool
    """Whether inputs longer than in training are cut."""

    holds_out_by_lot: bool
    """Whether the seed decides which samples are held out of the training data."""

    @property
    def inputs(self) -> type[Inputs]:
        """The class that reads and writes the task's modality."""

    def prepare(self, job: Ingredients) -> Prepared:
        """Finds, reads and checks model and data. Raises SpecError with all errors found: the first, with `others`."""

    def imagine(self, job: Ingredients, data: Imagined) -> Prepared:
        """As `prepare`, with the same model, but with data of which only the size is imagined: for estimates of memory
        and time before there is any. Raises SpecError for a model that the task does not take.
        """

    def open(self, loaded: Loaded, inputs: Any) -> Predictor:
        """A predictor for a loaded model. Raises FolderInvalid."""


class Teaching(NamedTuple):
    """What a teacher of a task does not share with its student.

    `own` are the fields of the task's message that follow from a model and not from the data. `by_token`: outputs are
    compared token by token, so that both need the same tokenizer.
    """

    own: tuple[str, ...] = ()
    by_token: bool = False


@runtime_checkable
class Teachable(Protocol):
    """A training task whose models can learn from one another (`distillation`)."""

    teaching: Teaching


@runtime_checkable
class Explainable(Protocol):
    """A training task whose models' answers can be explained: their predictor is an `Explainer`."""

    explains: str
    """What has a share in an answer, such as `words`."""


class Graph(NamedTuple):
    """The network of a task as other runtimes have it: its outputs by name, with the names of their axes.

    The first axis is `batch`; an output with the axis `length` has one value, or more, for each position.
    """

    outputs: Mapping[str, tuple[str, ...]]


@runtime_checkable
class Exportable(Protocol):
    """A training task whose models can be written in other formats (`exporting`)."""

    graph: Graph


def has_head(choice: ModelChoice, task: TrainingTask) -> bool:
    """Whether the choice's folder has a head for a task."""
    described = choice.described
    return described is not None and (
        described.task == task.name or (not described.task and described.auto == task.auto)
    )


def build_module(prepared: Prepared, spec: spec_pb2.JobSpec, *, meta: bool = False) -> HuggingFaceModule:
    """Builds the module to train, fp32 on the CPU, the same on every rank for the same spec.

    All randomness comes from the spec's seed. `meta` builds it without memory or weights, for counting.
    Raises SpecError if the weights do not load, or if there are no layers such as LoRA or freezing names.
    """
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.optimization.seed)
        with torch.device("meta" if meta else "cpu"):
            module = prepared.make_module(meta=meta)
            adapt(module, spec.fine_tuning)
        if spec.parallelism.activation_checkpointing:
            compute_again(module)
        return module


def compute_again(module: HuggingFaceModule) -> None:
    """Has layers keep their inputs alone for the backward pass, and compute themselves again there."""
    module.model.activation_checkpointing_enable({"use_reentrant": False})


def at_once(compute: Callable[[], Sequence[Any]]) -> Parts:
    """A computation that takes one turn."""
    return list(compute())
    yield  # The unreachable yield makes this function a generator.


def violation(field: str, reason: str, message: str, **metadata: str) -> worker_pb2.Violation:
    """A violation of a request; `field` is a path from the request."""
    return worker_pb2.Violation(field=field, reason=reason, message=message, metadata=metadata)
