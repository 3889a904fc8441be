"""Teachers: what they are asked, how their outputs are compared, and which are refused, through the planner."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional

from helpers.chat_folders import MARKED, chat_folder
from helpers.plan_requests import ask, filled, fine_tuning, places, planned, pretraining, where
from helpers.small_pictures import write_folders
from helpers.tiny_folders import WORDS, gpt2_tokenizer, save_folder
from shardyard_trainer.failures import RunFailed
from shardyard_trainer.inputs.base import SampleRef
from shardyard_trainer.planning.pins import check_same_model
from shardyard_trainer.tasks.distances import of_classes, of_numbers, of_several_classes
from shardyard_trainer.tasks.distillation import prepare_both
from shardyard_trainer.training.teacher import Teacher

FIELD = "spec.distillation.teacher"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = filled(tmp_path_factory.mktemp("distillation"))
    for name, labels in {
        "judge": ("good", "bad"),
        "other-judge": ("yes", "no"),
        "numbered": ("LABEL_0", "LABEL_1"),
    }.items():
        config = {"id2label": dict(enumerate(labels)), "hidden_size": 24}
        save_folder(folder / name, "BertForSequenceClassification", **config)
    # A judge that reads bytes, and few of them.
    judge = save_folder(folder / "bytes", "GPT2ForSequenceClassification", n_positions=20, pad_token_id=256)
    assert transformers.AutoConfig.from_pretrained(judge).num_labels == 2
    # Heads that answer something else: several labels at once, more of them, and more without names.
    kind = "BertForSequenceClassification"
    names = {0: "bad", 1: "good"}
    save_folder(folder / "several", kind, id2label=names, problem_type="multi_label_classification")
    save_folder(folder / "more", kind, id2label={0: "good", 1: "fair", 2: "bad"})
    save_folder(folder / "three", kind, num_labels=3)
    save_folder(folder / "writer", "GPT2LMHeadModel", n_embd=24)
    save_folder(folder / "masked", "BertForMaskedLM", hidden_size=24)
    return folder


def distilled(teacher: Any, **changes: Any) -> dict[str, Any]:
    return fine_tuning(distillation={"teacher": {"uri": f"ROOT/{teacher}"}}, **changes)


def test_a_plan_has_the_teacher_with_its_memory_and_its_files(root: Path) -> None:
    alone, taught = ask(root, fine_tuning()).plan, ask(root, distilled("judge")).plan
    given = taught.resolved_spec.distillation
    assert (given.temperature, given.weight, given.teacher.uri) == (2.0, 0.5, str(root / "judge"))
    assert taught.num_parameters == alone.num_parameters < taught.num_teacher_parameters
    assert alone.num_teacher_parameters == alone.memory.teacher_bytes == 0
    assert taught.memory.teacher_bytes == 4 * taught.num_teacher_parameters
    grown = taught.memory.total_bytes - alone.memory.total_bytes - taught.memory.teacher_bytes
    assert grown == taught.memory.batches_bytes - alone.memory.batches_bytes > 0
    assert taught.teacher_fingerprint and not alone.teacher_fingerprint
    # Planned again, the resolved spec is the same plan.
    assert planned(root, taught.resolved_spec).plan == taught


def test_a_teacher_is_sharded_like_its_student_at_stage_3_only(root: Path) -> None:
    def teacher_bytes(stage: int, workers: int) -> int:
        spec = distilled("judge", parallelism={"zero_stage": stage}, resources={"workers": workers})
        return int(ask(root, spec).plan.memory.teacher_bytes)

    assert teacher_bytes(1, 4) == teacher_bytes(2, 4) == teacher_bytes(0, 1)
    # A quarter of it rests, and so small a one is gathered whole while it computes, which gloo does in a copy.
    assert teacher_bytes(3, 4) == pytest.approx(2.25 * teacher_bytes(2, 4), rel=0.01)


def test_the_labels_of_a_teacher_are_put_into_the_order_of_the_student(root: Path) -> None:
    plan = ask(root, distilled("judge")).plan
    assert list(plan.labels) == ["bad", "good"]
    task, lesson = prepare_both(plan.resolved_spec, where(root))
    assert lesson is not None and lesson.columns == (1, 0)
    teacher = Teacher(lesson)
    teacher.place(teacher.module)
    refs = [SampleRef(0, at) for at in range(3)]
    found = teacher.scores(lesson.task.train.micro_batch(refs))
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(root / "judge").eval()
    inputs = task.train.micro_batch(refs).inputs
    with torch.no_grad():
        logits = plain(**{name: inputs[name] for name in ("input_ids", "attention_mask", "token_type_ids")}).logits
    torch.testing.assert_close(found, logits[:, [1, 0]])


def test_a_head_without_names_teaches_the_labels_by_their_places(root: Path) -> None:
    _, lesson = prepare_both(ask(root, distilled("numbered")).plan.resolved_spec, where(root))
    assert lesson is not None and lesson.columns is None


def test_labels_that_only_the_teacher_knows_are_learnt_if_they_are_given(root: Path) -> None:
    result = ask(root, distilled("more", fine_tuning={"text_classification": {"labels": ["bad", "fair", "good"]}}))
    assert not result.violations, result.violations
    _, lesson = prepare_both(result.plan.resolved_spec, where(root))
    assert lesson is not None and lesson.columns == (2, 1, 0)


def test_outputs_of_pictures_without_names_teach_nothing(tmp_path: Path) -> None:
    write_folders(tmp_path / "pictures", 4)
    sizes = {"image_size": 24, "patch_size": 8, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(num_hidden_layers=1, num_labels=3, **sizes)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 24, "width": 24}}
    (tmp_path / "vit/preprocessor_config.json").write_text(json.dumps(settings))
    spec = {
        "fine_tuning": {"image_classification": {"image_size": 24}},
        "model": {"architecture": {"model_type": "vit", "overrides": {"num_hidden_layers": 1, **sizes}}},
        "train_data": {"uri": "ROOT/pictures"},
        "optimization": {"max_steps": 2},
        "distillation": {"teacher": {"uri": "ROOT/vit"}},
    }
    (violation,) = ask(tmp_path, spec).violations
    assert (violation.field, violation.reason) == (f"{FIELD}.uri", "TASK_MISMATCH")
    assert "outputs without names (LABEL_0 and so on), which are not known to be daisy, rose, viol" in violation.message


def test_a_teacher_whose_template_marks_other_answers_is_refused(tmp_path: Path) -> None:
    """Both read the same tokens, but the loss would be over others."""
    whole, rest = "{{ message['content'] }}", "{{ message['content'][1:] }}"
    mark = "{% generation %}"
    partly = MARKED.replace(f"{mark}{whole}", f"{{{{ message['content'][0] }}}}{mark}{rest}")
    assert partly != MARKED
    chat_folder(tmp_path / "student")
    chat_folder(tmp_path / "teacher", partly)
    chats = [[{"role": "user", "content": word}, {"role": "assistant", "content": 3 * word}] for word in WORDS]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    spec = {
        "fine_tuning": {"instruction": {}},
        "model": {"uri": "ROOT/student"},
        "train_data": {"uri": "ROOT/chats.jsonl"},
        "optimization": {"max_steps": 2},
        "distillation": {"teacher": {"uri": "ROOT/student"}},
    }
    assert not ask(tmp_path, spec).violations, "a model may be its own teacher"
    spec["distillation"] = {"teacher": {"uri": "ROOT/teacher"}}
    assert places(ask(tmp_path, spec)) == [(f"{FIELD}.uri", "TASK_MISMATCH")]


def test_a_teacher_in_bf16_reads_its_texts_at_their_places(root: Path) -> None:
    sizes = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 37, "max_position_embeddings": 64}
    config = transformers.LlamaConfig(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(root / "rotary")
    gpt2_tokenizer().save_pretrained(root / "rotary")
    result = ask(root, {**WRITTEN, "distillation": {"teacher": {"uri": "ROOT/rotary"}}})
    assert not result.violations, result.violations
    _, lesson = prepare_both(result.plan.resolved_spec, where(root))
    assert lesson is not None
    teacher = Teacher(lesson)
    before = {name: buffer.clone() for name, buffer in teacher.module.named_buffers()}
    teacher.to_bf16()
    assert {parameter.dtype for parameter in teacher.module.parameters()} == {torch.bfloat16}
    after = dict(teacher.module.named_buffers())
    assert any("inv_freq" in name for name in before)
    assert all(torch.equal(after[name], buffer) for name, buffer in before.items())
    assert teacher.scores(lesson.task.train.micro_batch([SampleRef(0, 0)])).isfinite().all()


def test_a_teacher_of_texts_reads_them_by_its_own_tokenizer_and_length(root: Path) -> None:
    spec = distilled("bytes", fine_tuning={"text_classification": {"max_length": 30, "labels": ["LABEL_0", "LABEL_1"]}})
    text = (root / "reviews.csv").read_text().replace("good", "LABEL_0").replace("bad", "LABEL_1")
    (root / "numbered.csv").write_text(text)
    result = ask(root, {**spec, "train_data": {"uri": "ROOT/numbered.csv", "columns": {"text": "text"}}})
    assert not result.violations, result.violations
    task, lesson = prepare_both(result.plan.resolved_spec, where(root))
    assert lesson is not None
    refs = [SampleRef(0, 0), SampleRef(0, 5)]
    mine, theirs = task.train.micro_batch(refs), lesson.task.train.micro_batch(refs)
    assert theirs.inputs["input_ids"].shape[1] <= 20 and theirs.inputs["input_ids"].max() > 40
    assert torch.equal(mine.inputs["labels"], theirs.inputs["labels"])
    save_folder(root / "short", "GPT2ForSequenceClassification", n_positions=12, pad_token_id=256)
    spec["distillation"] = {"teacher": {"uri": "ROOT/short"}}
    cut = ask(root, {**spec, "train_data": {"uri": "ROOT/numbered.csv", "columns": {"text": "text"}}}).plan
    (warning,) = [each for each in cut.warnings if each.field == FIELD]
    assert warning.reason == "TEXTS_CUT" and "reads at most 12 tokens" in warning.message


SMALL_GPT2 = {"architecture": {"model_type": "gpt2", "overrides": {"n_layer": 1, "n_embd": 32, "n_head": 2}}}
CORPUS: dict[str, Any] = {"train_data": {"uri": "ROOT/corpus.txt"}, "optimization": {"max_steps": 4}}
MASKED: dict[str, Any] = {
    **CORPUS,
    "pretraining": {"masked_lm": {"sequence_length": 16}},
    "model": {"uri": "ROOT/bert"},
    "distillation": {"teacher": {"uri": "ROOT/masked"}, "weight": 1, "temperature": 4},
}
WRITTEN: dict[str, Any] = {
    **CORPUS,
    "pretraining": {"causal_lm": {"sequence_length": 16}},
    "model": {"uri": "ROOT/gpt2"},
    "distillation": {"teacher": {"uri": "ROOT/writer"}},
}


@pytest.mark.parametrize("spec", [MASKED, WRITTEN], ids=["masked", "causal"])
def test_teachers_of_tokens_read_the_very_samples_of_their_students(root: Path, spec: dict[str, Any]) -> None:
    result = ask(root, spec)
    assert not result.violations, result.violations
    task, lesson = prepare_both(result.plan.resolved_spec, where(root))
    assert lesson is not None
    refs = [SampleRef(2, 1), SampleRef(2, 3)]
    mine, theirs = task.train.micro_batch(refs).inputs, lesson.task.train.micro_batch(refs).inputs
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_all_logits_that_are_compared_are_planned_for(root: Path) -> None:
    alone = ask(root, {name: value for name, value in WRITTEN.items() if name != "distillation"}).plan.memory
    taught = ask(root, WRITTEN).plan.memory
    assert taught.logits_bytes > alone.logits_bytes


REFUSED: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "a new model": (
        fine_tuning(distillation={"teacher": {"architecture": {"model_type": "bert"}}}),
        FIELD, "SPEC_INVALID", "a new model has nothing to teach",
    ),
    "no model at all": (fine_tuning(distillation={"teacher": {}}), FIELD, "SPEC_INVALID", "no model: give hub"),
    "a folder that is not there": (distilled("nowhere"), f"{FIELD}.uri", "PATH_NOT_ALLOWED", "nowhere"),
    "a model without a head": (distilled("bert"), f"{FIELD}.uri", "TASK_MISMATCH", "no trained head for text_class"),
    "other labels": (distilled("other-judge"), f"{FIELD}.uri", "LABEL_MISMATCH", "knows the labels yes, no"),
    "another problem": (
        distilled("several"), f"{FIELD}.uri", "LABEL_MISMATCH", "head is multi_label, this job is single_label",
    ),
    "more labels": (
        distilled("more"), f"{FIELD}.uri", "LABEL_MISMATCH", "give all of the teacher's as the task's `labels`",
    ),
    "more outputs without names": (
        distilled("three"), f"{FIELD}.uri", "LABEL_MISMATCH", "has 3 outputs without names, the data has bad, good",
    ),
    "another kind of model": (distilled("writer"), f"{FIELD}.uri", "TASK_MISMATCH", "no trained head"),
    "other tokens": (
        {**MASKED, "pretraining": {"causal_lm": {"sequence_length": 16}}, "model": {"uri": "ROOT/gpt2"}},
        FIELD, "OBJECTIVE_UNSUPPORTED", "as the teacher of this job",
    ),
    "other tokens of the same kind": (
        {
            **pretraining(model=SMALL_GPT2),
            "pretraining": {"causal_lm": {"sequence_length": 16}},
            "distillation": {"teacher": {"uri": "ROOT/writer"}},
        },
        f"{FIELD}.uri", "TASK_MISMATCH", "both need the same tokenizer",
    ),
    "longer sequences than it can read": (
        {
            **WRITTEN,
            "model": SMALL_GPT2,
            "tokenizer": {"uri": "ROOT/writer"},
            "pretraining": {"causal_lm": {"sequence_length": 40}},
        },
        FIELD, "SPEC_INVALID", "as the teacher of this job",
    ),
    "a task without teachers": (
        distilled("judge", fine_tuning={"sentence_embedding": {}}, train_data={"uri": "ROOT/pairs.csv"}),
        "spec.distillation", "OBJECTIVE_UNSUPPORTED", "text_classification",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_teacher_that_cannot_teach_is_refused_by_its_field(root: Path, case: str) -> None:
    (root / "pairs.csv").write_text("anchor,positive\n" + "".join(f"the {word} runs,a {word}\n" for word in WORDS[:9]))
    spec, field, reason, words = REFUSED[case]
    result = ask(root, spec)
    assert places(result) == [(field, reason)], result.violations
    assert words in result.violations[0].message


def test_a_job_without_training_has_no_teacher(root: Path) -> None:
    spec = {
        "model_evaluation": {"data": {"uri": "ROOT/reviews.csv"}},
        "model": {"uri": "ROOT/judge"},
        "distillation": {"teacher": {"uri": "ROOT/judge"}},
    }
    assert ("spec.distillation", "SPEC_INVALID") in places(ask(root, spec))


def test_a_teacher_that_has_changed_since_the_plan_ends_the_attempt(root: Path) -> None:
    save_folder(root / "changing", "BertForSequenceClassification", id2label={0: "bad", 1: "good"})
    plan = ask(root, distilled("changing")).plan
    check_same_model(plan.resolved_spec, where(root), plan)
    (root / "changing" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(RunFailed, match="the files of the teacher are not those") as failed:
        check_same_model(plan.resolved_spec, where(root), plan)
    assert (failed.value.cause, failed.value.metadata["field"]) == ("MODEL_CHANGED", FIELD)


def test_distances_are_those_of_torch() -> None:
    torch.manual_seed(3)
    student, teacher = torch.randn(7, 5, requires_grad=True), 3 * torch.randn(7, 5)
    for temperature in (0.5, 1.0, 4.0):
        log_probabilities = functional.log_softmax(student / temperature, 1)
        kl = functional.kl_div(log_probabilities, functional.softmax(teacher / temperature, 1), reduction="none")
        torch.testing.assert_close(of_classes(student, teacher, temperature), kl.sum(1) * temperature**2)
        wanted = torch.sigmoid(teacher / temperature)
        crossed = functional.binary_cross_entropy_with_logits(student / temperature, wanted, reduction="none")
        entropy = functional.binary_cross_entropy(wanted, wanted, reduction="none")
        torch.testing.assert_close(
            of_several_classes(student, teacher, temperature), (crossed - entropy).mean(1) * temperature**2
        )
    assert of_classes(student, student.detach(), 2.0).abs().max() < 1e-6
    assert of_several_classes(student, student.detach(), 2.0).abs().max() < 1e-6
    torch.testing.assert_close(of_numbers(student[:, :1], teacher[:, :1], 9.0), (student - teacher)[:, 0] ** 2)
    # As strongly as labels teach, at any temperature: the gradient of a high one is that of the outputs' difference.
    (gradient,) = torch.autograd.grad(of_classes(student, teacher, 1000.0).sum(), student)
    centred = (student - teacher) - (student - teacher).mean(1, keepdim=True)
    torch.testing.assert_close(gradient, centred.detach() / 5, rtol=0.02, atol=0.02)


def test_rows_of_a_vocabulary_that_only_one_model_has_are_no_answers() -> None:
    torch.manual_seed(4)
    student, teacher = torch.randn(3, 7), torch.randn(3, 5)
    impossible = torch.full((3, 2), -torch.inf)
    wanted = functional.softmax(torch.cat([teacher, impossible], 1) / 2, 1)
    expected = 4 * functional.kl_div(functional.log_softmax(student / 2, 1), wanted, reduction="none").sum(1)
    torch.testing.assert_close(of_classes(student, teacher, 2.0), expected)
    torch.testing.assert_close(of_classes(teacher, student, 2.0), of_classes(teacher, student[:, :5], 2.0))


def test_extreme_outputs_have_finite_distances() -> None:
    student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 3.0]])
    for distance in (of_classes, of_several_classes):
        loss = distance(student, teacher, 1.0).sum()
        (gradient,) = torch.autograd.grad(loss, student)
        assert torch.isfinite(loss) and torch.isfinite(gradient).all()
