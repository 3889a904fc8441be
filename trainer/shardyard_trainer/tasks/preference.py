"""Fine-tuning on preferences: direct preference optimisation (DPO; Rafailov et al., 2023) of pairs of answers.

The reference is the model as it was before training. Its log-probabilities of all pairs are measured once, by the same
engine (`training/before.py`): there is no second model, and no second forward pass in a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from shardyard_trainer.data import bad_rows
from shardyard_trainer.data.preference_rows import ROLES, read_preferences
from shardyard_trainer.data.sources import DataFile
from shardyard_trainer.inputs.base import MicroBatch
from shardyard_trainer.inputs.chat_template import ChatTemplate
from shardyard_trainer.inputs.chats import ChatInputs, Chats
from shardyard_trainer.inputs.holdout import split_by_lot
from shardyard_trainer.inputs.imagined import Imagined
from shardyard_trainer.inputs.preferences import PreferenceSamples, load_preferences
from shardyard_trainer.models import architectures, loading
from shardyard_trainer.models.loaded import Loaded
from shardyard_trainer.models.sources import ModelChoice
from shardyard_trainer.tasks import instruction
from shardyard_trainer.tasks.base import Footprint, Output
from shardyard_trainer.tasks.causal_lm import CausalLmModule, CausalPredictor
from shardyard_trainer.tasks.ingredients import Ingredients
from shardyard_trainer.tasks.losses import IGNORED, LOSS_CHUNK, TokenLossLinear
from shardyard_trainer.tasks.metrics import LossSum
from shardyard_trainer.tasks.module import ModuleOutput
from shardyard_trainer.tasks.texts import PreparedText, Splits

DEFAULT_BETA = 0.1
LEARNING_RATE = 1e-6
LORA_LEARNING_RATE = 5e-6


class Preference:
    """The task `preference`."""

    name = "preference"
    output = Output.MODEL
    roles = ROLES
    auto = "AutoModelForCausalLM"
    pipeline = "text-generation"
    example = ""
    usage = instruction.USAGE
    cuts = False
    holds_out_by_lot = True
    inputs = ChatInputs

    def prepare(self, job: Ingredients) -> PreparedPreference:
        """Finds and checks model and data. Raises SpecError."""
        kind = instruction.ChatKind(self.name, read_preferences, lambda pair: map(instruction.plain_text, pair), _load)
        read = instruction.read_chats(job, instruction.choose, kind)
        splits = _split(job, *read[1:])
        return PreparedPreference(job.accept_weights(read.choice, self.auto), read.inputs, splits, job)

    def imagine(self, job: Ingredients, data: Imagined) -> PreparedPreference:
        """With pairs of conversations of the full length. Raises SpecError."""
        return PreparedPreference(*instruction.imagine_chats(job, data, times=2), job)

    def open(self, loaded: Loaded, inputs: ChatInputs) -> CausalPredictor:
        """A predictor of answers. Raises FolderInvalid for a folder without a valid chat template."""
        return instruction.open_chats(self.name, loaded, inputs)


TASK = Preference()


def _load(job: Ingredients, reads: tuple[Any, ChatTemplate, int], files: list[DataFile], name: str) -> Chats:
    """Loads the pairs of a source for a tokenizer, a template and a length. Raises DataError."""
    tokenizer, template, length = reads
    field = f"spec.{name}"
    source = getattr(job.spec, name)
    found = load_preferences(files, source, tokenizer, template, length=length, cache_dir=job.cache_dir, field=field)
    if found.bad_rows:
        job.warn(bad_rows.REASON, found.bad_rows, field)
    total = found.count("rows")
    for count, what in (("unlearnt", "nothing is left of an answer"), ("same", "both answers are the same")):
        if number := found.count(count):
            message = f"in {number:,} of {total:,} pairs {what} within the first {length:,} tokens: they are left out"
            job.warn("NO_ANSWER_LEFT", f"{message}; raise max_length", f"{job.field}.max_length")
    if number := found.count("repeated"):
        message = (
            f"in {number:,} of {total:,} pairs both answers begin with the prompt, which the template writes before "
            "them: it is there twice, and learnt; take it out of the answers if it is not meant"
        )
        job.warn("PROMPT_IN_ANSWERS", message, field)
    instruction.warn_of_templates(job, found, tokenizer, field, total=2 * total)
    return found


def _split(job: Ingredients, inputs: ChatInputs, train: Chats, held_out: Chats | None) -> Splits[PreferenceSamples]:
    padding = int(inputs.tokenizer.pad_token_id or 0)
    num_pairs = train.store.num_sequences // 2
    if held_out is not None:
        other, trained = held_out, np.arange(num_pairs)
        evaluated = np.arange(held_out.store.num_sequences // 2)
    else:
        (trained, evaluated), other = split_by_lot(num_pairs, job.holdout, job.seed), train
    # A model that is only measured is compared with none: its rewards are its own log-probabilities.
    before = 0.0 if job.only_evaluates else np.nan
    samples = PreferenceSamples(train, trained, padding=padding, before=before)
    if not len(evaluated):
        return samples, None
    return samples, PreferenceSamples(other, evaluated, padding=padding, before=before)


class PreparedPreference(PreparedText[PreferenceSamples]):
    """The task with its model and data."""

    task = TASK
    unit = "sample"

    def __init__(
        self, choice: ModelChoice, inputs: ChatInputs, splits: Splits[PreferenceSamples], job: Ingredients
    ) -> None:
        super().__init__(choice, inputs, splits, job.warnings)
        self._beta = job.wanted.beta if job.wanted.HasField("beta") else DEFAULT_BETA
        self._label_smoothing = job.wanted.label_smoothing
        self.learning_rate = LORA_LEARNING_RATE if job.spec.fine_tuning.HasField("lora") else LEARNING_RATE

    def make_module(self, *, meta: bool) -> PreferenceModule:
        """The model with its own output layer."""
        model, _ = loading.load(transformers.AutoModelForCausalLM, self.choice, meta=meta)
        loading.ensure_pad_id(model, self.inputs.tokenizer)
        plain = self.choice.config.model_type in architectures.PLAIN_OUTPUT_LAYER
        return PreferenceModule(model, plain_output_layer=plain, beta=self._beta, label_smoothing=self._label_smoothing)

    def metrics(self) -> PreferenceMetrics:
        """A new, empty collector of metrics."""
        return PreferenceMetrics()

    def resolve(self, message: Any) -> None:
        """Fills in the length of the longest conversation, and the numbers of the loss."""
        message.max_length, message.beta = self.length, self._beta
        message.label_smoothing = self._label_smoothing

    def footprint(self) -> Footprint:
        """Logits over the vocabulary, for a chunk of positions at a time; the reference is two numbers a pair."""
        return Footprint(int(self.choice.config.vocab_size), LOSS_CHUNK)

    def describe(self) -> Mapping[str, Any]:
        """The content of `shardyard.json`."""
        return {"task": TASK.name, "max_length": self.length, "beta": self._beta}


class PreferenceModule(CausalLmModule):
    """Direct preference optimisation; the loss is summed over the pairs.

    A pair's margin is beta times how much more the log-probability of the chosen answer has risen since before training
    than that of the rejected one. Its loss is -log sigmoid(margin). With label smoothing, the pair is the other way
    round with that probability.
    """

    def __init__(self, model: Any, *, plain_output_layer: bool, beta: float, label_smoothing: float = 0.0) -> None:
        super().__init__(model, plain_output_layer=plain_output_layer)
        if self._is_chunked:
            layer: nn.Module = model.get_output_embeddings()
            layer.__class__ = TokenLossLinear
        self._beta = beta
        self._label_smoothing = label_smoothing

    def forward(  # type: ignore[override]
        self, input_ids: torch.Tensor, labels: torch.Tensor, before: torch.Tensor, return_outputs: bool = False
    ) -> ModuleOutput:
        """`labels` [2 B, T] are the next tokens of chosen and rejected answers by turns, `before` [B, 2] their
        log-probabilities before training. The outputs are `log_probs` and `rewards`, both [B, 2].
        """
        is_target_ST = labels != IGNORED
        targets_N = labels[is_target_ST]
        # No attention mask: the padding comes last, and the model reads from left to right.
        inputs = {"input_ids": input_ids, "use_cache": False}
        if self._is_chunked:
            hidden_ND = self.backbone(**inputs).last_hidden_state[is_target_ST]
            losses_N = self.model.get_output_embeddings()(hidden_ND, targets_N)
        else:
            logits_NV = self.model(**inputs).logits[is_target_ST].float()
            losses_N = F.cross_entropy(logits_NV, targets_N, reduction="none")
        # Scattered and added up in a fixed order: adding by index is in no order on a GPU.
        losses_ST = torch.zeros(labels.shape, device=labels.device).masked_scatter(is_target_ST, losses_N)
        log_probs_B2 = -losses_ST.sum(1).view(-1, 2)
        rewards_B2 = self._beta * (log_probs_B2 - before)
        margins_B = rewards_B2[:, 0] - rewards_B2[:, 1]
        smoothing = self._label_smoothing if self.training else 0.0
        loss_B = -(1 - smoothing) * F.logsigmoid(margins_B)
        if smoothing:
            loss_B = loss_B - smoothing * F.logsigmoid(-margins_B)
        outputs = {"log_probs": log_probs_B2, "rewards": rewards_B2} if return_outputs else None
        return ModuleOutput(loss_B.sum(), outputs)


class PreferenceMetrics(LossSum):
    """`loss`, the share of pairs whose chosen answer has the higher reward, and mean rewards and their difference."""

    def __init__(self) -> None:
        super().__init__()
        self._rewards: list[torch.Tensor] = []

    def update(self, batch: MicroBatch, output: ModuleOutput) -> None:
        """Takes one micro batch."""
        super().update(batch, output)
        assert output.outputs is not None
        self._rewards.append(output.outputs["rewards"].detach())

    def part(self) -> Any:
        """Sums of the loss, of the pairs, of the pairs in the right order, and of the rewards of both sides."""
        rewards = torch.cat(self._rewards).double() if self._rewards else torch.zeros(0, 2, dtype=torch.float64)
        return *super().part(), int((rewards[:, 0] > rewards[:, 1]).sum()), rewards.sum(0).tolist()

    def compute(self, parts: Sequence[Any]) -> dict[str, float]:
        """The metrics over all ranks' parts."""
        total = max(1, sum(part[1] for part in parts))
        chosen, rejected = (sum(part[3][side] for part in parts) / total for side in (0, 1))
        return {
            "loss": self.mean(parts),
            "reward_accuracy": sum(part[2] for part in parts) / total,
            "reward_margin": chosen - rejected,
            "chosen_reward": chosen,
            "rejected_reward": rejected,
        }

    def directions(self) -> Mapping[str, int]:
        """Less loss is better, more of the pairs in the right order, and a larger margin."""
        return {**super().directions(), "reward_accuracy": 1, "reward_margin": 1}
