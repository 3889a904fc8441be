"""Pretraining by predicting masked tokens (Devlin et al., 2018), with new masks in every pass over the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from shardyard.v1 import model_service_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.data.errors import SpecError
from shardyard_trainer.data.stats import DataStats, TokenCounter
from shardyard_trainer.inputs.base import MicroBatch, SampleRef, batches
from shardyard_trainer.inputs.imagined import Imagined
from shardyard_trainer.inputs.packed import Blocks, Corpus, corpus_stats, masked_frame, positions_from
from shardyard_trainer.inputs.text import EncodedText, TextInputs
from shardyard_trainer.models import architectures, loading
from shardyard_trainer.models.loaded import Loaded
from shardyard_trainer.models.sources import ModelChoice
from shardyard_trainer.tasks.answers import TOKEN_BYTES, TextPredictor
from shardyard_trainer.tasks.base import Footprint, Graph, Output, Parts, Teaching, at_once, violation
from shardyard_trainer.tasks.distances import of_classes
from shardyard_trainer.tasks.ingredients import Ingredients
from shardyard_trainer.tasks.metrics import LossSum
from shardyard_trainer.tasks.module import HuggingFaceModule, ModuleOutput, Scores
from shardyard_trainer.tasks.texts import Packing, PreparedPacked, imagine_packed, prepare_packed

DEFAULT_MASK_PROBABILITY = 0.15
_MASKED, _RANDOM = 0.8, 0.1
_STREAM_TRAIN, _STREAM_EVAL = 0x3A5C, 0xE7A1


class MaskedLm:
    """The task `masked_lm`."""

    name = "masked_lm"
    output = Output.MODEL
    roles = ("text",)
    auto = "AutoModelForMaskedLM"
    pipeline = "fill-mask"
    example = '"Hello, my dog is " + tokenizer.mask_token'
    usage = ""
    cuts = True
    holds_out_by_lot = False
    inputs = TextInputs
    graph = Graph({"logits": ("batch", "length")})
    teaching = Teaching(by_token=True)

    def prepare(self, job: Ingredients) -> PreparedMaskedLm:
        """Finds and checks model and data. Raises SpecError."""
        wanted = job.wanted
        probability = wanted.mask_probability if wanted.HasField("mask_probability") else DEFAULT_MASK_PROBABILITY

        def samples(corpus: Corpus, choice: ModelChoice, inputs: TextInputs, is_train: bool) -> MaskedSamples:
            return MaskedSamples(
                corpus,
                inputs.length or 0,
                seed=job.seed,
                is_train=is_train,
                choice=choice,
                tokenizer=inputs.tokenizer,
                probability=probability,
            )

        how = Packing(masked_frame, samples, architectures.PACKED_BY_MASK, _check_mask, wanted.whole_word)
        prepared = PreparedMaskedLm(*prepare_packed(job, self.auto, how), job.warnings)
        prepared.masking = {"mask_probability": probability, "whole_word": wanted.whole_word}
        return prepared

    def imagine(self, job: Ingredients, data: Imagined) -> PreparedMaskedLm:
        """With sequences of one document each. Raises SpecError."""
        prepared = PreparedMaskedLm(*imagine_packed(job, data, "input_ids"), job.warnings)
        prepared.masking = {"mask_probability": DEFAULT_MASK_PROBABILITY, "whole_word": False}
        return prepared

    def open(self, loaded: Loaded, inputs: TextInputs) -> MaskedPredictor:
        """A predictor that fills masks."""
        return MaskedPredictor(self.name, loaded, inputs)


TASK = MaskedLm()


def _check_mask(tokenizer: Any) -> None:
    if tokenizer.mask_token_id is None:
        raise SpecError(
            "spec.tokenizer",
            "OBJECTIVE_UNSUPPORTED",
            "masked_lm needs a tokenizer with a mask token; use one that has it, or name one of its tokens as "
            "mask_token (`tokenizer.mask_token = ...`) and save it again",
        )


class MaskedSamples:
    """Packed sequences of one split with masks; documents do not attend to one another."""

    def __init__(
        self,
        corpus: Corpus,
        length: int,
        *,
        seed: int,
        is_train: bool,
        choice: ModelChoice,
        tokenizer: Any,
        probability: float,
    ) -> None:
        self.corpus = corpus
        self.blocks = Blocks(corpus, length, seed=seed, shuffle=is_train, overlap=0)
        self._length = length
        self._counter = TokenCounter(tokenizer)
        self._seed = (seed, _STREAM_TRAIN if is_train else _STREAM_EVAL)
        self._probability = probability
        self._mask_token = int(tokenizer.mask_token_id)
        self._padding = int(tokenizer.pad_token_id or 0)
        self._special = np.asarray(sorted(tokenizer.all_special_ids))
        self._ordinary = np.setdiff1d(np.asarray(list(tokenizer.get_vocab().values())), self._special)
        self._is_packed = choice.config.model_type in architectures.PACKED_BY_MASK
        self._offset = architectures.position_offset(choice.config)
        self.num_samples = self.blocks.num_blocks
        self.num_tokens = self.num_samples * length if is_train else corpus.num_tokens

    def lengths(self) -> None:
        """None: all sequences have the same length."""
        return

    def stats(self) -> DataStats:
        """Statistics of the corpus."""
        return corpus_stats(self.corpus, self.blocks, self._counter, num_tokens=self.num_tokens)

    def micro_batch(self, samples: Sequence[SampleRef]) -> MicroBatch:
        """`input_ids` [B, T], `masked_places` and `targets` [M]; where documents meet, mask and positions."""
        shape = (len(samples), self._length)
        ids = np.full(shape, self._padding)
        positions = np.tile(np.arange(self._length), (len(samples), 1))
        documents = np.zeros(shape, np.int64)
        masked_places, targets = [], []
        num_tokens = 0
        for row, sample in enumerate(samples):
            places, starts = self.blocks.block(sample.data_epoch, sample.sample)
            tokens = self.corpus.tokens[places].astype(np.int64)
            size = len(tokens)
            chosen, shown = self._mask(tokens, places, starts, sample)
            ids[row, :size] = shown
            positions[row, :size] = positions_from(starts)
            # Padding at the end of the last evaluation sequence is a document of its own.
            documents[row, :size], documents[row, size:] = np.cumsum(starts), -1
            masked_places.append(row * self._length + chosen)
            targets.append(tokens[chosen])
            num_tokens += size
        inputs = {
            "input_ids": torch.from_numpy(ids),
            "masked_places": torch.from_numpy(np.concatenate(masked_places)),
            "targets": torch.from_numpy(np.concatenate(targets)),
        }
        if (documents != documents[:, :1]).any():
            inputs |= self._separated(positions, documents)
        return MicroBatch(inputs, len(inputs["targets"]), num_tokens, ids.size)

    def _separated(self, positions: np.ndarray, documents: np.ndarray) -> dict[str, torch.Tensor]:
        if not self._is_packed:
            return {"attention_mask": torch.from_numpy((documents >= 0).astype(np.int64))}
        # A boolean mask, for sdpa: eager attention would add it as numbers; positions alone do not separate documents.
        mask = documents[:, None, :, None] == documents[:, None, None, :]
        return {"attention_mask": torch.from_numpy(mask), "position_ids": torch.from_numpy(positions + self._offset)}

    def _mask(
        self, tokens: np.ndarray, places: np.ndarray, starts: np.ndarray, sample: SampleRef
    ) -> tuple[np.ndarray, np.ndarray]:
        """The masked positions, and the tokens with masks that the model reads."""
        random = np.random.default_rng([*self._seed, sample.data_epoch, sample.sample])
        candidates = np.flatnonzero(~np.isin(tokens, self._special))
        wanted = max(1, round(self._probability * len(candidates)))
        if self.corpus.continues is None:
            chosen = np.sort(random.permutation(candidates)[:wanted])
        else:
            chosen = self._whole_words(candidates, places, starts, wanted, random)
        shown = tokens.copy()
        draw = random.random(len(chosen))
        shown[chosen[draw < _MASKED]] = self._mask_token
        exchanged = chosen[(draw >= _MASKED) & (draw < _MASKED + _RANDOM)]
        shown[exchanged] = random.choice(self._ordinary, len(exchanged))
        return chosen, shown

    def _whole_words(
        self, candidates: np.ndarray, places: np.ndarray, starts: np.ndarray, wanted: int, random: np.random.Generator
    ) -> np.ndarray:
        assert self.corpus.continues is not None
        begins = (self.corpus.continues[places] == 0) | starts
        words = np.cumsum(begins)[candidates]
        names, sizes = np.unique(words, return_counts=True)
        # The first word is taken whatever its size; later words that would exceed the wanted number are skipped.
        taken: list[int] = []
        left = wanted
        for word in random.permutation(len(names)):
            if sizes[word] <= left or not taken:
                taken.append(word)
                left -= sizes[word]
            if left <= 0:
                break
        return candidates[np.isin(words, names[taken])]


class MaskedMetrics(LossSum):
    """`loss` (nats a masked token) and `masked_accuracy`."""

    def __init__(self) -> None:
        super().__init__()
        self._correct: list[torch.Tensor] = []

    def update(self, batch: MicroBatch, output: ModuleOutput) -> None:
        """Takes one micro batch."""
        super().update(batch, output)
        assert output.outputs is not None
        self._correct.append(output.outputs["correct"].detach())

    def part(self) -> Any:
        """Sums of loss, masked tokens and right answers."""
        return *super().part(), int(torch.stack(self._correct).sum()) if self._correct else 0

    def compute(self, parts: Sequence[Any]) -> dict[str, float]:
        """The metrics over all ranks' parts."""
        masked = max(1, sum(part[1] for part in parts))
        return {"loss": self.mean(parts), "masked_accuracy": sum(part[2] for part in parts) / masked}

    def directions(self) -> Mapping[str, int]:
        """The loss, and how many masked tokens are found again."""
        return {**super().directions(), "masked_accuracy": 1}


