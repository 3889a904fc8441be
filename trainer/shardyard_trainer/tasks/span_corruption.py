"""Pretraining an encoder-decoder by writing the spans that are missing in a text (Raffel et al., 2020)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import transformers

from shardyard_trainer.data.errors import SpecError
from shardyard_trainer.inputs.imagined import Imagined
from shardyard_trainer.inputs.packed import Corpus
from shardyard_trainer.inputs.sequences import SequenceInputs, end_of
from shardyard_trainer.inputs.spans import NUM_SENTINELS, SpanSamples, num_spans, sentinel_ids, span_frame
from shardyard_trainer.inputs.text import TextInputs
from shardyard_trainer.models import loading
from shardyard_trainer.models.loaded import Loaded
from shardyard_trainer.models.sources import ModelChoice
from shardyard_trainer.tasks.base import Footprint, Output
from shardyard_trainer.tasks.ingredients import Ingredients
from shardyard_trainer.tasks.losses import LOSS_CHUNK
from shardyard_trainer.tasks.metrics import LossSum
from shardyard_trainer.tasks.seq2seq import AUTO, start_of
from shardyard_trainer.tasks.seq2seq_module import Seq2SeqModule, activation_bytes
from shardyard_trainer.tasks.text_writer import TextWriter
from shardyard_trainer.tasks.texts import Packing, PreparedPacked, imagine_packed, prepare_packed

DEFAULT_DENSITY = 0.15
DEFAULT_MEAN_LENGTH = 3.0


class SpanCorruption:
    """The task `span_corruption`."""

    name = "span_corruption"
    output = Output.MODEL
    roles = ("text",)
    auto = AUTO
    pipeline = ""
    example = ""
    usage = (
        f"from transformers import {AUTO}, AutoTokenizer\n\n"
        'tokenizer = AutoTokenizer.from_pretrained(".")  # this folder\n'
        f'model = {AUTO}.from_pretrained(".").eval()\n'
        'inputs = tokenizer("Hello, my <extra_id_0> is cute", return_tensors="pt")\n'
        "written = model.generate(**inputs)\n"
        "print(tokenizer.decode(written[0]))\n"
        "logits = model(**inputs, decoder_input_ids=written[:, :-1]).logits\n"
    )
    cuts = False
    holds_out_by_lot = False
    inputs = SequenceInputs

    def prepare(self, job: Ingredients) -> PreparedSpans:
        """Finds and checks model and data. Raises SpecError."""
        spans = spans_of(job.wanted)

        def samples(corpus: Corpus, choice: ModelChoice, inputs: TextInputs, is_train: bool) -> SpanSamples:
            return SpanSamples(
                corpus,
                inputs.length or 0,
                seed=job.seed,
                is_train=is_train,
                tokenizer=inputs.tokenizer,
                spans=spans,
                start=start_of(choice, job),
            )

        # Documents of a sequence attend to each other, as in T5.
        how = Packing(span_frame, samples, (), _check_end, sentinels=NUM_SENTINELS)
        choice, inputs, splits = prepare_packed(job, AUTO, how)
        number = num_spans(inputs.length or 0, *spans)
        writing = {"max_new_tokens": sum(number) + 1, "decoder_start_token_id": start_of(choice, job)}
        writes = SequenceInputs(inputs.tokenizer, inputs.length, writing=writing)
        return PreparedSpans(choice, writes, splits, job.warnings, spans=spans)

    def imagine(self, job: Ingredients, data: Imagined) -> PreparedSpans:
        """With sequences of one document each. Raises SpecError."""
        names = ("input_ids", "attention_mask", "decoder_input_ids", "labels")
        choice, inputs, splits = imagine_packed(job, data, *names)
        writes = SequenceInputs(inputs.tokenizer, inputs.length)
        return PreparedSpans(choice, writes, splits, job.warnings, spans=spans_of(job.wanted))

    def open(self, loaded: Loaded, inputs: SequenceInputs) -> SpanWriter:
        """A predictor of missing spans. Raises FolderInvalid."""
        return SpanWriter(self.name, loaded, inputs)


TASK = SpanCorruption()


def spans_of(wanted: Any) -> tuple[float, float]:
    """The share of removed tokens, and the mean length of a span; the defaults of T5 if unset."""
    density = wanted.density if wanted.HasField("density") else DEFAULT_DENSITY
    return density, wanted.mean_span_length if wanted.HasField("mean_span_length") else DEFAULT_MEAN_LENGTH


def _check_end(tokenizer: Any) -> None:
    if end_of(tokenizer) is None:
        message = (
            "the tokenizer has no end token, so generated texts would never end; set its eos_token and save it again"
        )
        raise SpecError("spec.tokenizer", "MODEL_INVALID", message)
    sentinel_ids(tokenizer, 1, length=2)


class SpanMetrics(LossSum):
    """`loss` (nats a token that is to be written)."""

    def compute(self, parts: Sequence[Any]) -> dict[str, float]:
        """The metrics over all ranks' parts."""
        return {"loss": self.mean(parts)}


class PreparedSpans(PreparedPacked[SpanSamples]):
    """The task with its model and data."""

    task = TASK

    def __init__(
        self, choice: ModelChoice, inputs: SequenceInputs, splits: Any, warnings: Any, *, spans: tuple[float, float]
    ) -> None:
        super().__init__(choice, inputs, splits, warnings)
        self._spans = spans

    def make_module(self, *, meta: bool) -> Seq2SeqModule:
        """Transformers' own model with its output layer."""
        model, _ = loading.load(transformers.AutoModelForSeq2SeqLM, self.choice, meta=meta)
        loading.ensure_pad_id(model, self.inputs.tokenizer)
        return Seq2SeqModule(model, label_smoothing=0.0)

    def metrics(self) -> SpanMetrics:
        """A new, empty collector of metrics."""
        return SpanMetrics()

    def resolve(self, message: Any) -> None:
        """Fills in length, density and spans."""
        super().resolve(message)
        message.density, message.mean_span_length = self._spans

    def footprint(self) -> Footprint:
        """Logits over the vocabulary, for a chunk of positions at a time; each span adds a sentinel on both sides."""
        config, (taken, number) = self.choice.config, num_spans(self.length, *self._spans)
        source, target = self.length - taken + number + 1, taken + number + 1
        kept = activation_bytes(config, source, target) * (source + target) // self.length
        return Footprint(config.vocab_size, LOSS_CHUNK, kept, encoded=source / max(source + target, 1))

    def describe(self) -> Mapping[str, Any]:
        """The content of `shardyard.json`."""
        return {**super().describe(), "density": self._spans[0], "mean_span_length": self._spans[1]}


class SpanWriter(TextWriter):
    """Writes the missing spans of a text, each after its sentinel."""

    keeps_special = True
