"""Encoder-decoders through the service: they learn, and `Predict` on the evaluation data gives the job's own number."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from sacrebleu.metrics.bleu import BLEU
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import shardyard
from helpers.pair_specs import OF_BART, sure_folder
from helpers.task_table import ROWS
from helpers.workplace import Workplace
from shardyard_trainer.tasks.rouge import rouge

NUMBERS = {"one": "eins", "two": "zwei", "three": "drei", "four": "vier", "five": "fünf", "six": "sechs"}
TINY_T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}


def counted(path: Path, number: int, seed: int) -> list[tuple[str, str]]:
    """Numbers in two languages."""
    draw = random.Random(seed)
    chosen = [draw.choices(list(NUMBERS), k=4) for _ in range(number)]
    pairs = [(" ".join(words), " ".join(NUMBERS[word] for word in words)) for words in chosen]
    rows = [{"translation": {"en": source, "de": target}} for source, target in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return pairs


def test_numbers_are_translated(place: Workplace) -> None:
    counted(place.folder / "pairs.jsonl", 400, 1)
    held_out = counted(place.folder / "held_pairs.jsonl", 30, 2)
    with shardyard.Client(place.address) as client:
        spec = shardyard.JobSpec(
            shardyard.Translation(
                source_language="en", target_language="de", source_prefix="to German: ",
                max_source_length=32, max_target_length=32, label_smoothing=0.1, num_beams=2,
            ),
            model=shardyard.Architecture("t5", TINY_T5, dropout=0.0),
            tokenizer=shardyard.TrainedTokenizer(algorithm="byte_bpe", vocab_size=320),
            train_data=place.folder / "pairs.jsonl",
            eval_data=place.folder / "held_pairs.jsonl",
            optimization=shardyard.Optimization(epochs=16, learning_rate=1e-2, global_batch_size=32, seed=3),
            **ROWS["translation"].where(),
            evaluation=shardyard.EvaluationPolicy(every=1000),
        )  # fmt: skip
        job = client.submit(spec, job_id="numbers")
        assert job.wait(timeout=300).state == "succeeded"
        model = client.model("numbers")
        assert model.info.task == "translation"
        numbers = model.info.metrics
        assert numbers["chrf"] > 50 > numbers["copied_chrf"]
        answers = model.predict([source for source, _ in held_out])
        texts = [answer.text for answer in answers]
        bleu = BLEU().corpus_score(texts, [[target for _, target in held_out]])
        assert bleu.score == pytest.approx(numbers["bleu"], abs=1e-9)
        (short,) = model.predict(["one one one one"], max_new_tokens=1, num_beams=1)
        assert short.text == "eins"
        with pytest.raises(shardyard.InvalidArgument) as caught:
            model.predict(["one"], num_beams=2, temperature=0.5)
        assert caught.value.violations[0].field == "generation.temperature"
    done = place.run("shardyard predict numbers 'six six six six' --num-beams 1 --max-new-tokens 1")
    assert done.returncode == 0 and done.stdout == "sechs\tsix six six six\n", done.stderr


def test_an_uploaded_model_writes_as_its_settings_say_or_is_refused(place: Workplace) -> None:
    folder = sure_folder(place.folder / "cnn", "Bart", "ForConditionalGeneration", std=1.0)
    # Those of facebook/bart-large-cnn, shortened.
    settings = {"early_stopping": True, "forced_bos_token_id": 2, "forced_eos_token_id": 3, "length_penalty": 2.0}
    settings |= {"max_length": 14, "min_length": 5, "no_repeat_ngram_size": 3, "num_beams": 4, **OF_BART}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    texts = ["the dog is cute", "my cat sleeps , not very good", "a bad film", "hello"]
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    wanted = [model.generate(**tokenizer(text, return_tensors="pt"))[0] for text in texts]
    with shardyard.Client(place.address) as client:
        answers = client.upload_model(folder).predict(texts)
        assert [answer.text for answer in answers] == [
            tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in wanted
        ]
        (folder / "generation_config.json").write_text(json.dumps({**settings, "guidance_scale": 1.5}))
        with pytest.raises(shardyard.InvalidArgument, match=r"has guidance_scale: 1\.5, .* leave it out"):
            client.upload_model(folder)


def reported(path: Path, number: int, seed: int) -> list[tuple[str, str]]:
    """Reports whose last sentence says who came; that is their summary."""
    draw = random.Random(seed)
    pairs = []
    for _ in range(number):
        name, place = draw.choice(["Anna", "Bob", "Clara"]), draw.choice(["Rome", "Oslo", "Bern"])
        noise = " ".join(draw.choice(["It rained.", "Nothing happened.", "All slept."]) for _ in range(2))
        pairs.append((f"{noise} {name} came to {place}.", f"{name} in {place}"))
    path.write_text("source,target\n" + "".join(f"{source},{target}\n" for source, target in pairs))
    return pairs


def test_reports_are_summarised(place: Workplace) -> None:
    reported(place.folder / "reports.csv", 300, 1)
    held_out = reported(place.folder / "held_reports.csv", 20, 2)
    with shardyard.Client(place.address) as client:
        spec = shardyard.JobSpec(
            shardyard.Summarization(max_source_length=40, max_target_length=12),
            model=shardyard.Architecture(
                "bart",
                {
                    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
                    "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
                },
                dropout=0.0,
            ),
            tokenizer=shardyard.TrainedTokenizer(algorithm="wordpiece", vocab_size=120),
            train_data=place.folder / "reports.csv",
            eval_data=place.folder / "held_reports.csv",
            optimization=shardyard.Optimization(epochs=32, learning_rate=3e-3, global_batch_size=32, seed=3),
            evaluation=shardyard.EvaluationPolicy(every=1000),
            **ROWS["summarization"].where(),
        )  # fmt: skip
        job = client.submit(spec, job_id="reports")
        assert job.wait(timeout=300).state == "succeeded"
        model = client.model("reports")
        numbers = model.info.metrics
        assert model.info.task == "summarization"
        assert numbers["rouge_1"] > 70 > numbers["lead_rouge_1"]
        answers = model.predict([source for source, _ in held_out])
        found = rouge([target for _, target in held_out], [answer.text or "" for answer in answers])
        assert found._asdict() == pytest.approx({name: numbers[name] for name in found._fields}, abs=1e-9)


def test_missing_spans_are_written_behind_their_sentinels(place: Workplace) -> None:
    (place.folder / "spans.txt").write_text("the dog sleeps and the cat eats\n" * 300)
    with shardyard.Client(place.address) as client:
        spec = shardyard.JobSpec(
            shardyard.SpanCorruption(sequence_length=32),
            model=shardyard.Architecture("t5", TINY_T5, dropout=0.0),
            tokenizer=shardyard.TrainedTokenizer(algorithm="wordpiece", vocab_size=260),
            train_data=place.folder / "spans.txt",
            optimization=shardyard.Optimization(max_steps=60, learning_rate=1e-2, global_batch_size=16, seed=3),
            **ROWS["span_corruption"].where(),
        )
        job = client.submit(spec, job_id="spans")
        assert job.wait(timeout=300).state == "succeeded"
        model = client.model("spans")
        assert model.info.task == "span_corruption" and 0 < model.info.metrics["loss"] < 3
        (answer,) = model.predict(["the dog <extra_id_0> and the cat eats"])
        assert answer.text is not None and "</s>" not in answer.text
