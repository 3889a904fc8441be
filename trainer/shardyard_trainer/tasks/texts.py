"""Code shared by the tasks on texts: a tokenizer, a length, a packed corpus."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from shardyard.v1 import spec_pb2
from shardyard_trainer.data import bad_rows
from shardyard_trainer.data.columns import layout_key, read_rows
from shardyard_trainer.data.errors import SpecError, raise_all
from shardyard_trainer.data.sources import DataFile
from shardyard_trainer.data.store import files_fingerprint
from shardyard_trainer.inputs import packed, tokenization
from shardyard_trainer.inputs.base import Samples
from shardyard_trainer.inputs.imagined import Imagined, ImaginedTokenizer, text_tensors, token_tensors
from shardyard_trainer.inputs.text import TextInputs, adapt, check_length
from shardyard_trainer.models import architectures, sources
from shardyard_trainer.models.sentence import lower_case
from shardyard_trainer.models.sources import ModelChoice
from shardyard_trainer.tasks.base import TaskWarning, TrainingTask
from shardyard_trainer.tasks.ingredients import Ingredients, why_not_pretrained

DEFAULT_SEQUENCE_LENGTH = 512
DEFAULT_MAX_LENGTH = 128
SHORTEST_SEQUENCE = 8

Corpora = tuple[packed.Corpus, packed.Corpus | None]


S = TypeVar("S", bound=Samples)
Splits = tuple[S, S | None]
"""The training corpus and the evaluation corpus; None if nothing is evaluated."""


class PreparedText(Generic[S]):
    """A task on texts with its model and data."""

    learning_rate: float | None = None
    smallest_batch = 1

    def __init__(
        self, choice: ModelChoice, inputs: TextInputs, splits: Splits[S], warnings: Sequence[TaskWarning]
    ) -> None:
        self.choice = choice
        self.inputs = inputs
        self.train, self.eval = splits
        self.warnings = warnings
        self.length = inputs.length or 0

    def judge(self, metrics: Mapping[str, float]) -> TaskWarning | None:
        """None: the loop already watches the loss."""
        return None


class PreparedPacked(PreparedText[S]):
    """An objective on packed texts with its model and data."""

    unit = "token"
    task: TrainingTask

    def resolve(self, message: Any) -> None:
        """The length of a sequence."""
        message.sequence_length = self.length

    def describe(self) -> Mapping[str, Any]:
        """The content of `shardyard.json`."""
        return {"task": self.task.name, "max_length": self.length}


@dataclass(frozen=True)
class Packing(Generic[S]):
    """How an objective packs texts.

    `make_samples` makes those of a corpus from (corpus, choice, inputs, is_train); `apart` are the model types that
    keep documents of one sequence apart; `sentinels` are how many a tokenizer that is trained here gets.
    """

    make_frame: Callable[[Any], packed.Frame]
    make_samples: Callable[[packed.Corpus, ModelChoice, TextInputs, bool], S]
    apart: Container[str]
    check_tokenizer: Callable[[Any], None] = lambda tokenizer: None
    whole_words: bool = False
    sentinels: int = 0


def prepare_packed(job: Ingredients, auto: str, how: Packing[S]) -> tuple[ModelChoice, TextInputs, Splits[S]]:
    """Prepares model, tokenizer and data for an objective on packed texts. Raises SpecError with all errors at once."""
    choice, inputs, (train, held_out) = _corpora(job, how)

    def samples(corpus: packed.Corpus, *, is_train: bool) -> S:
        found = how.make_samples(corpus, choice, inputs, is_train)
        own = not is_train and job.spec.HasField("eval_data")
        field = "spec.eval_data" if own else "spec.train_data"
        packed.check_enough(corpus, found.num_samples, inputs.length or 0, field=field)
        return found

    splits = samples(train, is_train=not job.only_evaluates), samples(held_out, is_train=False) if held_out else None
    choice = job.accept_weights(choice, auto)
    if choice.config.model_type not in how.apart:
        message = f"{choice.config.model_type} is not known to keep packed documents apart: they see one another"
        job.warn("DOCUMENTS_NOT_SEPARATED", message, "spec.model")
    return choice, inputs, splits


def _corpora(job: Ingredients, how: Packing[S]) -> tuple[ModelChoice, TextInputs, Corpora]:
    choice = job.attempt(lambda: _choose(job))
    train_files, eval_files = job.files()
    raise_all(job.errors)
    assert choice is not None and train_files is not None
    with job.looking_on(train_files, eval_files, read_texts):
        length = find_length(job, choice, "sequence_length", DEFAULT_SEQUENCE_LENGTH, shortest=SHORTEST_SEQUENCE)
        tokenizer = find_tokenizer(job, choice, train_files, sentinels=how.sentinels)
        how.check_tokenizer(tokenizer)
        choice = adapt(choice, tokenizer, length)
    frame = how.make_frame(tokenizer)
    with job.looking_on(train_files, eval_files, read_texts):

        def load(files: list[DataFile], source: spec_pb2.DataSource, field: str) -> Any:
            found = packed.load_corpus(
                files, source, tokenizer, frame, whole_words=how.whole_words, cache_dir=job.cache_dir, field=field
            )
            if found.meta["bad_rows"]:
                job.warn(bad_rows.REASON, found.meta["bad_rows"], field)
            return found

        train = load(train_files, job.spec.train_data, "spec.train_data")
        if eval_files is None:
            found = packed.split(train, job.holdout)
        else:
            held_out = load(eval_files, job.spec.eval_data, "spec.eval_data")
            found = packed.whole(train), packed.whole(held_out)
    return choice, TextInputs(tokenizer, length), found


def read_texts(files: list[DataFile], source: spec_pb2.DataSource, field: str) -> None:
    """Reads all texts once to report their errors and warnings."""
    deque(read_rows(files, source, with_label=False, field=field), maxlen=0)


def choose_reader(job: Ingredients) -> ModelChoice:
    """The model, which gives a vector for each token of a text. Raises SpecError."""
    choice = job.choose()
    if not architectures.reads_text(choice.config):
        supported = architectures.objectives(choice.config)
        raise SpecError(
            job.field,
            "OBJECTIVE_UNSUPPORTED",
            f"{choice.config.model_type} does not give one vector for each token of a text; "
            f"it can be trained for: {', '.join(supported) or 'none'}",
            {"supported": ",".join(supported)},
        )
    return choice


def find_length(
    job: Ingredients, choice: ModelChoice, name: str, default: int, *, shortest: int = 1, beside: int = 0
) -> int:
    """The length as given, else the smaller of the default and the model's limit. Raises SpecError.

    `beside` is the number of further positions that the model needs.
    """
    most = None if choice.is_fresh and not _sets_positions(choice) else architectures.longest(choice.config)
    if job.wanted.HasField(name):
        length: int = getattr(job.wanted, name)
        if length < shortest:
            raise SpecError(f"{job.field}.{name}", "SPEC_INVALID", f"{length} is too small")
        if most is not None:
            check_length(choice, length + beside, field=f"{job.field}.{name}")
        return length
    return min(default, most - beside) if most is not None else default


def imagine_texts(
    job: Ingredients, choice: ModelChoice, data: Imagined, name: str, default: int, *, times: int = 1
) -> tuple[TextInputs, Any]:
    """Inputs and samples of texts that are imagined, as long as `name` in the spec or the default; `times` of them in
    each sample. Raises SpecError.
    """
    length = find_length(job, choice, name, default)
    tensors = text_tensors(times * length, with_types=architectures.has_token_types(choice.config))
    return TextInputs(ImaginedTokenizer(), length), data.splits(times * length, tensors)


def imagine_packed(job: Ingredients, data: Imagined, *names: str) -> tuple[ModelChoice, TextInputs, Any]:
    """Model, inputs and samples of packed sequences that are imagined, with the tensors `names`. Raises SpecError."""
    choice = _choose(job)
    length = find_length(job, choice, "sequence_length", DEFAULT_SEQUENCE_LENGTH, shortest=SHORTEST_SEQUENCE)
    return choice, TextInputs(ImaginedTokenizer(), length), data.splits(length, token_tensors(length, names=names))


class TrainingTexts(NamedTuple):
    """The texts of the data that a tokenizer is trained on, which are read more than once.

    `key` is what they depend on besides the files and their layout: the reader and its settings. A trained tokenizer is
    found again by it, so other texts of the same files need another key.
    """

    texts: Iterable[str]
    key: str


def find_tokenizer(
    job: Ingredients,
    choice: ModelChoice,
    files: list[DataFile],
    *,
    texts: TrainingTexts | None = None,
    sentinels: int = 0,
) -> Any:
    """The spec's tokenizer: the model's own, another one, or one trained on the data.

    Without `texts` it is trained on the text column. A tokenizer that is trained here gets `sentinels` sentinel tokens.
    """
    source = job.spec.tokenizer
    kind = source.WhichOneof("source")
    if kind == "train" or (kind is None and choice.is_fresh):
        if not choice.is_fresh:
            message = "a pretrained model only knows its own tokens; leave the tokenizer out"
            raise SpecError("spec.tokenizer.train", "SPEC_INVALID", message)
        if kind is None:
            message = "a fresh model has no tokenizer; set tokenizer, for example to one trained on the data (train)"
            raise SpecError("spec.tokenizer", "TOKENIZER_MISSING", message)
        tokenizer = _train(job, choice, files, texts, sentinels=sentinels)
    elif kind is None:
        assert choice.folder is not None
        tokenizer = tokenization.load_tokenizer(choice.folder, field="spec.tokenizer")
        if choice.described is not None and choice.described.sentence and choice.described.sentence.lower_case:
            lower_case(tokenizer)
    else:
        folder = sources.find_folder(source, job.locations, field="spec.tokenizer").folder
        tokenizer = tokenization.load_tokenizer(folder, field=f"spec.tokenizer.{kind}")
    if warning := tokenization.ensure_pad(tokenizer):
        job.warn("PAD_TOKEN", warning, "spec.tokenizer")
    return tokenizer


def _train(
    job: Ingredients,
    choice: ModelChoice,
    files: list[DataFile],
    texts: TrainingTexts | None,
    *,
    sentinels: int,
) -> Any:
    if architectures.is_seq2seq(choice.config):
        special = tokenization.SEQ2SEQ
    elif architectures.is_causal(choice.config.model_type):
        special = tokenization.CAUSAL
    elif choice.config.model_type in architectures.POSITIONS_AFTER_PADDING:
        special = tokenization.ROBERTA
    else:
        special = tokenization.BERT
    source = job.spec.train_data
    read = texts or TrainingTexts(packed.Texts(files, source, field="spec.train_data"), key="")
    key = f"{files_fingerprint(files, field='spec.train_data')}:{layout_key(source)}{read.key}"
    return tokenization.cached_tokenizer(
        job.spec.tokenizer.train,
        read.texts,
        special,
        data_fingerprint=key,
        cache_dir=job.cache_dir,
        sentinels=sentinels,
    )


def _choose(job: Ingredients) -> ModelChoice:
    choice = job.choose()
    supported = architectures.objectives(choice.config)
    task = job.field.rpartition(".")[2]
    if task not in supported:
        other = f"; train it with {', '.join(supported)}, or" if supported else ";"
        raise SpecError(
            job.field,
            "OBJECTIVE_UNSUPPORTED",
            why_not_pretrained(choice.config)
            or f"{task} cannot train a model of the type {choice.config.model_type}{other} use another model",
            {"supported": ",".join(supported)},
        )
    return choice


def _sets_positions(choice: ModelChoice) -> bool:
    alias = {"max_position_embeddings", choice.config.attribute_map.get("max_position_embeddings", "")}
    return bool(alias & set(choice.overrides))
