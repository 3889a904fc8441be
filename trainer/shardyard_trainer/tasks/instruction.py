"""Fine-tuning on instructions: next-token prediction of the assistant's messages in conversations."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import transformers

from shardyard.v1 import spec_pb2
from shardyard_trainer.data import bad_rows
from shardyard_trainer.data.conversations import ROLES, Conversation, read_conversations
from shardyard_trainer.data.errors import SpecError, listed, raise_all
from shardyard_trainer.data.sources import DataFile
from shardyard_trainer.inputs.chat_template import ChatTemplate, TemplateFault, template_of
from shardyard_trainer.inputs.chats import ChatInputs, Chats, ChatSamples, load_chats
from shardyard_trainer.inputs.holdout import split_by_lot
from shardyard_trainer.inputs.imagined import Imagined, ImaginedTokenizer, token_tensors
from shardyard_trainer.inputs.text import adapt
from shardyard_trainer.models import architectures, loading
from shardyard_trainer.models.door import FolderInvalid
from shardyard_trainer.models.loaded import Loaded
from shardyard_trainer.models.sources import ModelChoice
from shardyard_trainer.reading import about
from shardyard_trainer.tasks.answered import AnswerMetrics, AnswerModule
from shardyard_trainer.tasks.base import Footprint, Output, Teaching
from shardyard_trainer.tasks.causal_lm import CausalPredictor
from shardyard_trainer.tasks.ingredients import Ingredients
from shardyard_trainer.tasks.losses import LOSS_CHUNK
from shardyard_trainer.tasks.texts import PreparedText, Splits, TrainingTexts, find_length, find_tokenizer

DEFAULT_LENGTH = 1024
USAGE = """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")  # this folder
model = AutoModelForCausalLM.from_pretrained(".").eval()
messages = [{"role": "user", "content": "Hello, who are you?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=40)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
logits = model(**inputs).logits
"""


class Instruction:
    """The task `instruction`."""

    name = "instruction"
    output = Output.MODEL
    roles = ROLES
    auto = "AutoModelForCausalLM"
    pipeline = "text-generation"
    example = ""
    usage = USAGE
    cuts = False
    holds_out_by_lot = True
    inputs = ChatInputs
    teaching = Teaching(by_token=True)

    def prepare(self, job: Ingredients) -> PreparedInstruction:
        """Finds and checks model and data. Raises SpecError."""
        read = read_chats(job, _choose, ChatKind(self.name, read_conversations, _texts, _load))
        splits = _split(job, *read[1:])
        prepared = PreparedInstruction(job.accept_weights(read.choice, self.auto), read.inputs, splits, job.warnings)
        prepared.last_turn_only = job.wanted.last_turn_only
        return prepared

    def imagine(self, job: Ingredients, data: Imagined) -> PreparedInstruction:
        """With conversations of the full length. Raises SpecError."""
        return PreparedInstruction(*imagine_chats(job, data), job.warnings)

    def open(self, loaded: Loaded, inputs: ChatInputs) -> CausalPredictor:
        """A predictor of answers. Raises FolderInvalid for a folder without a valid chat template."""
        return open_chats(self.name, loaded, inputs)


TASK = Instruction()


def open_chats(task: str, loaded: Loaded, inputs: ChatInputs) -> CausalPredictor:
    """A predictor of answers. Raises FolderInvalid for a folder without a valid chat template."""
    predictor = CausalPredictor(task, loaded, inputs, answers_texts=True)
    if fault := predictor.template_fault:
        raise FolderInvalid(f"it needs a chat template, and {fault}", file="chat_template.jinja")
    return predictor


class ChatRead(NamedTuple):
    """What a task of conversations has found: its model, the tokenizer with its template, and its data."""

    choice: ModelChoice
    inputs: ChatInputs
    train: Chats
    held_out: Chats | None


class ChatKind(NamedTuple):
    """How the rows of a task of conversations are read, and what texts and tokens they have."""

    name: str
    read: Callable[..., Iterator[Any]]
    """Yields the rows of files; raises DataError."""
    texts: Callable[[Any], Iterable[str]]
    """A row's texts, for training a tokenizer."""
    load: Callable[[Ingredients, tuple[Any, ChatTemplate, int], list[DataFile], str], Chats]
    """Loads a source for a tokenizer, a template and a length."""


def read_chats(job: Ingredients, choose: Callable[[Ingredients], ModelChoice], kind: ChatKind) -> ChatRead:
    """Finds and checks model, tokenizer, template and data. Raises SpecError."""
    choice = job.attempt(lambda: choose(job))
    train_files, eval_files = job.files()
    raise_all(job.errors)
    assert choice is not None and train_files is not None

    def look_through(files: list[DataFile], source: spec_pb2.DataSource, field: str) -> None:
        deque(kind.read(files, source, field=field), maxlen=0)

    with job.looking_on(train_files, eval_files, look_through):
        length = find_length(job, choice, "max_length", DEFAULT_LENGTH, shortest=8)
        texts = TrainingTexts(_ChatTexts(kind, train_files, job.spec.train_data), key=kind.name)
        tokenizer = find_tokenizer(job, choice, train_files, texts=texts)
        choice = adapt(choice, tokenizer, length)
        template = find_template(job, choice, tokenizer)
    with job.looking_on(None, eval_files, look_through):
        train = kind.load(job, (tokenizer, template, length), train_files, "train_data")
    held_out = None
    if eval_files is not None:
        held_out = kind.load(job, (tokenizer, template, length), eval_files, "eval_data")
    # A copy: the tokenizer may be kept for other specs.
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = template.source
    return ChatRead(choice, ChatInputs(tokenizer, length, train.ends), train, held_out)


def imagine_chats(job: Ingredients, data: Imagined, *, times: int = 1) -> tuple[ModelChoice, ChatInputs, Any]:
    """The model, and conversations that are imagined, `times` in each sample. Raises SpecError."""
    choice = choose(job)
    length = find_length(job, choice, "max_length", DEFAULT_LENGTH, shortest=8)
    tensors = token_tensors(times * length, names=("input_ids", "labels"))
    return choice, ChatInputs(ImaginedTokenizer(), length), data.splits(times * length, tensors)


class _ChatTexts:
    """The texts for training a tokenizer: messages as the default template writes them, without special tokens."""

    def __init__(self, kind: ChatKind, files: Sequence[DataFile], source: spec_pb2.DataSource) -> None:
        self._kind = kind
        self._files = files
        self._source = source

    def __iter__(self) -> Iterator[str]:
        for row in self._kind.read(self._files, self._source, field="spec.train_data"):
            yield from self._kind.texts(row)


def _texts(row: Conversation) -> Iterable[str]:
    return [plain_text(row)]


def plain_text(row: Conversation) -> str:
    """A conversation as the default template writes it, without special tokens."""
    return row.text or "".join(f"<|{each['role']}|>\n{each['content']}\n" for each in row.messages)


def choose(job: Ingredients) -> ModelChoice:
    """The spec's model, which must read from left to right. Raises SpecError."""
    choice = job.choose()
    supported = architectures.objectives(choice.config)
    if "causal_lm" not in supported:
        message = f"{choice.config.model_type} does not continue texts; use a causal model such as llama, qwen2 or gpt2"
        raise SpecError(job.field, "OBJECTIVE_UNSUPPORTED", message, {"supported": "llama,qwen2,gpt2"})
    return choice


def _choose(job: Ingredients) -> ModelChoice:
    choice = choose(job)
    model_type, known = choice.config.model_type, architectures.PACKED_BY_POSITIONS
    if job.wanted.packing and model_type not in known:
        message = (
            f"{model_type} is not known to keep packed conversations apart; leave packing out, or use one of "
            f"{listed(sorted(known))}"
        )
        raise SpecError(f"{job.field}.packing", "OBJECTIVE_UNSUPPORTED", message)
    return choice


def find_template(job: Ingredients, choice: ModelChoice, tokenizer: Any) -> ChatTemplate:
    """The chat template that the spec gives, the tokenizer's, or a simple one. Raises SpecError."""
    given = job.wanted.chat_template
    field, reason = (f"{job.field}.chat_template", "SPEC_INVALID") if given else (choice.field, "MODEL_INVALID")
    about(field, reason)
    try:
        source = template_of(tokenizer, given)
        if not source:
            message = "the tokenizer has no chat template and no end token for a simple one; give a chat_template"
            raise SpecError(f"{job.field}.chat_template", "SPEC_INVALID", message)
        if source is not given and not tokenizer.chat_template:
            message = "the tokenizer has no chat template: a simple one is used, and kept with the model"
            job.warn("CHAT_TEMPLATE_MADE", message, f"{job.field}.chat_template")
        return ChatTemplate(source, tokenizer)
    except TemplateFault as fault:
        message = f"the chat template does not work: {fault}; correct it, or give another in chat_template"
        raise SpecError(field, reason, message) from None


def _load(job: Ingredients, reads: tuple[Any, ChatTemplate, int], files: list[DataFile], name: str) -> Chats:
    """Loads the conversations of a source for a tokenizer, a template and a length. Raises DataError."""
    tokenizer, template, length = reads
    field, last_only = f"spec.{name}", job.wanted.last_turn_only
    found = load_chats(
        files,
        getattr(job.spec, name),
        tokenizer,
        template,
        length=length,
        last_only=last_only,
        cache_dir=job.cache_dir,
        field=field,
    )
    if found.bad_rows:
        job.warn(bad_rows.REASON, found.bad_rows, field)
    total = found.count("rows")
    if unlearnt := found.count("unlearnt"):
        message = (
            f"in {unlearnt:,} of {total:,} conversations no answer begins within the first {length:,} tokens: they are "
            "left out; raise max_length"
        )
        job.warn("NO_ANSWER_LEFT", message, f"{job.field}.max_length")
    warn_of_templates(job, found, tokenizer, field, total=total)
    return found


def warn_of_templates(job: Ingredients, found: Chats, tokenizer: Any, field: str, *, total: int) -> None:
    """Warns if the template of `total` conversations does not fit them well."""
    if found.unread:
        job.warn(bad_rows.UNREAD, found.unread, field)
    for count, what in (("lacks_thoughts", "the thoughts"), ("lacks_texts", "the whole text")):
        if lacking := found.count(count):
            message = (
                f"in {lacking:,} of {total:,} conversations the chat template does not write {what} of each "
                "answer, and what it leaves out is not learnt; give a chat_template that writes it, or, if it leaves "
                "it out of earlier answers only, a row for each answer"
            )
            job.warn("ANSWERS_NOT_WHOLE", message, field)
    if differing := found.count("prompts_differ"):
        message = (
            f"in {differing:,} of {total:,} conversations an answer does not begin where the chat template's prompt "
            "for it ends, so Predict asks in another way than training did; use a template whose prompt equals the "
            "text before an answer"
        )
        job.warn("CHAT_PROMPT_DIFFERS", message, field)
    if differing := found.count("marks_differ"):
        message = (
            f"in {differing:,} of {total:,} conversations the chat template's {{% generation %}} marks other text than "
            "the answers that its prompts ask for; the marks are used, and the token after them that closes an answer"
        )
        job.warn("CHAT_MARKS_DIFFER", message, field)
    if special := found.count("special"):
        message = (
            f"in {special:,} of {total:,} conversations a message has the name of a special token (such as "
            f"{tokenizer.eos_token}), which is read as that token; take it out of the data if it is not meant"
        )
        job.warn("SPECIAL_TOKENS_IN_TEXT", message, field)


def _split(job: Ingredients, inputs: ChatInputs, train: Chats, held_out: Chats | None) -> Splits[ChatSamples]:
    padding = int(inputs.tokenizer.pad_token_id or 0)
    packed_to = inputs.length if job.wanted.packing else None
    if held_out is not None:
        trained, evaluated = np.arange(train.store.num_sequences), np.arange(held_out.store.num_sequences)
        other = held_out
    else:
        (trained, evaluated), other = split_by_lot(train.store.num_sequences, job.holdout, job.seed), train
    samples = ChatSamples(train, trained, padding=padding, packed_to=packed_to)
    return samples, ChatSamples(other, evaluated, padding=padding) if len(evaluated) else None


class PreparedInstruction(PreparedText[ChatSamples]):
    """The task with its model and data."""

    task = TASK
    unit = "token"
    last_turn_only = False
    """Whether only the last answer of a conversation counts."""

    def make_module(self, *, meta: bool) -> AnswerModule:
        """The model with its own output layer."""
        model, _ = loading.load(transformers.AutoModelForCausalLM, self.choice, meta=meta)
        loading.ensure_pad_id(model, self.inputs.tokenizer)
        plain = self.choice.config.model_type in architectures.PLAIN_OUTPUT_LAYER
        return AnswerModule(model, plain_output_layer=plain)

    def metrics(self) -> AnswerMetrics:
        """A new, empty collector of metrics."""
        return AnswerMetrics()

    def resolve(self, message: Any) -> None:
        """Fills in the length of the longest conversation."""
        message.max_length = self.length

    def footprint(self) -> Footprint:
        """Logits over the vocabulary, for a chunk of positions at a time."""
        return Footprint(int(self.choice.config.vocab_size), LOSS_CHUNK)

    def describe(self) -> Mapping[str, Any]:
        """The content of `shardyard.json`."""
        return {"task": TASK.name, "max_length": self.length, "last_turn_only": self.last_turn_only}
