"""Folders whose tokenizer is a SentencePiece file: the library's own pieces, in the numbers of each family."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast
from transformers.utils import sentencepiece_model_pb2_new as schema

from helpers import small_specs
from helpers.tiny_pieces import write_pieces
from shardyard_trainer.inputs.vocabularies import build_tokenizer, num_ids
from shardyard_trainer.models.door import FolderInvalid, open_folder

TEXTS = ["I was born in 92000, and this is falsé.", "  two  spaces\tand tab ", "ﬁne ① 日本"]

# What the sentencepiece library (0.2.3) gives for the texts above.
LIBRARY = {
    "spiece.model": [
        [13, 1, 23, 386, 19, 561, 3050, 15, 17, 48, 25, 8256, 18, 1, 9], [81, 7644, 17, 6523], [1123, 137, 13, 1],
    ],
    "test_sentencepiece.model": [
        [8, 21, 84, 55, 24, 19, 7, 0, 602, 347, 347, 347, 3, 12, 66, 46, 72, 80, 6, 0, 4],
        [214, 277, 18, 133, 6, 12, 170, 18, 65], [714, 7, 356, 7, 0],
    ],
    "test_sentencepiece_bpe.model": [
        [16, 52, 12, 27, 936, 39, 931, 0, 998, 992, 992, 992, 953, 32, 119, 97, 20, 81, 939, 0, 951],
        [373, 224, 111, 44, 32, 3, 511], [20, 137, 475, 931, 0],
    ],
    "test_sentencepiece_with_bytefallback.model": [
        [262, 272, 1525, 286, 271, 268, 60, 916, 633, 633, 633, 259, 266, 301, 287, 384, 367, 263, 198, 172, 260],
        [412, 587, 311, 481, 263, 266, 268, 531, 347], [962, 910, 268, 233, 154, 168, 233, 159, 175],
    ],
}  # fmt: skip


def built(folder: Path, **config: Any) -> PreTrainedTokenizerFast:
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return build_tokenizer(open_folder(folder))


@pytest.mark.parametrize("name", LIBRARY)
def test_a_real_model_gives_the_pieces_that_the_library_gives(tmp_path: Path, name: str) -> None:
    shutil.copy(small_specs.shared_data("tokenizers") / "sentencepiece" / name, tmp_path / "tokenizer.model")
    tokenizer = built(tmp_path)
    assert [tokenizer(text)["input_ids"] for text in TEXTS] == LIBRARY[name]


@pytest.mark.parametrize("name", ["spiece.model", "test_sentencepiece.model"])
@pytest.mark.parametrize(
    ("model_type", "file", "shift"), [("t5", "spiece.model", 0), ("xlm-roberta", "sentencepiece.bpe.model", 1)]
)
def test_a_family_keeps_the_pieces_and_numbers_them_its_own_way(
    tmp_path: Path, name: str, model_type: str, file: str, shift: int
) -> None:
    shutil.copy(small_specs.shared_data("tokenizers") / "sentencepiece" / name, tmp_path / file)
    tokenizer = built(tmp_path, model_type=model_type)
    plain = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    unknown = 1 if name == "spiece.model" else 0
    own = tokenizer.unk_token_id
    assert plain == [[own if id_ == unknown else id_ + shift for id_ in ids] for ids in LIBRARY[name]]


BERT, ROBERTA = (
    ["[CLS] the dog[SEP]", "[CLS] the dog[SEP] cat[SEP]"],
    ["<s> the dog</s>", "<s> the dog</s></s> cat</s>"],
)
FRAMES = [
    ("llama", "tokenizer.model", None, ["<s> the dog", "<s> the dog<s> cat"]),
    ("t5", "spiece.model", ["<pad>", "</s>", "<unk>"], ["the dog</s>", "the dog</s> cat</s>"]),
    ("xlm-roberta", "sentencepiece.bpe.model", None, ROBERTA),
    ("camembert", "sentencepiece.bpe.model", None, ROBERTA),
    ("albert", "spiece.model", ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"], BERT),
    ("deberta-v2", "spm.model", ["[PAD]", "[CLS]", "[SEP]", "[UNK]"], BERT),
]


@pytest.mark.parametrize("row", FRAMES, ids=[row[0] for row in FRAMES])
def test_each_family_frames_texts_as_it_was_trained(
    tmp_path: Path, row: tuple[str, str, list[str] | None, list[str]]
) -> None:
    model_type, file, first, framed = row
    write_pieces(tmp_path / file, first=first, pairs=model_type == "llama")
    tokenizer = built(tmp_path, model_type=model_type)

    def shown(*texts: str) -> str:
        tokens = tokenizer.convert_ids_to_tokens(tokenizer(*texts)["input_ids"])
        return "".join(tokens).replace("▁", " ").strip()

    assert [shown("the dog"), shown("the dog", "cat")] == framed
    assert tokenizer.decode(tokenizer("the dog")["input_ids"], skip_special_tokens=True) == "the dog"


def test_what_was_converted_is_saved_as_one_file_that_says_the_same(tmp_path: Path) -> None:
    write_pieces(tmp_path / "tokenizer.model", pairs=True)
    tokenizer = built(tmp_path, model_type="llama")
    tokenizer.save_pretrained(tmp_path / "saved")
    again = built(tmp_path / "saved")
    assert [again(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert not list((tmp_path / "saved").glob("*.model"))


def test_added_tokens_come_after_the_pieces_under_their_own_ids(tmp_path: Path) -> None:
    write_pieces(tmp_path / "spm.model", first=["[PAD]", "[CLS]", "[SEP]", "[UNK]"])
    (tmp_path / "added_tokens.json").write_text('{"[MASK]": 12}')
    tokenizer = built(tmp_path, model_type="deberta-v2")
    assert (tokenizer.mask_token_id, num_ids(tokenizer)) == (12, 13)
    (tmp_path / "added_tokens.json").write_text('{"[MASK]": 20}')
    with pytest.raises(FolderInvalid, match="'\\[MASK\\]' has the id 20, but after this vocabulary it would have 12"):
        built(tmp_path)


BAD = [
    ("not a model", b"hello, I am a text", "cannot be parsed"),
    ("empty", b"", "SentencePiece model of unigrams or byte pairs"),
    ("cut", b"\x0a\xff\xff\xff\xff\x0f", "cannot be parsed"),
]


@pytest.mark.parametrize(("content", "part"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_a_file_that_is_not_a_model_is_refused_with_the_next_step(tmp_path: Path, content: bytes, part: str) -> None:
    (tmp_path / "spiece.model").write_bytes(content)
    with pytest.raises(FolderInvalid) as caught:
        built(tmp_path, model_type="t5")
    assert part in str(caught.value) and "save_pretrained" in str(caught.value)


def test_a_family_that_uses_its_pieces_in_another_way_is_refused_by_name(tmp_path: Path) -> None:
    write_pieces(tmp_path / "spiece.model")
    with pytest.raises(FolderInvalid, match="XLNetTokenizer is not made of"):
        built(tmp_path, model_type="xlnet")


def test_spaces_after_words_are_refused_by_name(tmp_path: Path) -> None:
    path = write_pieces(tmp_path / "tokenizer.model")
    proto = schema.ModelProto.FromString(path.read_bytes())
    proto.trainer_spec.treat_whitespace_as_suffix = True
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(FolderInvalid, match="puts the space after its words"):
        built(tmp_path)
