"""Code shared by the tasks of encoder-decoders: pairs of texts, and the model that learns to write targets."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import transformers

from shardyard.v1 import model_service_pb2, spec_pb2
from shardyard_trainer.data import bad_rows
from shardyard_trainer.data.errors import SpecError, nearest, raise_all, shorten
from shardyard_trainer.data.sources import DataFile
from shardyard_trainer.data.text_pair_rows import PairNames, read_pairs
from shardyard_trainer.inputs.base import MicroBatch
from shardyard_trainer.inputs.holdout import split_by_lot
from shardyard_trainer.inputs.imagined import Imagined, ImaginedTokenizer, Longest, token_tensors
from shardyard_trainer.inputs.sequences import (
    Lengths,
    Marker,
    Marks,
    PairTexts,
    SequenceInputs,
    Sequences,
    SequenceSamples,
    end_of,
    load_sequences,
)
from shardyard_trainer.inputs.text import adapt
from shardyard_trainer.models import architectures, loading
from shardyard_trainer.models.generation import end_tokens, generation_settings
from shardyard_trainer.models.sources import ModelChoice
from shardyard_trainer.tasks.base import Footprint, TaskWarning
from shardyard_trainer.tasks.ingredients import Ingredients
from shardyard_trainer.tasks.losses import LOSS_CHUNK
from shardyard_trainer.tasks.sampling import MOST_NEW_TOKENS, Sampling, sampling_of
from shardyard_trainer.tasks.seq2seq_module import Seq2SeqModule, activation_bytes
from shardyard_trainer.tasks.text_writer import read_tokens
from shardyard_trainer.tasks.texts import PreparedText, Splits, TrainingTexts, find_length, find_tokenizer
from shardyard_trainer.tasks.writing import Forward, write_texts

AUTO = "AutoModelForSeq2SeqLM"
USAGE = (
    "import json\n"
    "from pathlib import Path\n\n"
    f"from transformers import {AUTO}, AutoTokenizer\n\n"
    'tokenizer = AutoTokenizer.from_pretrained(".")  # this folder\n'
    f'model = {AUTO}.from_pretrained(".").eval()\n'
    'trained = json.loads(Path("shardyard.json").read_text(encoding="utf-8"))\n'
    'text = trained.get("source_prefix", "") + "Hello, my dog is cute"\n'
    'inputs = tokenizer(text, truncation=True, max_length=trained["max_length"], return_tensors="pt")\n'
    "written = model.generate(**inputs)\n"
    "print(tokenizer.decode(written[0], skip_special_tokens=True))\n"
    "logits = model(**inputs, decoder_input_ids=written[:, :-1]).logits\n"
)


@dataclass(frozen=True)
class Defaults:
    """The default lengths of sources and targets, in tokens."""

    source: int
    target: int


@dataclass(frozen=True)
class Found:
    """A model with tokenizer and data for a task that writes targets for sources."""

    choice: ModelChoice
    inputs: SequenceInputs
    splits: Splits[SequenceSamples]
    lengths: Lengths
    start: int


def prepare_pairs(job: Ingredients, names: PairNames, defaults: Defaults) -> Found:
    """Finds model, tokenizer and pairs of texts. Raises SpecError with all errors at once."""
    choice = job.attempt(lambda: choose(job))
    train_files, eval_files = job.files()
    raise_all(job.errors)
    assert choice is not None and train_files is not None

    def look_through(files: list[DataFile], source: spec_pb2.DataSource, field: str) -> None:
        deque(read_pairs(files, source, names, field=field), maxlen=0)

    prefix = job.wanted.source_prefix
    with job.looking_on(train_files, eval_files, look_through):
        lengths = Lengths(
            find_length(job, choice, "max_source_length", defaults.source, shortest=2),
            min(find_length(job, choice, "max_target_length", defaults.target, shortest=2), MOST_NEW_TOKENS),
        )
        texts = PairTexts(train_files, job.spec.train_data, names, prefix=prefix, field="spec.train_data")
        key = repr((job.field, names, prefix, [file.name for file in train_files]))
        tokenizer = find_tokenizer(job, choice, train_files, texts=TrainingTexts(texts, key))
        choice = adapt(choice, tokenizer, max(lengths.source, lengths.target))
        start = start_of(choice, job)
    marks = Marks(*(_language(job, tokenizer, choice, side) for side in ("source", "target")))
    frame = Marker(tokenizer, marks.target, lengths.target)(tokenizer("", verbose=False)["input_ids"])
    if marks.target is not None and frame[0] != marks.target == frame[-1]:
        # The first mBART's tokenizer ends a text with its language; a decoder then starts with it.
        start = marks.target
    if end_of(tokenizer) is None:
        message = (
            "the tokenizer has no end token, so generated texts would never end; set its eos_token and save it again"
        )
        raise SpecError("spec.tokenizer", "MODEL_INVALID", message)

    def load(files: list[DataFile], source: spec_pb2.DataSource, field: str) -> Sequences:
        found = load_sequences(
            files,
            source,
            names,
            tokenizer,
            lengths=lengths,
            marks=marks,
            prefix=prefix,
            cache_dir=job.cache_dir,
            field=field,
        )
        if found.store.meta["bad_rows"]:
            job.warn(bad_rows.REASON, found.store.meta["bad_rows"], field)
        if found.store.meta["unread"]:
            job.warn(bad_rows.UNREAD, found.store.meta["unread"], field)
        return found

    with job.looking_on(None, eval_files, look_through):
        train = load(train_files, job.spec.train_data, "spec.train_data")
        held_out = load(eval_files, job.spec.eval_data, "spec.eval_data") if eval_files is not None else None
    splits = _split(job, train, held_out, padding=int(tokenizer.pad_token_id or 0), start=start)
    _warn_of_cuts(job, splits, lengths)
    inputs = SequenceInputs(tokenizer, lengths.source, writing=_writing(job, lengths, start, marks, frame))
    return Found(job.accept_weights(choice, AUTO), inputs, splits, lengths, start)


def imagine_pairs(job: Ingredients, data: Imagined, defaults: Defaults) -> Found:
    """The model, and pairs of texts that are imagined, all of the full lengths. Raises SpecError."""
    choice = choose(job)
    lengths = Lengths(
        find_length(job, choice, "max_source_length", defaults.source, shortest=2),
        min(find_length(job, choice, "max_target_length", defaults.target, shortest=2), MOST_NEW_TOKENS),
    )
    tensors = token_tensors(lengths.source, names=("input_ids", "attention_mask"))
    tensors |= token_tensors(lengths.target, names=("decoder_input_ids", "labels"))
    longest = Longest(lengths.source, lengths.target)
    splits = data.splits(lengths.source + lengths.target, tensors, longest)
    return Found(choice, SequenceInputs(ImaginedTokenizer(), lengths.source), splits, lengths, start_of(choice, job))


def choose(job: Ingredients) -> ModelChoice:
    """The spec's model, which must be an encoder-decoder. Raises SpecError."""
    choice = job.choose()
    if refusal := architectures.seq2seq_refusal(choice.config):
        supported = ",".join(sorted(architectures.SEQ2SEQ))
        raise SpecError(job.field, "OBJECTIVE_UNSUPPORTED", refusal, {"supported": supported})
    return choice


