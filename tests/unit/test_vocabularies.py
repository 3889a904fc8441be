"""Tokenizers of folders as people have them, and of folders that are hostile: what is built, and what is refused."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from helpers import small_specs, tiny_folders
from shardyard_trainer.data.errors import SpecError
from shardyard_trainer.inputs.tokenization import encode, load_tokenizer
from shardyard_trainer.inputs.vocabularies import build_tokenizer, num_ids
from shardyard_trainer.models.door import FolderInvalid, open_folder

TEXTS = ["The dog is cute.", "the  Dogs sleep, not bad!", "ünïcode \U0001f642 2023", ""]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "dog", "##s", "is", "cute", ".", ",", "!", "sleep", "u"]


def write(folder: Path, name: str, content: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def words(folder: Path, *more: str) -> None:
    write(folder, "vocab.txt", "".join(f"{word}\n" for word in [*WORDS, *more]))


def pairs(folder: Path, special: list[str]) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*special, *alphabet, "\u0120t", "he", "\u0120the"]
    write(folder, "vocab.json", {token: index for index, token in enumerate(tokens)})
    write(folder, "merges.txt", "#version: 0.2\n\u0120 t\nh e\n\u0120t he\n")


def old_bert(folder: Path) -> None:
    words(folder)
    write(folder, "config.json", {"model_type": "bert"})


def cased_bert(folder: Path) -> None:
    words(folder, "The", "Dog")
    write(folder, "tokenizer_config.json", {"do_lower_case": False})
    write(folder, "config.json", {"model_type": "bert"})


def bert_of_windows(folder: Path) -> None:
    old_bert(folder)
    (folder / "vocab.txt").write_bytes((folder / "vocab.txt").read_bytes().replace(b"\n", b"\r\n"))


def distilbert_with_added_tokens(folder: Path) -> None:
    words(folder)
    write(folder, "added_tokens.json", {"<extra>": len(WORDS)})
    write(folder, "special_tokens_map.json", {"unk_token": "[UNK]", "additional_special_tokens": ["<extra>"]})
    write(folder, "tokenizer_config.json", {"tokenizer_class": "DistilBertTokenizer", "model_max_length": 512})


def gpt2(folder: Path) -> None:
    pairs(folder, ["<|endoftext|>"])
    write(folder, "config.json", {"model_type": "gpt2"})


def roberta(folder: Path) -> None:
    pairs(folder, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    write(folder, "tokenizer_config.json", {"tokenizer_class": "RobertaTokenizer", "add_prefix_space": True})
    mask = {"content": "<mask>", "lstrip": True, "rstrip": False, "single_word": False, "normalized": False}
    write(folder, "special_tokens_map.json", {"mask_token": mask, "bos_token": "<s>"})


def deberta(folder: Path) -> None:
    pairs(folder, ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"])
    write(folder, "config.json", {"model_type": "deberta"})


def mpnet(folder: Path) -> None:
    write(folder, "vocab.txt", "\n".join(["<s>", "<pad>", "</s>", "<unk>", *WORDS[5:], "[UNK]", "<mask>"]))
    write(folder, "tokenizer_config.json", {"tokenizer_class": "MPNetTokenizer", "do_lower_case": True})


AS_TRANSFORMERS = [
    old_bert, cased_bert, bert_of_windows, distilbert_with_added_tokens, gpt2, roberta, deberta, mpnet,
]  # fmt: skip


@pytest.mark.parametrize("make", AS_TRANSFORMERS, ids=[make.__name__ for make in AS_TRANSFORMERS])
def test_a_vocabulary_becomes_the_tokenizer_that_transformers_makes_of_it(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path)
    wanted = transformers.AutoTokenizer.from_pretrained(tmp_path)
    found = build_tokenizer(open_folder(tmp_path))
    for pair in (None, "a cat"):
        for text in TEXTS:
            assert found(text, pair)["input_ids"] == wanted(text, pair)["input_ids"], text
    assert found.special_tokens_map == wanted.special_tokens_map
    found.save_pretrained(tmp_path / "saved")
    again = build_tokenizer(open_folder(tmp_path / "saved"))
    assert [again(text)["input_ids"] for text in TEXTS] == [found(text)["input_ids"] for text in TEXTS]


def test_a_cased_vocabulary_is_not_lower_cased_unless_the_folder_says_so(tmp_path: Path) -> None:
    words(tmp_path, "The", "Dog")
    tokens = build_tokenizer(open_folder(tmp_path)).tokenize("The Dog the dog")
    assert tokens == ["The", "Dog", "the", "dog"]


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate([*alphabet, "<s>", "</s>"])}, []))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


@pytest.mark.parametrize(
    "name",
    ["LlamaTokenizer", "LlamaTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer", "BertTokenizer", "BloomTokenizer"],
)
def test_a_tokenizer_json_is_used_whatever_class_the_settings_name(tmp_path: Path, name: str) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "tokenizer_config.json", {"tokenizer_class": name, "add_bos_token": True})
    found = build_tokenizer(open_folder(tmp_path))
    for text in TEXTS:
        assert found(text)["input_ids"] == byte_level().encode(text).ids
        assert found.decode(found(text)["input_ids"]) == text


def test_special_tokens_come_from_the_class_if_no_file_names_them(tmp_path: Path) -> None:
    tiny_folders.bert_tokenizer().backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "config.json", {"model_type": "bert"})
    found = build_tokenizer(open_folder(tmp_path))
    assert (found.pad_token, found.mask_token, found.cls_token) == ("[PAD]", "[MASK]", "[CLS]")
    assert num_ids(found) == 25


@pytest.mark.parametrize("last", [300, 70_000])
def test_the_highest_id_counts_if_ids_have_gaps(tmp_path: Path, last: int) -> None:
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "<|endoftext|>": last}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(tmp_path)
    found = build_tokenizer(open_folder(tmp_path))
    assert (num_ids(found), len(found), found.eos_token_id) == (last + 1, 3, last)


def test_a_chat_template_is_kept_and_never_rendered(tmp_path: Path) -> None:
    tiny_folders.bert_tokenizer().save_pretrained(tmp_path)
    write(tmp_path, "chat_template.jinja", "{% for x in range(10**12) %}x{% endfor %}")
    found = build_tokenizer(open_folder(tmp_path))
    found.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved/chat_template.jinja").read_text() == (tmp_path / "chat_template.jinja").read_text()


def settings(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        write(folder, path.name, {**json.loads(path.read_text()), **values})

    return change


def backend(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "tokenizer.json"
        write(folder, path.name, {**json.loads(path.read_text()), **values})

    return change


def merges_longer_than_every_token(folder: Path) -> None:
    # The library panics: its buffer has the length of the longest token (huggingface/tokenizers 2094).
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]], "unk_token": None}
    backend(model=model, post_processor=None, added_tokens=[])(folder)


def charsmap(text: str) -> Callable[[Path], None]:
    return backend(normalizer={"type": "Precompiled", "precompiled_charsmap": text})


PADDING = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"}


def frame(identifier: int, kind: int) -> Callable[[Path], None]:
    """What is put around each text: one token of this id and type."""
    single = [{"SpecialToken": {"id": "[CLS]", "type_id": kind}}, {"Sequence": {"id": "A", "type_id": kind}}]
    token = {"id": "[CLS]", "ids": [identifier], "tokens": ["[CLS]"]}
    pair = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return backend(
        post_processor={
            "type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": {"[CLS]": token},
        }
    )  # fmt: skip


def words_only(vocab: Mapping[str, int]) -> Callable[[Path], None]:
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"}
    return backend(model=model, added_tokens=[], post_processor=None)


HOSTILE: list[tuple[str, Callable[[Path], None], str, str]] = [
    ("code", settings(auto_map={"AutoTokenizer": ["t.T", None]}), "CUSTOM_CODE_REFUSED", "never run"),
    ("no such class", settings(tokenizer_class="BrtTokenizer"), "MODEL_INVALID", "did you mean BertTokenizer"),
    ("class of a module", settings(tokenizer_class="os.system"), "MODEL_INVALID", "does not have"),
    ("another thing of transformers", settings(tokenizer_class="Trainer"), "MODEL_INVALID", "does not have"),
    ("class is a number", settings(tokenizer_class=5), "MODEL_INVALID", "tokenizer_class: '5', which is not a text"),
    ("token is a number", settings(pad_token=5), "MODEL_INVALID", "pad_token: '5', which is not a token"),
    ("token is an object of others", settings(pad_token={"content": "a", "lstrip": "x"}), "MODEL_INVALID", "flags"),
    ("switch is a text", settings(do_lower_case="/etc/passwd"), "MODEL_INVALID", "true or false"),
    ("length is a path", settings(model_max_length="/etc"), "MODEL_INVALID", "a number of tokens"),
    ("negative length", settings(model_max_length=-1), "MODEL_INVALID", "a number of tokens"),
    ("inputs", settings(model_input_names=["input_ids", "x"]), "MODEL_INVALID", "model_input_names"),
    ("decoder", settings(added_tokens_decoder={"x": {"content": "a"}}), "MODEL_INVALID", "under its id"),
    ("many tokens", settings(extra_special_tokens=["a"] * 200_000), "MODEL_INVALID", "100,000 tokens"),
    ("template", settings(chat_template=5), "MODEL_INVALID", "chat_template"),
    ("list of settings", lambda f: write(f, "tokenizer_config.json", "[]"), "MODEL_INVALID", "JSON object"),
    ("deep settings", lambda f: write(f, "tokenizer_config.json", "[" * 100_000), "MODEL_INVALID", "not JSON"),
    ("not UTF-8", lambda f: (f / "tokenizer.json").write_bytes(b"\xff{}"), "MODEL_INVALID", "not UTF-8"),
    ("no tokenizer", lambda f: write(f, "tokenizer.json", "{}"), "MODEL_INVALID", "tokenizer.json does not load"),
    ("another version", backend(version="9.0"), "MODEL_INVALID", "tokenizer.json does not load"),
    ("a panic", merges_longer_than_every_token, "MODEL_INVALID", "save_pretrained"),
    ("an id from outside", frame(4 * 10**9, 0), "MODEL_INVALID", "the token id 4,000,000,000 (its post_processor)"),
    ("a panic over a text", backend(pre_tokenizer={"type": "FixedLength", "length": 0}), "MODEL_INVALID", "fails on"),
    ("a panic over a map", charsmap("BAAAAGFiY2Q="), "MODEL_INVALID", "fails on a text"),
    ("a map that is none", charsmap("AA=="), "MODEL_INVALID", "does not load"),
    ("an id of two billions", words_only({"[UNK]": 2**31}), "MODEL_INVALID", "under 10,000,000"),
    ("no unknown word", words_only({"a": 0}), "MODEL_INVALID", "fails on a text"),
    ("a link out", lambda f: (f / "vocab.txt").symlink_to("/etc/passwd") or (f / "tokenizer.json").unlink(),
     "MODEL_INVALID", "link out of it"),
    ("nothing", lambda f: (f / "tokenizer.json").unlink(), "TOKENIZER_MISSING", "save_pretrained"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "reason", "part"), [row[1:] for row in HOSTILE], ids=[row[0] for row in HOSTILE])
def test_a_hostile_tokenizer_is_refused_by_name(
    tmp_path: Path, change: Callable[[Path], None], reason: str, part: str
) -> None:
    tiny_folders.bert_tokenizer().save_pretrained(tmp_path)
    change(tmp_path)
    with pytest.raises(SpecError) as caught:
        load_tokenizer(open_folder(tmp_path))
    assert (caught.value.reason, caught.value.field) == (reason, "spec.tokenizer")
    assert part in caught.value.message
    for foreign in ("pip install", "http", "0x", "/site-packages", "slice", "out of bounds", "chunk", str(tmp_path)):
        assert foreign not in caught.value.message


def test_padding_and_truncation_of_a_file_are_never_used(tmp_path: Path) -> None:
    tiny_folders.bert_tokenizer().save_pretrained(tmp_path)
    truncation = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 5}
    backend(padding={**PADDING, "strategy": {"Fixed": 10**12}}, truncation=truncation)(tmp_path)
    assert len(load_tokenizer(open_folder(tmp_path))("the dog is cute")["input_ids"]) == 6


def test_merges_are_never_left_out_by_chance(tmp_path: Path) -> None:
    tiny_folders.bert_tokenizer().save_pretrained(tmp_path)
    vocabulary = {"[UNK]": 0, "a": 1, "b": 2, "ab": 3}
    backend(model={"type": "BPE", "vocab": vocabulary, "merges": [["a", "b"]], "unk_token": "[UNK]", "dropout": 0.9},
            pre_tokenizer=None, post_processor=None, added_tokens=[])(tmp_path)  # fmt: skip
    write(tmp_path, "tokenizer_config.json", {"unk_token": "[UNK]"})
    tokenizer = load_tokenizer(open_folder(tmp_path))
    assert [tokenizer("abab" * 8)["input_ids"] for _ in range(5)] == [[3] * 16] * 5


VOCABULARIES: Mapping[str, tuple[Callable[[Path], None], str]] = {
    "merges of three": (lambda f: (gpt2(f), write(f, "merges.txt", "a b c\n")), "merges.txt, line 1"),
    "merges of nothing": (lambda f: (gpt2(f), write(f, "merges.txt", "zz yy\n")), "vocab.json does not load"),
    "ids as texts": (lambda f: (gpt2(f), write(f, "vocab.json", {"a": "0"})), "tokens and their ids"),
    "a list": (lambda f: (gpt2(f), write(f, "vocab.json", ["a"])), "tokens and their ids"),
    "no merges": (lambda f: (gpt2(f), (f / "merges.txt").unlink()), "no merges.txt"),
    "words without end": (lambda f: (old_bert(f), write(f, "vocab.txt", "a\n" * 2_000_001)), "has 2,000,001 lines"),
    "no words": (lambda f: (old_bert(f), write(f, "vocab.txt", "")), "vocab.txt is empty"),
    "added elsewhere": (lambda f: (old_bert(f), write(f, "added_tokens.json", {"<x>": 99})), "has the id 99"),
    "words of a family with more": (
        lambda f: (old_bert(f), write(f, "config.json", {"model_type": "roc_bert"})), "RoCBertTokenizer is not made"),
}  # fmt: skip


@pytest.mark.parametrize("name", VOCABULARIES)
def test_a_bad_vocabulary_is_refused_by_name(tmp_path: Path, name: str) -> None:
    make, part = VOCABULARIES[name]
    make(tmp_path)
    with pytest.raises(FolderInvalid, match=part):
        build_tokenizer(open_folder(tmp_path))


def test_many_added_tokens_cost_no_more_than_their_number(tmp_path: Path) -> None:
    old_bert(tmp_path)
    first = num_ids(build_tokenizer(open_folder(tmp_path)))
    write(tmp_path, "added_tokens.json", {f"<new {index}>": first + index for index in range(20_000)})
    began_s = time.process_time()
    tokenizer = build_tokenizer(open_folder(tmp_path))
    assert tokenizer.convert_tokens_to_ids("<new 19999>") == first + 19_999
    assert time.process_time() - began_s < 20, "one by one they take minutes"


def test_a_tokenizer_that_fails_on_the_datas_own_texts_is_to_blame_for_it(tmp_path: Path) -> None:
    # Knows every sign of the trials and nothing else.
    known = {sign: index for index, sign in enumerate(sorted(set("a word  \n\t日本 🙂 é\x00")))}
    backend = Tokenizer(models.Unigram([(sign, -1.0) for sign in known], unk_id=None))
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(open_folder(tmp_path))
    assert encode(tokenizer, ["a word"], None, 9).ids
    with pytest.raises(SpecError) as caught:
        encode(tokenizer, ["xyz"], None, 9)
    assert (caught.value.field, caught.value.reason) == ("spec.tokenizer", "MODEL_INVALID")
    assert "unknown token" in caught.value.message and "use another one" in caught.value.message


def test_gpt2s_real_vocabulary_is_read_without_a_config(tmp_path: Path) -> None:
    folder = small_specs.shared_data("tokenizers") / "gpt2"
    found = build_tokenizer(open_folder(folder))
    assert found("Hello, my dog is cute")["input_ids"] == [15496, 11, 616, 3290, 318, 13779]