class PreparedMaskedLm(PreparedPacked[MaskedSamples]):
    """The task with its model and data."""

    task = TASK
    masking: Mapping[str, Any]
    """How masks are drawn, as the spec's fields have it."""

    def make_module(self, *, meta: bool) -> MaskedLmModule:
        """The model with its masked-LM head."""
        model, _ = loading.load(transformers.AutoModelForMaskedLM, self.choice, meta=meta)
        return MaskedLmModule(model)

    def metrics(self) -> MaskedMetrics:
        """A new, empty collector of metrics."""
        return MaskedMetrics()

    def resolve(self, message: Any) -> None:
        """Fills in the length and the share of masked tokens."""
        super().resolve(message)
        message.mask_probability = self.masking["mask_probability"]

    def describe(self) -> Mapping[str, Any]:
        """The content of `shardyard.json`."""
        return {**super().describe(), **self.masking}

    def footprint(self) -> Footprint:
        """Logits over the vocabulary, for masked positions only."""
        return Footprint(int(self.choice.config.vocab_size), 0, predicted=float(self.masking["mask_probability"]))


class MaskedLmModule(HuggingFaceModule):
    """Prediction of masked tokens; only their vectors go through the head."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.own_head = None
        layer = model.get_output_embeddings()
        heads = [
            name
            for name, child in model.named_children()
            if child is not model.base_model and any(module is layer for module in child.modules())
        ]
        # A head in several parts (DistilBERT's) is known to its model only.
        others = [name for name, child in model.named_children() if child is not model.base_model]
        self._head_name = heads[0] if len(heads) == 1 and len(others) == 1 else ""

    def forward(  # noqa: PLR0917 - torch's own signature; always called with keywords
        self,
        input_ids: torch.Tensor,
        masked_places: torch.Tensor,
        targets: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        return_outputs: bool = False,
        return_scores: bool = False,
    ) -> ModuleOutput:
        """`masked_places` [M] index the flattened [B·T] positions, `targets` [M] are their tokens."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if position_ids is not None:
            inputs["position_ids"] = position_ids
        logits_MV = self.logits(inputs, masked_places)
        loss = F.cross_entropy(logits_MV.float(), targets, reduction="sum")
        outputs = {"correct": (logits_MV.argmax(-1) == targets).sum()} if return_outputs else None
        return ModuleOutput(loss, outputs, scores=Scores(logits_MV.float(), of_classes) if return_scores else None)

    def answer_by(self, model: nn.Module) -> None:
        """Takes the `logits` of another network, all of them at once."""
        self.model, self._head_name = model, ""

    def logits(self, inputs: Mapping[str, torch.Tensor | None], masked_places: torch.Tensor) -> torch.Tensor:
        """The logits [M, V] at `masked_places` [M] of the flattened positions."""
        if not self._head_name:
            found: torch.Tensor = self.model(**inputs).logits.flatten(0, 1)[masked_places]
            return found
        hidden_MD = self.backbone(**inputs).last_hidden_state.flatten(0, 1)[masked_places]
        of_head: Any = getattr(self.model, self._head_name)(hidden_MD)
        # XLM's head gives its logits with the loss, even if it has none.
        logits_MV: torch.Tensor = of_head[0] if isinstance(of_head, tuple) else of_head
        return logits_MV


