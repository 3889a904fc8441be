"""Pretraining by predicting the next token (Radford et al., 2018), on packed sequences without padding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from shardyard.v1 import model_service_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.data.stats import DataStats, TokenCounter
from shardyard_trainer.inputs.base import MicroBatch, SampleRef
from shardyard_trainer.inputs.imagined import Imagined
from shardyard_trainer.inputs.packed import Blocks, Corpus, causal_frame, corpus_stats, positions_from
from shardyard_trainer.inputs.text import EncodedText, TextInputs
from shardyard_trainer.models import architectures, loading
from shardyard_trainer.models.generation import end_tokens
from shardyard_trainer.models.loaded import Loaded
from shardyard_trainer.models.sources import ModelChoice
from shardyard_trainer.tasks.answers import TOKEN_BYTES, TextPredictor, refuse_kinds, refuse_parameters
from shardyard_trainer.tasks.base import Footprint, Graph, Output, Parts, Teaching, violation
from shardyard_trainer.tasks.chat_reader import ChatReader, EncodedPrompt
from shardyard_trainer.tasks.distances import of_classes
from shardyard_trainer.tasks.generate import continue_texts
from shardyard_trainer.tasks.ingredients import Ingredients
from shardyard_trainer.tasks.losses import IGNORED, LOSS_CHUNK, LossLinear
from shardyard_trainer.tasks.metrics import LossSum
from shardyard_trainer.tasks.module import HuggingFaceModule, ModuleOutput, Scores
from shardyard_trainer.tasks.sampling import Sampling, sampling_of
from shardyard_trainer.tasks.texts import Packing, PreparedPacked, imagine_packed, prepare_packed

_LONGEST_EXPONENT = 700.0
_USAGE = """import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")  # this folder
model = AutoModelForCausalLM.from_pretrained(".").eval()
marks = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.sep_token_id)
begin = [mark for mark in marks if mark is not None][:1]  # every text of the training begins with it
ids = torch.tensor([begin + tokenizer("Hello, my dog is cute", add_special_tokens=False)["input_ids"]])
written = model.generate(ids, max_new_tokens=10)
print(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
logits = model(ids).logits
"""


class CausalLm:
    """The task `causal_lm`."""

    name = "causal_lm"
    output = Output.MODEL
    roles = ("text",)
    auto = "AutoModelForCausalLM"
    pipeline = "text-generation"
    example = ""
    usage = _USAGE
    cuts = False
    holds_out_by_lot = False
    inputs = TextInputs
    graph = Graph({"logits": ("batch", "length")})
    teaching = Teaching(by_token=True)

    def prepare(self, job: Ingredients) -> PreparedCausalLm:
        """Finds and checks model and data. Raises SpecError."""

        def samples(corpus: Corpus, choice: ModelChoice, inputs: TextInputs, is_train: bool) -> CausalSamples:
            return CausalSamples(
                corpus,
                inputs.length or 0,
                seed=job.seed,
                is_train=is_train,
                choice=choice,
                tokenizer=inputs.tokenizer,
            )

        how = Packing(causal_frame, samples, architectures.PACKED_BY_POSITIONS)
        return PreparedCausalLm(*prepare_packed(job, self.auto, how), job.warnings)

    def imagine(self, job: Ingredients, data: Imagined) -> PreparedCausalLm:
        """With sequences of one document each. Raises SpecError."""
        return PreparedCausalLm(*imagine_packed(job, data, "input_ids", "labels"), job.warnings)

    def open(self, loaded: Loaded, inputs: TextInputs) -> CausalPredictor:
        """A predictor that continues texts."""
        return CausalPredictor(self.name, loaded, inputs)


TASK = CausalLm()


class CausalSamples:
    """Packed sequences of one split. Where documents meet inside one, the positions restart."""

    def __init__(
        self, corpus: Corpus, length: int, *, seed: int, is_train: bool, choice: ModelChoice, tokenizer: Any
    ) -> None:
        self.corpus = corpus
        self.blocks = Blocks(corpus, length, seed=seed, shuffle=is_train, overlap=1)
        self._length = length
        self._counter = TokenCounter(tokenizer)
        self._is_packed = choice.config.model_type in architectures.PACKED_BY_POSITIONS
        # If one token ends a document and begins the next (GPT-2), predicting it means predicting the end.
        eos = tokenizer.eos_token_id
        self._joint = eos if eos is not None and tokenizer.bos_token_id in (None, eos) else None
        begins = np.isin(corpus.tokens[corpus.starts], tokenizer.all_special_ids)
        unscored = begins[:1] if self._joint is not None else begins
        # Only tokens of text or predicted ones count; a token that only begins a document is neither.
        self.num_scored = corpus.num_tokens - int(unscored.sum())
        self.num_samples = self.blocks.num_blocks
        self.num_tokens = self.num_samples * length if is_train else max(0, corpus.num_tokens - 1)

    def lengths(self) -> None:
        """None: all sequences have the same length."""
        return

    def stats(self) -> DataStats:
        """Statistics of the corpus."""
        return corpus_stats(self.corpus, self.blocks, self._counter, num_tokens=self.num_tokens)

    def micro_batch(self, samples: Sequence[SampleRef]) -> MicroBatch:
        """`input_ids`, `labels` (the next tokens) and, where documents meet, `position_ids`, each int64 [B, T]."""
        shape = (len(samples), self._length)
        ids, labels = np.zeros(shape, np.int64), np.full(shape, IGNORED)
        positions = np.tile(np.arange(self._length), (len(samples), 1))
        num_tokens = 0
        for row, sample in enumerate(samples):
            places, starts = self.blocks.block(sample.data_epoch, sample.sample)
            tokens = self.corpus.tokens[places].astype(np.int64)
            size = len(tokens) - 1
            foreign = starts[1:] & (tokens[1:] != self._joint) if self._joint is not None else starts[1:]
            # The padding of the last evaluation sequence may be any token: nothing before it can see it.
            ids[row, :size], ids[row, size:] = tokens[:-1], tokens[-1]
            labels[row, :size] = np.where(foreign, IGNORED, tokens[1:])
            positions[row, :size] = positions_from(starts[:-1])
            num_tokens += size
        inputs = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
        if self._is_packed and (positions[:, -1] != self._length - 1).any():
            inputs["position_ids"] = torch.from_numpy(positions)
        return MicroBatch(inputs, int((labels != IGNORED).sum()), num_tokens, ids.size)


class CausalMetrics(LossSum):
    """`loss` (nats a token), `perplexity`, and `bits_per_byte` of the text if its bytes are known."""

    def __init__(self, tokens_per_byte: float) -> None:
        super().__init__()
        self._tokens_per_byte = tokens_per_byte

    def compute(self, parts: Sequence[Any]) -> dict[str, float]:
        """The metrics over all ranks' parts."""
        loss = self.mean(parts)
        found = {"loss": loss, "perplexity": math.exp(min(loss, _LONGEST_EXPONENT))}
        if self._tokens_per_byte:
            found["bits_per_byte"] = loss / math.log(2) * self._tokens_per_byte
        return found

    def directions(self) -> Mapping[str, int]:
        """All three say the same of a model."""
        names = ("perplexity", "bits_per_byte") if self._tokens_per_byte else ("perplexity",)
        return {**super().directions(), **dict.fromkeys(names, -1)}


class PreparedCausalLm(PreparedPacked[CausalSamples]):
    """The task with its model and data."""

    task = TASK

    def make_module(self, *, meta: bool) -> CausalLmModule:
        """The model with its own output layer."""
        model, _ = loading.load(transformers.AutoModelForCausalLM, self.choice, meta=meta)
        loading.ensure_pad_id(model, self.inputs.tokenizer)
        plain = self.choice.config.model_type in architectures.PLAIN_OUTPUT_LAYER
        return CausalLmModule(model, plain_output_layer=plain)

    def metrics(self) -> CausalMetrics:
        """A new, empty collector of metrics."""
        split = self.eval or self.train
        return CausalMetrics(split.num_scored / split.corpus.num_bytes if split.corpus.num_bytes else 0.0)

    def footprint(self) -> Footprint:
        """Logits over the vocabulary, for a chunk of positions at a time."""
        return Footprint(int(self.choice.config.vocab_size), LOSS_CHUNK)


class CausalLmModule(HuggingFaceModule):
    """Next-token prediction; the loss is summed over the labels that are not `IGNORED`."""

    def __init__(self, model: Any, *, plain_output_layer: bool) -> None:
        super().__init__()
        self.model = model
        self.own_head = None
        layer = model.get_output_embeddings()
        self._is_chunked = plain_output_layer and type(layer) is nn.Linear
        if self._is_chunked:
            layer.__class__ = LossLinear

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        return_outputs: bool = False,
        return_scores: bool = False,
    ) -> ModuleOutput:
        """`labels` [B, T] are the next tokens: nothing is shifted here."""
        # No attention mask and no cache: with either, transformers does not derive from the restarted positions where
        # documents begin, and lets them attend to one another.
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
        if return_scores:
            return self.compared(inputs, labels)
        if self._is_chunked:
            hidden_BTD = self.backbone(**inputs).last_hidden_state
            loss = self.model.get_output_embeddings()(hidden_BTD.flatten(0, 1), labels.flatten())
        else:
            logits_BTV = self.model(**inputs).logits
            loss = F.cross_entropy(
                logits_BTV.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
            )
        return ModuleOutput(loss, {} if return_outputs else None)

    def answer_by(self, model: nn.Module) -> None:
        """Takes the `logits` of another network, all of them at once."""
        self.model, self._is_chunked = model, False

    def compared(self, inputs: dict[str, Any], labels: torch.Tensor) -> ModuleOutput:
        """The loss with its scores: all logits of the `labels` [B, T] that are not `IGNORED`."""
        is_target_BT = labels != IGNORED
        if self._is_chunked:
            # Without the vectors that have no label: their logits would be the largest part of the step.
            logits_NV = self.model.get_output_embeddings()(self.backbone(**inputs).last_hidden_state[is_target_BT])
        else:
            logits_NV = self.model(**inputs).logits[is_target_BT]
        logits_NV = logits_NV.float()
        loss = F.cross_entropy(logits_NV, labels[is_target_BT], reduction="sum")
        return ModuleOutput(loss, None, scores=Scores(logits_NV, of_classes))


