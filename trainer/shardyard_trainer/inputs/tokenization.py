"""Tokenizers: prepares a given one for training, or trains one on the corpus."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers import models as backends
from tokenizers import trainers as training
from transformers import PreTrainedTokenizerFast

from shardyard.v1 import spec_pb2
from shardyard_trainer.data.errors import SpecError
from shardyard_trainer.data.store import build_once
from shardyard_trainer.inputs.vocabularies import build_tokenizer, encoding_raises
from shardyard_trainer.models.door import Folder, FolderInvalid, open_folder
from shardyard_trainer.reading import about

TRAINED_VERSION = 2
DEFAULT_VOCAB_SIZE = 8192
_BYTES = 256
_FIELD = "spec.tokenizer"


class SpecialTokens(NamedTuple):
    """The special tokens that a kind of model needs; an empty one is not used."""

    pad: str
    unk: str
    bos: str = ""
    eos: str = ""
    cls: str = ""
    sep: str = ""
    mask: str = ""

    def names(self) -> list[str]:
        """The distinct tokens, pad first."""
        return list(dict.fromkeys(token for token in self if token))


CAUSAL = SpecialTokens(pad="<|pad|>", unk="<|unk|>", bos="<|endoftext|>", eos="<|endoftext|>")
# The order of BERT's and RoBERTa's vocabularies, whose configurations expect pad at 0 and 1.
BERT = SpecialTokens(pad="[PAD]", unk="[UNK]", cls="[CLS]", sep="[SEP]", mask="[MASK]")
SEQ2SEQ = SpecialTokens(pad="<pad>", unk="<unk>", eos="</s>")
ROBERTA = SpecialTokens(pad="<pad>", unk="<unk>", bos="<s>", eos="</s>", cls="<s>", sep="</s>", mask="<mask>")


def load_tokenizer(folder: Folder, *, field: str = _FIELD) -> PreTrainedTokenizerFast:
    """The fast tokenizer in a folder, without padding or truncation of its own.

    Raises SpecError TOKENIZER_MISSING if the folder has none, MODEL_INVALID if it does not load.
    """
    about(field, "MODEL_INVALID")
    try:
        return prepare(build_tokenizer(folder))
    except FolderInvalid as error:
        raise SpecError(field, error.reason, str(error), error.metadata) from None


def prepare(tokenizer: Any) -> PreTrainedTokenizerFast:
    """Removes fixed padding and truncation, which a tokenizer.json may contain, and pads on the right."""
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer


def ensure_pad(tokenizer: PreTrainedTokenizerFast) -> str:
    """Lets a tokenizer without a pad token pad with its end token; returns a warning about it, or an empty string."""
    if tokenizer.pad_token_id is not None:
        return ""
    stand_in = tokenizer.eos_token or tokenizer.sep_token or tokenizer.unk_token
    if stand_in is None:
        raise SpecError(
            _FIELD,
            "MODEL_INVALID",
            "the tokenizer has no pad, end, separator or unknown token to pad with; name one of its tokens as "
            "pad_token (`tokenizer.pad_token = ...`) and save it again",
        )
    tokenizer.pad_token = stand_in
    return f"the tokenizer has no pad token; {stand_in} is used, and what it pads is never attended to"


def train_tokenizer(
    wanted: spec_pb2.TrainedTokenizer, texts: Iterable[str], special: SpecialTokens, *, sentinels: int = 0
) -> PreTrainedTokenizerFast:
    """A tokenizer trained on the texts, which are gone through up to twice; the same texts give the same tokenizer.

    After all other tokens it has `sentinels` sentinels, which count in its size.
    UNIGRAM may differ in pieces of equal score that only just came in. Raises SpecError for a size too small.
    """
    algorithm, size = _algorithm_and_size(wanted)
    check_trained(wanted, special, sentinels=sentinels)
    build = {
        spec_pb2.TrainedTokenizer.ALGORITHM_BYTE_BPE: _byte_bpe,
        spec_pb2.TrainedTokenizer.ALGORITHM_WORDPIECE: _wordpiece,
        spec_pb2.TrainedTokenizer.ALGORITHM_UNIGRAM: _unigram,
        spec_pb2.TrainedTokenizer.ALGORITHM_CHARACTERS: _characters,
    }[algorithm]
    backend = build(texts, size - sentinels, special)
    if special.cls and special.sep:
        _add_frame(backend, special)
    elif special is SEQ2SEQ:
        end = special.eos
        backend.post_processor = processors.TemplateProcessing(
            single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, backend.token_to_id(end))]
        )
    roles = {f"{role}_token": token for role, token in special._asdict().items() if token}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="right",
        extra_special_tokens=[f"<extra_id_{number}>" for number in range(sentinels)],
        **roles,
    )


def check_trained(wanted: spec_pb2.TrainedTokenizer, special: SpecialTokens, *, sentinels: int = 0) -> None:
    """Raises SpecError if algorithm and size do not go together."""
    algorithm, _ = _algorithm_and_size(wanted)
    place = f"{_FIELD}.train.vocab_size"
    if not wanted.HasField("vocab_size"):
        return
    if algorithm == spec_pb2.TrainedTokenizer.ALGORITHM_CHARACTERS:
        raise SpecError(
            place,
            "SPEC_INVALID",
            f"{wanted.vocab_size}: a tokenizer of characters has those of the corpus; leave it out",
        )
    number = len(special.names()) + sentinels
    if algorithm != spec_pb2.TrainedTokenizer.ALGORITHM_BYTE_BPE and sentinels and wanted.vocab_size <= 2 * sentinels:
        message = f"{wanted.vocab_size} is too small: {sentinels} sentinels are among them; give over {2 * sentinels}"
        raise SpecError(place, "SPEC_INVALID", message)
    if algorithm == spec_pb2.TrainedTokenizer.ALGORITHM_BYTE_BPE and wanted.vocab_size < _BYTES + number:
        raise SpecError(
            place,
            "SPEC_INVALID",
            f"{wanted.vocab_size} is too small: the 256 bytes and {number} special tokens need {_BYTES + number}",
        )


def _algorithm_and_size(
    wanted: spec_pb2.TrainedTokenizer,
) -> tuple[spec_pb2.TrainedTokenizer.Algorithm.ValueType, int]:
    algorithm = wanted.algorithm or spec_pb2.TrainedTokenizer.ALGORITHM_BYTE_BPE
    return algorithm, wanted.vocab_size if wanted.HasField("vocab_size") else DEFAULT_VOCAB_SIZE


def cached_tokenizer(
    wanted: spec_pb2.TrainedTokenizer,
    texts: Iterable[str],
    special: SpecialTokens,
    *,
    data_fingerprint: str,
    cache_dir: Path,
    sentinels: int = 0,
) -> PreTrainedTokenizerFast:
    """As `train_tokenizer`, trained once for the same data and settings, whichever process comes first."""
    check_trained(wanted, special, sentinels=sentinels)
    key = json.dumps([TRAINED_VERSION, data_fingerprint, *_algorithm_and_size(wanted), special, sentinels])
    fingerprint = hashlib.sha256(key.encode()).hexdigest()[:32]

    def build(target: Path) -> None:
        for _ in texts:
            pass  # An error in the last text is reported before training on any of them.
        train_tokenizer(wanted, texts, special, sentinels=sentinels).save_pretrained(target)

    return load_tokenizer(open_folder(build_once(cache_dir / "tokenizers" / fingerprint, build)))


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """A hash of everything that decides how text becomes tokens."""
    special = {role: str(token) for role, token in tokenizer.special_tokens_map.items()}
    text = tokenizer.backend_tokenizer.to_str() + json.dumps(special, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class Encoded(NamedTuple):
    """Token ids and type ids of each text (or pair), and whether it was cut; none is empty."""

    ids: list[list[int]]
    types: list[list[int]]
    cut: list[bool]


def encode(
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    max_length: int,
    *,
    keeps_pairs: bool = False,
) -> Encoded:
    """The tokens of each text (or pair), with special tokens, the longest part cut first.

    `keeps_pairs`: of a pair only the first text is cut, which has to be enough.
    """
    cut_first = "only_first" if keeps_pairs else "longest_first"
    encoded = _encoded(tokenizer, texts, pairs, max_length, truncation=True if pairs is None else cut_first)
    # If the special tokens alone are more than max_length, the tokenizer does not truncate.
    rows = encoded["input_ids"]
    ids = [list(row[:max_length]) or [_blank(tokenizer)] for row in rows]
    types = [list(row[:max_length]) or [0] for row in encoded["token_type_ids"]]
    parts = encoded.encodings or []
    cut = [bool(part.overflowing) or len(row) > max_length for part, row in zip(parts, rows, strict=True)]
    return Encoded(ids, types, cut)


def token_places(
    tokenizer: PreTrainedTokenizerFast, text: str, pair: str | None, max_length: int
) -> list[tuple[int, int, int] | None]:
    """For each token that `encode` gives: which text it is of (0 or 1), and its first and the character after its last.

    None for the special tokens around the texts.
    """
    pairs, truncation = (None, True) if pair is None else ([pair], "longest_first")
    (found,) = _encoded(tokenizer, [text], pairs, max_length, truncation=truncation).encodings
    places = [
        None if of is None else (of, *offset) for of, offset in zip(found.sequence_ids, found.offsets, strict=True)
    ]
    return places[:max_length] or [None]


def _encoded(
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    max_length: int,
    *,
    truncation: bool | str,
) -> Any:
    with encoding_raises(encoding_fault):
        found = tokenizer(
            list(texts),
            None if pairs is None else list(pairs),
            truncation=truncation,
            max_length=max_length,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=True,
            verbose=False,
        )
    # The call leaves its truncation set on the backend.
    prepare(tokenizer)
    return found


def encoding_fault(said: str) -> SpecError:
    """A SpecError about a text that the tokenizer cannot encode."""
    return SpecError(_FIELD, "MODEL_INVALID", f"the tokenizer fails on a text: {said}; use another one")


def _blank(tokenizer: PreTrainedTokenizerFast) -> int:
    # An empty text has no token if the tokenizer adds no special ones, but it still needs a vector.
    first = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.pad_token_id
    return int(first or 0)


def _byte_bpe(texts: Iterable[str], size: int, special: SpecialTokens) -> Tokenizer:
    backend = Tokenizer(backends.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = training.BpeTrainer(
        vocab_size=size,
        special_tokens=special.names(),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(iter(texts), trainer)
    return backend


def _wordpiece(texts: Iterable[str], size: int, special: SpecialTokens) -> Tokenizer:
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    alphabet, continuing = _alphabet(texts, size - len(special.names()), normalizer, splitter)
    # The library numbers the continuing characters in the order of a hash table, which differs in every run, and breaks
    # ties by number: named beforehand, they have theirs. The vocabulary is then put into a tokenizer to which they
    # are not special tokens.
    trained = Tokenizer(backends.WordPiece(unk_token=special.unk))
    trained.normalizer = normalizer
    trained.pre_tokenizer = splitter
    trainer = training.WordPieceTrainer(
        vocab_size=size,
        special_tokens=[*special.names(), *(f"##{c}" for c in continuing)],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    trained.train_from_iterator(iter(texts), trainer)
    backend = Tokenizer(backends.WordPiece(trained.get_vocab(), unk_token=special.unk))
    backend.normalizer = normalizer
    backend.pre_tokenizer = splitter
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(special.names())
    return backend


def _alphabet(texts: Iterable[str], room: int, normalizer: Any, splitter: Any) -> tuple[list[str], list[str]]:
    """All characters, and those that continue a word, each sorted; the rarest are dropped if there is no room."""
    counts: Counter[str] = Counter()
    continuing: set[str] = set()
    for text in texts:
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)):
            counts.update(word)
            continuing.update(word[1:])
    kept = []
    for c in sorted(counts, key=lambda c: (-counts[c], c)):
        room -= 2 if c in continuing else 1
        if room < 0:
            break  # Stop here although a rarer one might fit: the alphabet stays easy to explain.
        kept.append(c)
    return sorted(kept), sorted(continuing.intersection(kept))


def _unigram(texts: Iterable[str], size: int, special: SpecialTokens) -> Tokenizer:
    trained = Tokenizer(backends.Unigram())
    trained.normalizer = normalizers.NFKC()
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    _check_unigram_size(texts, size, special)
    trainer = training.UnigramTrainer(
        vocab_size=size, special_tokens=special.names(), unk_token=special.unk, show_progress=False
    )
    trained.train_from_iterator(iter(texts), trainer)
    # Pieces of equal score come in a different order in every run, and the scores' last bits depend on threads.
    pieces = [(piece, round(score, 6)) for piece, score in json.loads(trained.to_str())["model"]["vocab"]]
    first = [(token, 0.0) for token in special.names()]
    ordinary = sorted((p for p in pieces if p[0] not in special), key=lambda piece: (-piece[1], piece[0]))
    backend = Tokenizer(backends.Unigram([*first, *ordinary], unk_id=special.names().index(special.unk)))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(special.names())
    return backend


def _check_unigram_size(texts: Iterable[str], size: int, special: SpecialTokens) -> None:
    """Raises SpecError if the vocabulary has no room for every character, which would make the training fail."""
    normalizer = normalizers.NFKC()
    # Metaspace writes this for a space, and before each text.
    characters = {"▁"}
    for text in texts:
        characters.update(normalizer.normalize_str(text).replace(" ", "▁"))
    # The library accepts a size without room for the special tokens, but may then never finish.
    num_special = len(special.names())
    if size < (least := len(characters) + num_special):
        raise SpecError(
            f"{_FIELD}.train.vocab_size",
            "SPEC_INVALID",
            f"{size:,} is too small for UNIGRAM: the data's {len(characters):,} different characters and {num_special} "
            f"special tokens need {least:,}; give that or more, or take BYTE_BPE, which needs {_BYTES + num_special}",
        )


def _characters(texts: Iterable[str], size: int, special: SpecialTokens) -> Tokenizer:
    found: set[str] = set()
    for text in texts:
        found.update(text)
    vocab = {token: i for i, token in enumerate([*special.names(), *sorted(found)])}
    backend = Tokenizer(backends.WordLevel(vocab=vocab, unk_token=special.unk))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(special.names())
    return backend


def _add_frame(backend: Tokenizer, special: SpecialTokens) -> None:
    cls, sep = special.cls, special.sep
    middle = f"{sep} {sep}" if special is ROBERTA else sep
    # RoBERTa has one type of token only and two separators between the texts of a pair.
    kind = 0 if special is ROBERTA else 1
    pair = " ".join([f"{cls}:0 $A:0", *(f"{token}:0" for token in middle.split()), f"$B:{kind} {sep}:{kind}"])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0",
        pair=pair,
        special_tokens=[(token, backend.token_to_id(token)) for token in (cls, sep)],
    )
