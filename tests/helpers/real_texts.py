"""Slices of real texts for the integration table."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch
import transformers
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

import shardyard
from helpers.chat_folders import chat_folder
from helpers.plain_answers import rows_of, scores
from helpers.plain_tagger import entity_f1, read_conll
from helpers.real_slices import TINY_BERT, Story, steps, write_rows
from helpers.small_specs import shared_data
from shardyard_trainer.tasks.rouge import rouge

TINY_T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
TINY_BART = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 128,
}  # fmt: skip
TINY_LLAMA = {**TINY_BERT, "num_key_value_heads": 2}


def lines(path: Path, source: Path, begin: int, end: int) -> Path:
    """Some of the lines of a text that say something."""
    found = [line.strip() for line in source.read_text(encoding="utf-8").splitlines() if len(line) > 40]
    path.write_text("\n".join(found[begin:end]) + "\n", encoding="utf-8")
    return path


def plays(folder: Path) -> Story:
    """Shakespeare, letter by letter."""
    source = shared_data("tinyshakespeare") / "input.txt"
    spec = shardyard.JobSpec(
        shardyard.CausalLm(sequence_length=64),
        model=shardyard.Architecture("gpt2", {"n_layer": 1, "n_head": 2, "n_embd": 32}, dropout=0.0),
        tokenizer=shardyard.TrainedTokenizer("characters"),
        train_data=lines(folder / "plays.txt", source, 0, 500),
        eval_data=lines(folder / "plays-held.txt", source, 500, 520),
        optimization=steps(30, 1e-2),
    )
    return Story(spec)


def articles(folder: Path) -> Story:
    """Sentences of Wikipedia with masked words."""
    source = shared_data("wikitext2") / "valid.txt"
    spec = shardyard.JobSpec(
        shardyard.MaskedLm(sequence_length=32, mask_probability=0.3),
        model=shardyard.Architecture("bert", TINY_BERT, dropout=0.0),
        tokenizer=shardyard.TrainedTokenizer("wordpiece", 1000),
        train_data=lines(folder / "articles.txt", source, 0, 150),
        eval_data=lines(folder / "articles-held.txt", source, 150, 160),
        optimization=steps(40, 4e-2, batch=16),
    )
    return Story(spec, falls_to=0.95)


def articles_with_gaps(folder: Path) -> Story:
    """Sentences of Wikipedia from which spans are taken out."""
    source = shared_data("wikitext2") / "test.txt"
    spec = shardyard.JobSpec(
        shardyard.SpanCorruption(sequence_length=32),
        model=shardyard.Architecture("t5", TINY_T5, dropout=0.0),
        tokenizer=shardyard.TrainedTokenizer("wordpiece", 500),
        train_data=lines(folder / "gaps.txt", source, 0, 150),
        eval_data=lines(folder / "gaps-held.txt", source, 150, 160),
        optimization=steps(30, 1e-2),
    )
    return Story(spec)


def kinds_of_questions(folder: Path) -> Story:
    """What each question of TREC asks for: a person, a number, a place ..."""
    texts = (shared_data("trec") / "TREC.train.all").read_text(encoding="latin-1").splitlines()
    rows = [dict(zip(("label", "text"), line.split(" ", 1), strict=True)) for line in texts[:360]]
    held_out = rows[300:]
    spec = shardyard.JobSpec(
        shardyard.TextClassification(max_length=24, pooling="mean"),
        model=shardyard.Architecture("bert", TINY_BERT, dropout=0.0),
        tokenizer=shardyard.TrainedTokenizer("wordpiece", 500),
        train_data=write_rows(folder / "trec.jsonl", rows[:300]),
        eval_data=write_rows(folder / "trec-held.jsonl", held_out),
        optimization=steps(40, 1e-2),
    )

    def numbers(model: shardyard.Model) -> dict[str, float]:
        answers = model.predict([row["text"] for row in held_out])
        pairs = list(zip(answers, held_out, strict=True))
        right = sum(answer.label == row["label"] for answer, row in pairs)
        loss = -sum(math.log(answer.scores[row["label"]]) for answer, row in pairs)
        return {"accuracy": right / len(pairs), "loss": loss / len(pairs)}

    return Story(spec, numbers)


def alike(folder: Path) -> Story:
    """Sentences of STS-B with how alike people found them; some seen, so that the scores go with those of people."""
    with (shared_data("stsb") / "stsb-en-train.csv").open(encoding="utf-8", newline="") as file:
        found = [
            dict(zip(("text", "text_pair", "score"), row, strict=True))
            for row in itertools.islice(csv.reader(file), 100)
        ]
    rows = [{**row, "score": float(row["score"])} for row in found]
    held_out = rows[60:]
    spec = shardyard.JobSpec(
        shardyard.SentenceEmbedding(max_length=32, pooling="mean", lowest_score=0, highest_score=5),
        model=shardyard.Architecture("bert", TINY_BERT, dropout=0.0),
        tokenizer=shardyard.TrainedTokenizer("wordpiece", 500),
        train_data=write_rows(folder / "stsb.jsonl", rows[:80]),
        eval_data=write_rows(folder / "stsb-held.jsonl", held_out),
        optimization=steps(40, 1e-2),
    )

    def numbers(model: shardyard.Model) -> dict[str, float]:
        answers = model.predict([(row["text"], row["text_pair"]) for row in held_out])
        values = [answer.value or 0.0 for answer in answers]
        return {"pearson": statistics.correlation(values, [row["score"] for row in held_out])}

    return Story(spec, numbers)


def entities(folder: Path) -> Story:
    """People, places and organisations of Wikigold, its tags as they are; some seen, so that entities are found."""
    found = read_conll(shared_data("wikigold") / "wikigold.conll.txt")
    sentences = [sentence for sentence in found if sentence[0] != ["-DOCSTART-"]][:120]
    held_out = sentences[60:]
    files = []
    for name, part in (("wikigold.conll", sentences[:100]), ("wikigold-held.conll", held_out)):
        rows = ("\n".join(f"{word} {tag}" for word, tag in zip(*each, strict=True)) for each in part)
        (folder / name).write_text("\n\n".join(rows) + "\n", encoding="utf-8")
        files.append(folder / name)
    spec = shardyard.JobSpec(
        shardyard.TokenClassification(max_length=64, overlap=16),
        model=shardyard.Architecture("bert", TINY_BERT, dropout=0.0),
        tokenizer=shardyard.TrainedTokenizer("wordpiece", 1500),
        train_data=files[0],
        eval_data=files[1],
        optimization=steps(80, 1e-2, batch=16),
    )

    def numbers(model: shardyard.Model) -> dict[str, float]:
        answers = model.predict([shardyard.Words(words) for words, _ in held_out])
        truth, given = [tags for _, tags in held_out], [[each.tag for each in answer.tags] for answer in answers]
        pairs = [pair for row in zip(truth, given, strict=True) for pair in zip(*row, strict=True)]
        right = sum(ours == theirs for ours, theirs in pairs) / len(pairs)
        return {"f1": entity_f1(truth, given), "token_accuracy": right}

    return Story(spec, numbers)


def questions(folder: Path) -> Story:
    """Questions of XQuAD in English; some seen, so that answers are found."""
    paragraphs: list[dict[str, Any]] = []
    for article in json.loads((shared_data("xquad") / "xquad.en.json").read_text(encoding="utf-8"))["data"][:2]:
        paragraphs += article["paragraphs"]
    files = []
    for name, part in (("xquad.json", paragraphs[:6]), ("xquad-held.json", paragraphs[4:8])):
        content = {"version": "1.1", "data": [{"title": "some", "paragraphs": part}]}
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
        files.append(folder / name)
    spec = shardyard.JobSpec(
        shardyard.QuestionAnswering(max_length=128, overlap=32),
        model=shardyard.Architecture("bert", TINY_BERT, dropout=0.0),
        tokenizer=shardyard.TrainedTokenizer("wordpiece", 1500),
        train_data=files[0],
        eval_data=files[1],
        optimization=steps(80, 1e-2),
    )

    def numbers(model: shardyard.Model) -> dict[str, float]:
        held_out = rows_of([{"paragraphs": paragraphs[4:8]}])
        answers = model.predict([shardyard.Question(row["question"], row["context"]) for row in held_out])
        texts = [answer.answer.text if answer.answer else "" for answer in answers]
        return dict(zip(("exact_match", "f1"), scores(texts, held_out), strict=True))

    return Story(spec, numbers)


def passages(folder: Path) -> Story:
    """Questions of XQuAD: the sentence with the answer before others of its paragraph; some seen."""
    articles = json.loads((shared_data("xquad") / "xquad.en.json").read_text(encoding="utf-8"))["data"][:4]
    rows = []
    for row in rows_of(articles):
        answer, sentences = row["answers"][0]["text"], row["context"].split(". ")
        positives = [sentence for sentence in sentences if answer in sentence][:1]
        negatives = [sentence for sentence in sentences if answer not in sentence][:3]
        if positives and negatives:
            rows.append({"query": row["question"], "positives": positives, "negatives": negatives})
    # Passages belong to the text of a query: one that is asked twice would have them all.
    rows = list({row["query"]: row for row in rows}.values())
    held_out = rows[8:24]
    spec = shardyard.JobSpec(
        shardyard.Reranking(max_length=64),
        model=shardyard.Architecture("bert", TINY_BERT, dropout=0.0),
        tokenizer=shardyard.TrainedTokenizer("wordpiece", 1500),
        train_data=write_rows(folder / "passages.jsonl", rows[:16]),
        eval_data=write_rows(folder / "passages-held.jsonl", held_out),
        optimization=steps(60, 1e-2, batch=16),
    )

    def numbers(model: shardyard.Model) -> dict[str, float]:
        reciprocal = 0.0
        for row in held_out:
            texts = row["positives"] + row["negatives"]
            scores = [answer.value or 0.0 for answer in model.predict([(row["query"], text) for text in texts])]
            reciprocal += 1 / sum(score >= scores[0] for score in scores)
        return {"mrr_10": reciprocal / len(held_out)}

    return Story(spec, numbers)


def instructions(folder: Path) -> Story:
    """Short answers to instructions, in Alpaca's form."""
    rows = json.loads((shared_data("sft") / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    short = [row for row in rows if len(row["output"]) < 150 and not row["input"]]
    spec = shardyard.JobSpec(
        shardyard.Instruction(max_length=64),
        model=shardyard.Architecture("llama", TINY_LLAMA),
        tokenizer=shardyard.TrainedTokenizer(vocab_size=400),
        train_data=write_rows(folder / "alpaca.jsonl", short[:90]),
        eval_data=write_rows(folder / "alpaca-held.jsonl", short[90:100]),
        optimization=steps(30, 1e-2),
    )
    return Story(spec)


def preferences(folder: Path) -> Story:
    """Short answers to instructions, each preferred to the answer of another one.

    `Predict` is not asked for pairs: transformers says how much likelier the exported model finds the better answers.
    """
    rows = json.loads((shared_data("sft") / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    short = [row for row in rows if len(row["output"]) < 60 and not row["input"]]
    half = len(short) // 2
    pairs = [
        {"prompt": good["instruction"], "chosen": good["output"], "rejected": bad["output"]}
        for good, bad in zip(short[:half], short[half:], strict=False)
    ]
    before = chat_folder(folder / "before")
    spec = shardyard.JobSpec(
        shardyard.Preference(max_length=256, beta=0.5),
        model=before,
        train_data=write_rows(folder / "pairs.jsonl", pairs),
        eval_data=write_rows(folder / "pairs-held.jsonl", pairs[:10]),
        optimization=steps(20, 1e-2),
    )

    def numbers(model: shardyard.Model) -> dict[str, float]:
        after = model.download(folder / "after")
        gains = {
            name: [_log_probability(after, row, name) - _log_probability(before, row, name) for row in pairs[:10]]
            for name in ("chosen", "rejected")
        }
        won = sum(good > bad for good, bad in zip(gains["chosen"], gains["rejected"], strict=True))
        return {"reward_accuracy": won / 10}

    return Story(spec, numbers)


def _log_probability(folder: Path, row: dict[str, str], name: str) -> float:
    """Of one of two answers to a prompt, and of its end."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    asked = [{"role": "user", "content": row["prompt"]}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    answer = tokenizer(row[name], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    with torch.inference_mode():
        found = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
    return float(found.gather(1, torch.tensor(answer)[:, None]).sum())


def translations(folder: Path) -> Story:
    """Captions of pictures in English and German; some seen, so that words are right."""
    sides = {}
    for language in ("en", "de"):
        with gzip.open(shared_data("multi30k") / f"val.{language}.gz", "rt", encoding="utf-8") as file:
            sides[language] = file.read().splitlines()[:60]
    rows = [{"translation": {"en": en, "de": de}} for en, de in zip(sides["en"], sides["de"], strict=True)]
    spec = shardyard.JobSpec(
        shardyard.Translation(
            source_language="en", target_language="de", max_source_length=48, max_target_length=16, num_beams=2
        ),
        model=shardyard.Architecture("t5", TINY_T5, dropout=0.0),
        tokenizer=shardyard.TrainedTokenizer("byte_bpe", 800),
        train_data=write_rows(folder / "captions.jsonl", rows[:56]),
        eval_data=write_rows(folder / "captions-held.jsonl", rows[48:]),
        optimization=steps(60, 1e-2),
    )

    def numbers(model: shardyard.Model) -> dict[str, float]:
        texts = [answer.text or "" for answer in model.predict(sides["en"][48:])]
        targets = [sides["de"][48:]]
        return {"bleu": BLEU().corpus_score(texts, targets).score, "chrf": CHRF().corpus_score(texts, targets).score}

    return Story(spec, numbers)


def summaries(folder: Path) -> Story:
    """Titles of articles of science as summaries of their first sentences; some seen, so that words are right."""
    rows = [json.loads(line) for line in (shared_data("scitldr_a") / "dev.jsonl").read_text().splitlines()[:48]]
    pairs = [{"source": row["source"][0], "target": row["title"]} for row in rows]
    held_out = pairs[32:]
    spec = shardyard.JobSpec(
        shardyard.Summarization(max_source_length=96, max_target_length=16),
        model=shardyard.Architecture("bart", TINY_BART, dropout=0.0),
        tokenizer=shardyard.TrainedTokenizer("wordpiece", 1000),
        train_data=write_rows(folder / "abstracts.jsonl", pairs[:40]),
        eval_data=write_rows(folder / "abstracts-held.jsonl", held_out),
        optimization=steps(80, 5e-3),
    )

    def numbers(model: shardyard.Model) -> dict[str, float]:
        texts = [answer.text or "" for answer in model.predict([row["source"] for row in held_out])]
        return dict(rouge([row["target"] for row in held_out], texts)._asdict())

    return Story(spec, numbers)