class MaskedPredictor(TextPredictor):
    """Predicts candidates for the masks of texts."""

    parameters = "fill_mask"

    def complain(self, encoded: Sequence[EncodedText]) -> list[worker_pb2.Violation]:
        """Reports texts without a mask."""
        name, mask = self.inputs.tokenizer.mask_token, self.inputs.tokenizer.mask_token_id
        message = f"no mask in its first {self.length_limit} tokens; write {name} in place of a word"
        return [
            violation(f"instances[{index}].text", "SPEC_INVALID", message)
            for index, each in enumerate(encoded)
            if mask not in each.ids
        ]

    def most_bytes(self, request: model_service_pb2.PredictRequest, encoded: Sequence[EncodedText]) -> list[int]:
        """The size of the candidates of each mask."""
        mask = self.inputs.tokenizer.mask_token_id
        return [each.ids.count(mask) * (self._top_k(request) * (TOKEN_BYTES + 24) + 8) + 16 for each in encoded]

    def answer(
        self, request: model_service_pb2.PredictRequest, encoded: Sequence[EncodedText], places: Sequence[int]
    ) -> Parts:
        """The likeliest tokens of each mask."""
        return at_once(lambda: self._fill(self._top_k(request), encoded))

    @torch.inference_mode()
    def _fill(self, top_k: int, encoded: Sequence[EncodedText]) -> list[model_service_pb2.Prediction]:
        tokenizer, model = self.inputs.tokenizer, self.loaded.model
        predictions = [model_service_pb2.Prediction() for _ in encoded]
        for batch in batches(encoded):
            logits_BTV = model(**self.inputs.tensors(model, [encoded[index] for index in batch])).logits
            for row, index in enumerate(batch):
                predictions[index].masked_tokens.SetInParent()
                for position, token in enumerate(encoded[index].ids):
                    if token == tokenizer.mask_token_id:
                        probabilities, ids = logits_BTV[row, position].double().softmax(-1).topk(top_k)
                        mask = predictions[index].masked_tokens.masks.add()
                        for score, candidate in zip(probabilities.tolist(), ids.tolist(), strict=True):
                            mask.candidates.add(token=tokenizer.decode([candidate]), token_id=candidate, score=score)
        return predictions

    def _top_k(self, request: model_service_pb2.PredictRequest) -> int:
        given = request.fill_mask
        return min(given.top_k if given.HasField("top_k") else 5, len(self.inputs.tokenizer))
