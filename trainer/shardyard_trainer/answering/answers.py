"""What each kind of model answers: its parameters, what it refuses, how large its answer may be, and the answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shardyard.v1 import model_service_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.answering.serving import Parts
from shardyard_trainer.answering.warm import WarmModel
from shardyard_trainer.inputs import forward
from shardyard_trainer.inputs.forward import Encoded
from shardyard_trainer.models.folder import ModelFolder
from shardyard_trainer.tasks.generate import continue_texts
from shardyard_trainer.tasks.sampling import Sampling, end_tokens, sampling_of

_PARAMETERS = {"text_classification": "classification", "causal_lm": "generation", "masked_lm": "fill_mask"}
_LONGEST = 1024
"""Tokens that a text is cut to where neither training nor the architecture sets a limit."""

_TOKEN_BYTES = 16
"""Bytes of text that a token is taken to have at most, when an answer's size is foreseen."""


def wrong_parameters(request: model_service_pb2.PredictRequest, folder: ModelFolder) -> list[worker_pb2.Violation]:
    """Parameters of another task, or a model that answers nothing."""
    given, task = request.WhichOneof("parameters"), folder.task
    if task not in _PARAMETERS:
        without = f"a model whose head does not fit ({folder.reshaped})" if folder.reshaped else ""
        what = f"a {task} model" if task else without or "a bare backbone without a head"
        return [
            _violation("model", "TASK_MISMATCH", f"it is {what}, which predicts nothing; use Embed, or fine-tune it")
        ]
    if given is not None and given != _PARAMETERS[task]:
        message = f"the model is one for {task}, whose parameters are `{_PARAMETERS[task]}`; leave `{given}` out"
        return [_violation(given, "TASK_MISMATCH", message)]
    return []


def encode(model: WarmModel, texts: Sequence[tuple[str, str | None]]) -> list[Encoded]:
    """Texts as the model's task takes them: cut as in training; those to be continued whole."""
    if model.folder.task == "causal_lm":
        return forward.encode_prompts(model, [text for text, _ in texts])
    return forward.encode(model, texts, length_limit(model))


def length_limit(model: WarmModel) -> int:
    """Tokens that texts are cut to: as in training, else what the model can address."""
    limits = [limit for limit in (model.folder.max_length, model.longest) if limit is not None]
    return min(limits, default=_LONGEST)


def wrong_tokens(model: WarmModel, encoded: Sequence[Encoded]) -> list[worker_pb2.Violation]:
    """Texts without a mask, where a masked model is asked."""
    if model.folder.task != "masked_lm":
        return []
    name, mask = model.tokenizer.mask_token, model.tokenizer.mask_token_id
    message = f"no mask in its first {length_limit(model)} tokens; write {name} where a word is to be found"
    return [
        _violation(f"instances[{index}].text", "SPEC_INVALID", message)
        for index, each in enumerate(encoded)
        if mask not in each.ids
    ]


def most_bytes(model: WarmModel, request: model_service_pb2.PredictRequest, encoded: Sequence[Encoded]) -> list[int]:
    """Bytes that the answer to each instance takes at most, known before anything is computed."""
    if model.folder.task == "causal_lm":
        return [_sampling(model, request).max_new_tokens * _TOKEN_BYTES + 16] * len(encoded)
    if model.folder.task == "masked_lm":
        mask = model.tokenizer.mask_token_id
        return [each.ids.count(mask) * (_top_k(model, request) * (_TOKEN_BYTES + 24) + 8) + 16 for each in encoded]
    labels = model.folder.labels
    every = sum(len(label.encode()) + 20 for label in labels)
    return [2 * every + 4 * max(len(labels), 1) + 32] * len(encoded)


def answer_in_parts(
    model: WarmModel,
    request: model_service_pb2.PredictRequest,
    encoded: Sequence[Encoded],
    places: Sequence[int],
) -> Parts:
    """The answers in the order asked; `places` are the texts' places in their calls, which sampling depends on."""
    if model.folder.task == "causal_lm":
        return (yield from _generate(model, _sampling(model, request), encoded, places))
    if model.folder.task == "masked_lm":
        return _fill(model, _top_k(model, request), encoded)
    given = request.classification
    threshold = given.threshold if given.HasField("threshold") else 0.5
    return [_classify(model, logits_C, threshold) for logits_C in forward.head_outputs(model, encoded)]


def _classify(model: WarmModel, logits_C: torch.Tensor, threshold: float) -> model_service_pb2.Prediction:
    prediction = model_service_pb2.Prediction(logits=logits_C.tolist())
    labels = model.folder.labels
    if model.folder.problem == "regression":
        prediction.regression.value = float(logits_C[0])
        return prediction
    several = model.folder.problem == "multi_label"
    scores = (logits_C.double().sigmoid() if several else logits_C.double().softmax(-1)).tolist()
    classification = prediction.classification
    for label, score in zip(labels, scores, strict=True):
        classification.scores.add(label=label, score=score)
    if several:
        classification.labels.extend(label for label, score in zip(labels, scores, strict=True) if score >= threshold)
    else:
        classification.label = labels[int(logits_C.argmax())]
    return prediction


def _generate(model: WarmModel, sampling: Sampling, encoded: Sequence[Encoded], places: Sequence[int]) -> Parts:
    prompts = [each.ids for each in encoded]
    continued = yield from continue_texts(model, prompts, sampling, places)
    return [
        model_service_pb2.Prediction(generated_text=_continuation(model, prompt, new))
        for prompt, new in zip(prompts, continued, strict=True)
    ]


def _continuation(model: WarmModel, prompt: list[int], new: list[int]) -> str:
    """The text of the new tokens as it reads after the prompt: many decoders drop a leading space."""
    tail = prompt[-16:]
    before: str = model.tokenizer.decode(tail, skip_special_tokens=True)
    whole: str = model.tokenizer.decode(tail + new, skip_special_tokens=True)
    return (
        whole.removeprefix(before)
        if whole.startswith(before)
        else model.tokenizer.decode(new, skip_special_tokens=True)
    )


@torch.inference_mode()
def _fill(model: WarmModel, top_k: int, encoded: Sequence[Encoded]) -> list[model_service_pb2.Prediction]:
    predictions = [model_service_pb2.Prediction() for _ in encoded]
    for batch in forward.batches(encoded):
        inputs = forward.tensors(model, [encoded[index] for index in batch])
        logits_BTV = model.model(**inputs).logits
        for row, index in enumerate(batch):
            predictions[index].masked_tokens.SetInParent()
            for position, token in enumerate(encoded[index].ids):
                if token == model.tokenizer.mask_token_id:
                    probabilities, ids = logits_BTV[row, position].double().softmax(-1).topk(top_k)
                    mask = predictions[index].masked_tokens.masks.add()
                    for score, candidate in zip(probabilities.tolist(), ids.tolist(), strict=True):
                        mask.candidates.add(token=model.tokenizer.decode([candidate]), token_id=candidate, score=score)
    return predictions


def _sampling(model: WarmModel, request: model_service_pb2.PredictRequest) -> Sampling:
    ends = frozenset(end_tokens(model.model.config, model.generation, model.tokenizer))
    return sampling_of(request.generation, model.generation, ends)


def _top_k(model: WarmModel, request: model_service_pb2.PredictRequest) -> int:
    given = request.fill_mask
    return min(given.top_k if given.HasField("top_k") else 5, len(model.tokenizer))


def _violation(field: str, reason: str, message: str) -> worker_pb2.Violation:
    return worker_pb2.Violation(field=field, reason=reason, message=message)