def start_of(choice: ModelChoice, job: Ingredients) -> int:
    """The token that the decoder starts with. Raises SpecError if it is unknown."""
    settings = generation_settings(choice.folder) if choice.folder is not None else {}
    found = settings.get("decoder_start_token_id", getattr(choice.config, "decoder_start_token_id", None))
    found = architectures.usual_start(choice.config) if found is None else found
    if not isinstance(found, int) or not 0 <= found < choice.config.vocab_size:
        message = f"decoder_start_token_id is {found}; set it in config.json to the token that the decoder starts with"
        raise SpecError(choice.field, "MODEL_INVALID", message)
    return found


def _split(
    job: Ingredients, train: Sequences, held_out: Sequences | None, *, padding: int, start: int
) -> Splits[SequenceSamples]:
    def samples(data: Sequences, index: np.ndarray) -> SequenceSamples:
        return SequenceSamples(data, index, padding=padding, start=start)

    if held_out is not None:
        return samples(train, np.arange(train.num_pairs)), samples(held_out, np.arange(held_out.num_pairs))
    train_pairs, eval_pairs = split_by_lot(train.num_pairs, job.holdout, job.seed)
    return samples(train, train_pairs), samples(train, eval_pairs) if len(eval_pairs) else None


def _warn_of_cuts(job: Ingredients, splits: Splits[SequenceSamples], lengths: Lengths) -> None:
    for split, of in zip(splits, ("training", "evaluation"), strict=True):
        if split is None:
            continue
        for number, what, most in zip(
            split.num_cut(), ("source", "target"), (lengths.source, lengths.target), strict=True
        ):
            if number:
                message = (
                    f"{number:,} of the {split.num_samples:,} {of} {what}s are longer than {most:,} tokens, and the "
                    f"rest is cut; raise max_{what}_length as far as the model allows, or split the texts"
                )
                job.warn("TEXTS_CUT", message, f"{job.field}.max_{what}_length")


