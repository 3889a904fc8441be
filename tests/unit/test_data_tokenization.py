"""Tokenizers trained and given, and the cache of tokenizers and tokens."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from helpers import small_specs, tiny_folders
from shardyard.v1 import spec_pb2
from shardyard_trainer.data.errors import SpecError
from shardyard_trainer.data.sources import resolve_source
from shardyard_trainer.data.store import TokenStore, TokenWriter, build_once, files_fingerprint
from shardyard_trainer.inputs import tokenization
from shardyard_trainer.inputs.packed import Blocks, Corpus, causal_frame, load_corpus
from shardyard_trainer.inputs.vocabularies import num_ids
from shardyard_trainer.models.door import open_folder

BYTE_BPE, WORDPIECE, UNIGRAM, CHARACTERS = (
    spec_pb2.TrainedTokenizer.ALGORITHM_BYTE_BPE,
    spec_pb2.TrainedTokenizer.ALGORITHM_WORDPIECE,
    spec_pb2.TrainedTokenizer.ALGORITHM_UNIGRAM,
    spec_pb2.TrainedTokenizer.ALGORITHM_CHARACTERS,
)
TEXTS = small_specs.sentences(300)


def trained(algorithm: spec_pb2.TrainedTokenizer.Algorithm.ValueType, special: tokenization.SpecialTokens) -> object:
    size = None if algorithm == CHARACTERS else 300
    return tokenization.train_tokenizer(spec_pb2.TrainedTokenizer(algorithm=algorithm, vocab_size=size), TEXTS, special)


@pytest.mark.parametrize("algorithm", [BYTE_BPE, WORDPIECE, UNIGRAM, CHARACTERS])
@pytest.mark.parametrize("special", [tokenization.CAUSAL, tokenization.BERT, tokenization.ROBERTA])
def test_a_trained_tokenizer_has_its_special_tokens_and_gives_the_text_back(
    tmp_path: Path,
    algorithm: spec_pb2.TrainedTokenizer.Algorithm.ValueType,
    special: tokenization.SpecialTokens,
) -> None:
    first, second = trained(algorithm, special), trained(algorithm, special)
    assert first.get_vocab() == second.get_vocab()  # type: ignore[attr-defined]
    first.save_pretrained(tmp_path)  # type: ignore[attr-defined]
    tokenizer = tokenization.load_tokenizer(open_folder(tmp_path))
    assert len(tokenizer) <= 300
    for role, token in special._asdict().items():
        assert getattr(tokenizer, f"{role}_token") == (token or None)
    ids = tokenizer(TEXTS[0])["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == TEXTS[0]
    if special.cls:
        assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)


CHARACTERS_OF = [
    ("few", ["ab ba", "c"], 4),  # With the sign for a space.
    ("without a space", ["ab"], 3),
    ("the same once normalised", ["ﬁ ①", "f i 1"], 4),
    ("many", ["".join(map(chr, range(0x4E00 + 10 * k, 0x4E00 + 10 * k + 10))) for k in range(40)], 401),
    ("controls and tabs", ["a\tb\x7f", "\u3000x"], 6),
]


@pytest.mark.parametrize(("texts", "number"), [row[1:] for row in CHARACTERS_OF], ids=[row[0] for row in CHARACTERS_OF])
def test_a_unigram_vocabulary_without_a_place_for_each_character_is_refused(texts: list[str], number: int) -> None:
    least = number + len(tokenization.CAUSAL.names())
    wanted = spec_pb2.TrainedTokenizer(algorithm=UNIGRAM, vocab_size=least - 1)
    with pytest.raises(SpecError) as caught:
        tokenization.train_tokenizer(wanted, texts, tokenization.CAUSAL)
    assert (caught.value.reason, caught.value.field) == ("SPEC_INVALID", "spec.tokenizer.train.vocab_size")
    words = (f"{least - 1} is too small", f"{number} different characters", f"need {least}", "BYTE_BPE")
    assert all(word in caught.value.message for word in words), caught.value.message
    wanted.vocab_size = least
    assert len(tokenization.train_tokenizer(wanted, texts, tokenization.CAUSAL)) >= least


MANY_CHARACTERS = CHARACTERS_OF[3][1]


@pytest.mark.parametrize("algorithm", [BYTE_BPE, WORDPIECE])
@pytest.mark.parametrize("size", [261, 300, 1000])
@pytest.mark.parametrize("texts", [MANY_CHARACTERS, [*TEXTS, *MANY_CHARACTERS]], ids=["many", "words and many"])
def test_a_vocabulary_is_at_most_as_large_as_it_was_asked_for(
    algorithm: spec_pb2.TrainedTokenizer.Algorithm.ValueType, size: int, texts: list[str]
) -> None:
    wanted = spec_pb2.TrainedTokenizer(algorithm=algorithm, vocab_size=size)
    tokenizer = tokenization.train_tokenizer(wanted, texts, tokenization.BERT)
    assert len(tokenizer) == num_ids(tokenizer) <= size
    again = tokenization.train_tokenizer(wanted, texts, tokenization.BERT)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_a_small_wordpiece_vocabulary_keeps_the_commonest_characters() -> None:
    wanted = spec_pb2.TrainedTokenizer(algorithm=WORDPIECE, vocab_size=17)
    tokenizer = tokenization.train_tokenizer(wanted, ["ab" * 50, "cd" * 40, "ef" * 30, "z"], tokenization.BERT)
    assert {"a", "##a", "b", "##b", "c", "d", "##c", "##d"} < set(tokenizer.get_vocab())
    assert tokenizer("z")["input_ids"][1] == tokenizer.unk_token_id


def test_no_continuing_piece_is_made_of_a_character_that_never_continues_a_word() -> None:
    wanted = spec_pb2.TrainedTokenizer(algorithm=WORDPIECE, vocab_size=1000)
    tokenizer = tokenization.train_tokenizer(wanted, MANY_CHARACTERS, tokenization.BERT)
    assert not [token for token in tokenizer.get_vocab() if token.startswith("##")]
    assert len(tokenizer) == 405


def test_characters_take_any_number_of_them() -> None:
    wanted = spec_pb2.TrainedTokenizer(algorithm=CHARACTERS)
    assert len(tokenization.train_tokenizer(wanted, MANY_CHARACTERS, tokenization.CAUSAL)) == 403


def test_byte_bpe_knows_every_text() -> None:
    tokenizer = trained(BYTE_BPE, tokenization.CAUSAL)
    text = "Ünïcödé 日本 🙂\t\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text  # type: ignore[attr-defined, operator]


def test_characters_are_those_of_the_corpus_line_breaks_included() -> None:
    wanted = spec_pb2.TrainedTokenizer(algorithm=CHARACTERS)
    tokenizer = tokenization.train_tokenizer(wanted, ["ab\nc", "b d"], tokenization.CAUSAL)
    assert set(tokenizer.get_vocab()) - set(tokenization.CAUSAL) == set("abcd \n")
    ids = tokenizer("a\nz")["input_ids"]
    assert len(ids) == 3 and ids[2] == tokenizer.unk_token_id


def test_fixed_padding_and_truncation_are_taken_off(tmp_path: Path) -> None:
    given = tiny_folders.bert_tokenizer()
    given.backend_tokenizer.enable_padding(length=24)
    given.backend_tokenizer.enable_truncation(3)
    given.save_pretrained(tmp_path)
    tokenizer = tokenization.load_tokenizer(open_folder(tmp_path))
    assert len(tokenizer("the dog is very cute")["input_ids"]) == 7
    ids = tokenization.encode(tokenizer, ["the dog is very cute", "dog"], None, 5).ids
    assert [len(row) for row in ids] == [5, 3]
    assert tokenizer.backend_tokenizer.truncation is None
    assert len(tokenizer("the dog is very cute")["input_ids"]) == 7


def test_the_longer_text_of_a_pair_is_cut_first() -> None:
    tokenizer = tokenization.prepare(tiny_folders.bert_tokenizer())
    ids, types, _ = tokenization.encode(tokenizer, ["the dog is very very cute"], ["a cat"], 8)
    assert tokenizer.decode(ids[0]) == "[CLS] the dog is [SEP] a cat [SEP]"
    assert types[0] == [0, 0, 0, 0, 0, 1, 1, 1]


def test_an_empty_text_still_has_a_token() -> None:
    tokenizer = tokenization.prepare(tiny_folders.gpt2_tokenizer())
    assert tokenization.encode(tokenizer, ["", "a"], None, 8).ids[0] == [tokenizer.eos_token_id]


def test_a_folder_is_built_once_by_the_first_process(tmp_path: Path) -> None:
    built: list[int] = []

    def build(target: Path) -> None:
        built.append(1)
        (target / "a").write_text("1")
        time.sleep(0.05)  # the others are to arrive meanwhile

    for times in (1, 2):
        threads = [threading.Thread(target=build_once, args=(tmp_path / "x", build)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(built) == times
        assert (tmp_path / "x" / "a").read_text() == "1"
        (tmp_path / "x" / "a").write_text("")  # damaged: it is built again, once as well


def test_a_build_that_fails_leaves_nothing_and_is_tried_again(tmp_path: Path) -> None:
    def fail(target: Path) -> None:
        (target / "half").write_text("")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        build_once(tmp_path / "x", fail)
    assert not (tmp_path / "x").exists()
    assert build_once(tmp_path / "x", lambda target: (target / "a").touch()).is_dir()
    assert {path.name for path in (tmp_path / "x").iterdir()} == {"a", "sizes.json"}


def test_a_store_gives_back_what_was_written(tmp_path: Path) -> None:
    writer = TokenWriter(tmp_path, "<u2")
    writer.add([[1, 2], []], bytes=[3, 0])
    writer.add([[7]], bytes=[1])
    writer.add_array("types", np.zeros(3, np.uint8))
    writer.finish(name="x")
    store = TokenStore.open(tmp_path)
    assert (store.tokens.tolist(), store.offsets.tolist(), store.lengths().tolist()) == (
        [1, 2, 7],
        [0, 2, 2, 3],
        [2, 0, 1],
    )
    assert (store.arrays["bytes"].tolist(), store.meta) == ([3, 0, 1], {"name": "x"})


def test_a_store_that_is_cut_short_is_not_opened(tmp_path: Path) -> None:
    writer = TokenWriter(tmp_path, "<u2")
    writer.add([[1, 2, 3]])
    writer.finish()
    os.truncate(tmp_path / "tokens.bin", 4)
    with pytest.raises(ValueError, match="file size"):
        TokenStore.open(tmp_path)


@pytest.mark.parametrize("name", ["meta.json", "tokens.bin", "offsets.bin", "sizes.json"])
@pytest.mark.parametrize("length", [0, 8, None])
def test_a_damaged_corpus_is_tokenised_again(tmp_path: Path, name: str, length: int | None) -> None:
    source = spec_pb2.DataSource(uri=str(small_specs.write_corpus(tmp_path)))
    files = resolve_source(source, small_specs.locations(tmp_path))
    tokenizer = tokenization.prepare(tiny_folders.gpt2_tokenizer())

    def load() -> tuple[list[int], list[int]]:
        frame = causal_frame(tokenizer)
        store = load_corpus(files, source, tokenizer, frame, whole_words=False, cache_dir=tmp_path / "cache")
        return store.tokens.tolist(), store.offsets.tolist()

    first = load()
    (path,) = (tmp_path / "cache/corpora").glob(f"*/{name}")
    if length is None:
        path.unlink()
    else:
        os.truncate(path, length)
    assert load() == first
    inode = path.stat().st_ino
    load()
    assert path.stat().st_ino == inode, "what is whole is left alone"


def test_a_damaged_tokenizer_is_trained_again(tmp_path: Path) -> None:
    def cached() -> dict[str, int]:
        wanted = spec_pb2.TrainedTokenizer(vocab_size=300)
        tokenizer = tokenization.cached_tokenizer(
            wanted, TEXTS, tokenization.CAUSAL, data_fingerprint="x", cache_dir=tmp_path
        )
        return tokenizer.get_vocab()

    first = cached()
    (path,) = tmp_path.glob("tokenizers/*/tokenizer.json")
    os.truncate(path, 0)
    assert cached() == first


def test_a_fingerprint_is_of_the_bytes_not_of_the_name(tmp_path: Path) -> None:
    def fingerprint(name: str, content: str) -> str:
        (tmp_path / name).write_text(content)
        source = spec_pb2.DataSource(uri=str(tmp_path / name))
        return files_fingerprint(resolve_source(source, small_specs.locations(tmp_path)), field="spec.train_data")

    assert fingerprint("a.txt", "x\n") == fingerprint("b.txt", "x\n") != fingerprint("a.txt", "y\n")


def test_a_corpus_is_tokenised_once_and_again_when_a_byte_changes(tmp_path: Path) -> None:
    path = small_specs.write_corpus(tmp_path)
    source = spec_pb2.DataSource(uri=str(path))
    tokenizer = tokenization.prepare(tiny_folders.gpt2_tokenizer())

    def load() -> TokenStore:
        files = resolve_source(source, small_specs.locations(tmp_path))
        frame = causal_frame(tokenizer)
        return load_corpus(files, source, tokenizer, frame, whole_words=False, cache_dir=tmp_path / "cache")

    first, again = load(), load()
    assert first.tokens.tolist() == again.tokens.tolist()
    assert len(list((tmp_path / "cache/corpora").glob("[!.]*"))) == 1
    path.write_text(path.read_text() + "one more\n")
    assert load().num_sequences == first.num_sequences + 1
    assert first.meta["num_bytes"] == sum(len(text) for text in small_specs.sentences(200))


@pytest.mark.parametrize("length", [7, 16, 64])
def test_blocks_are_a_pure_function_and_cover_the_stream(length: int) -> None:
    starts = np.array([0, 5, 6, 40, 90])
    corpus = Corpus(np.arange(100), starts, None, 100)
    blocks = Blocks(corpus, length, seed=3, shuffle=True, overlap=1)
    for data_epoch in (0, 1, 2):
        seen = [blocks.block(data_epoch, i)[0][:-1] for i in range(blocks.num_blocks)]
        flat = np.concatenate(seen)
        assert len(set(flat.tolist())) == len(flat) == blocks.num_blocks * length
        again = Blocks(corpus, length, seed=3, shuffle=True, overlap=1)
        assert all(np.array_equal(again.block(data_epoch, i)[0][:-1], part) for i, part in enumerate(seen))
    places, begins = blocks.block(0, 0)
    expected = np.isin(places, starts)
    expected[0] = True
    assert np.array_equal(begins, expected)


def test_tinyshakespeare_has_65_characters(tmp_path: Path) -> None:
    text = (small_specs.shared_data("tinyshakespeare") / "input.txt").read_text()
    wanted = spec_pb2.TrainedTokenizer(algorithm=CHARACTERS)
    tokenizer = tokenization.train_tokenizer(wanted, [text], tokenization.CAUSAL)
    assert len(tokenizer) - len(tokenization.CAUSAL.names()) == 65


def test_gpt2s_real_tokenizer_pads_with_its_end(tmp_path: Path) -> None:
    folder = small_specs.shared_data("tokenizers") / "gpt2"
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(folder / name, tmp_path / name)
    tokenizer = tokenization.load_tokenizer(open_folder(tmp_path))
    assert "<|endoftext|>" in tokenization.ensure_pad(tokenizer)
    assert tokenizer.decode(tokenizer("Hello, my dog is cute")["input_ids"]) == "Hello, my dog is cute"
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 50256