class CausalPredictor(TextPredictor):
    """Continues texts token by token, and answers conversations if its folder has a chat template.

    `answers_texts`: a text is the message of a user, to be answered and not to be continued.
    """

    parameters = "generation"

    def __init__(self, task: str, loaded: Loaded, inputs: TextInputs, *, answers_texts: bool = False) -> None:
        super().__init__(task, loaded, inputs)
        self._answers_texts = answers_texts
        self._chats = ChatReader(inputs.tokenizer)
        if answers_texts:
            self.takes = ("messages", "text")
        elif inputs.tokenizer.chat_template:
            self.takes = ("text", "messages")

    @property
    def template_fault(self) -> str:
        """Why the folder's chat template cannot be used; empty: it can."""
        return self._chats.fault

    def refuse(self, request: model_service_pb2.PredictRequest) -> list[worker_pb2.Violation]:
        """Refuses other parameters, instances of another kind, chats without a working template, and beams."""
        has_chats = any(instance.HasField("messages") for instance in request.instances)
        fault = self.template_fault if has_chats else ""
        takes = [kind for kind in self.takes if kind != "messages" or not fault]
        message = f"a {self.task} model takes {' or '.join(f'`{kind}`' for kind in takes)}"
        if fault:
            message = f"{message}; `messages` need a chat template, and {fault}"
        found = refuse_parameters(request, self.task, self.parameters)
        if request.generation.num_beams > 1:
            text = f"{request.generation.num_beams} beams: a {self.task} model takes one path; leave num_beams out"
            found.append(violation("generation.num_beams", "SPEC_INVALID", text))
        return found + refuse_kinds(request.instances, takes, message)

    def read(self, instances: Sequence[model_service_pb2.Instance]) -> list[EncodedText]:
        """Texts and conversations, whole: none is cut."""
        is_chat = [self._answers_texts or instance.HasField("messages") for instance in instances]
        plain = [instance.text for instance, chat in zip(instances, is_chat, strict=True) if not chat]
        texts = iter(self.inputs.encode_prompts(plain) if plain else [])
        return [
            self._chats.read(instance) if chat else next(texts)
            for instance, chat in zip(instances, is_chat, strict=True)
        ]

    def complain(self, encoded: Sequence[EncodedText]) -> list[worker_pb2.Violation]:
        """Conversations that cannot be answered."""
        return [
            violation(f"instances[{index}]{each.field}", "SPEC_INVALID", each.fault)
            for index, each in enumerate(encoded)
            if isinstance(each, EncodedPrompt) and each.fault
        ]

    def most_bytes(self, request: model_service_pb2.PredictRequest, encoded: Sequence[EncodedText]) -> list[int]:
        """The size of as many tokens as the request allows."""
        return [self._sampling(request).max_new_tokens * TOKEN_BYTES + 16] * len(encoded)

    def answer(
        self, request: model_service_pb2.PredictRequest, encoded: Sequence[EncodedText], places: Sequence[int]
    ) -> Parts:
        """The continuation of each prompt; `places` seed the sampling."""
        prompts = [each.ids for each in encoded]
        continued = yield from continue_texts(self.loaded, prompts, self._sampling(request), places)
        return [
            model_service_pb2.Prediction(generated_text=_continuation(self.inputs.tokenizer, prompt, new))
            for prompt, new in zip(prompts, continued, strict=True)
        ]

    def _sampling(self, request: model_service_pb2.PredictRequest) -> Sampling:
        loaded = self.loaded
        ends = frozenset(end_tokens(loaded.model.config, loaded.generation, self.inputs.tokenizer))
        return sampling_of(request.generation, loaded.generation, ends)


def _continuation(tokenizer: Any, prompt: list[int], new: list[int]) -> str:
    """The text of the new tokens as it reads after the prompt: decoded alone, many decoders drop a leading space."""
    tail = prompt[-16:]
    before: str = tokenizer.decode(tail, skip_special_tokens=True)
    whole: str = tokenizer.decode(tail + new, skip_special_tokens=True)
    return whole.removeprefix(before) if whole.startswith(before) else tokenizer.decode(new, skip_special_tokens=True)