def _language(job: Ingredients, tokenizer: Any, choice: ModelChoice, side: str) -> int | None:
    """The id of the token of a side's language. Raises SpecError."""
    name, field = getattr(job.wanted, f"{side}_token"), f"{job.field}.{side}_token"
    if name:
        vocab = tokenizer.get_vocab()
        if name not in vocab:
            text = f"{shorten(name)!r} is not a token of the tokenizer{nearest(name, tokenizer.get_added_vocab())}"
            raise SpecError(field, "SPEC_INVALID", text)
        return int(vocab[name])
    if not choice.is_fresh and choice.config.model_type in architectures.MARKS_LANGUAGES:
        text = (
            f"{choice.config.model_type} marks languages with tokens; set it, such as en_XX (mBART) or eng_Latn (NLLB)"
        )
        raise SpecError(field, "SPEC_INVALID", text)
    return None


def _writing(job: Ingredients, lengths: Lengths, start: int, marks: Marks, frame: Sequence[int]) -> dict[str, Any]:
    """The settings of generation_config.json that the spec decides; `frame` are the tokens around every target."""
    wanted = job.wanted
    found = {"max_new_tokens": lengths.target, "decoder_start_token_id": start}
    # Generated first, unless the tokenizer puts it at the end of a text.
    if marks.target is not None and frame[0] == marks.target:
        found["forced_bos_token_id"] = marks.target
    for name in ("num_beams", "length_penalty"):
        if wanted.HasField(name):
            found[name] = getattr(wanted, name)
    return found


class PreparedSequences(PreparedText[SequenceSamples]):
    """A task that learns to write targets for sources, with its model and data."""

    unit = "token"
    inputs: SequenceInputs

    def __init__(self, found: Found, warnings: Sequence[TaskWarning], wanted: Any) -> None:
        super().__init__(found.choice, found.inputs, found.splits, warnings)
        self.lengths = found.lengths
        self.start = found.start
        self._smoothing = wanted.label_smoothing
        named = ("source_prefix", "source_token", "target_token")
        self._named = {name: getattr(wanted, name) for name in named if getattr(wanted, name)}

    def make_module(self, *, meta: bool) -> Seq2SeqModule:
        """Transformers' own model with its output layer."""
        model, _ = loading.load(transformers.AutoModelForSeq2SeqLM, self.choice, meta=meta)
        loading.ensure_pad_id(model, self.inputs.tokenizer)
        return Seq2SeqModule(model, label_smoothing=self._smoothing)

    def sampling(self) -> Sampling:
        """How texts are written in evaluation: as `Predict` will with the exported folder."""
        settings = self.inputs.generation(
            self.choice.config, generation_settings(self.choice.folder) if self.choice.folder is not None else {}
        )
        ends = frozenset(end_tokens(self.choice.config, settings, self.inputs.tokenizer))
        return sampling_of(model_service_pb2.GenerationParameters(), settings, ends)

    def write(self, forward: Forward, batch: MicroBatch, go_on: Callable[[bool], bool]) -> list[list[int]]:
        """The tokens that a model writes for a micro batch."""
        writing = write_texts(forward, batch.inputs, self.sampling(), start=self.start, go_on=go_on)
        while True:
            try:
                next(writing)
            except StopIteration as end:
                return list(end.value)

    def read(self, tokens: Sequence[int]) -> str:
        """Written tokens as a text."""
        return read_tokens(self.inputs.tokenizer, tokens, keeps_special=False)

    def resolve(self, message: Any) -> None:
        """Fills in lengths, and the settings for writing."""
        how = self.sampling()
        message.max_source_length, message.max_target_length = self.lengths.source, self.lengths.target
        message.num_beams, message.length_penalty = how.num_beams, how.length_penalty
        if not message.HasField("label_smoothing"):
            message.label_smoothing = 0

    def footprint(self) -> Footprint:
        """Logits over the vocabulary, a chunk of positions at a time; what the longest source and target keep."""
        longest, config = self.train.longest, self.choice.config
        kept = activation_bytes(config, longest.source, longest.target)
        encoded = longest.source / max(longest.source + longest.target, 1)
        return Footprint(config.vocab_size, LOSS_CHUNK, kept, encoded=encoded)

    def describe(self) -> Mapping[str, Any]:
        """The lengths, prefix and tokens for `shardyard.json`; a task adds its name."""
        return {"max_length": self.lengths.source, "max_target_length": self.lengths.target, **self._named}
