"""SentencePiece models as tokenizers: the file says how text becomes pieces, the family how pieces become ids.

A `.model` file is one protobuf message, parsed with the schema that transformers ships: the sentencepiece library is
not needed, and what comes out is saved as a tokenizer.json like every other. It gives the pieces that the library
gives (a test holds them), which transformers' own classes of version 5 do not for unknown characters and spaces.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram
from transformers.convert_slow_tokenizer import generate_merges
from transformers.utils import sentencepiece_model_pb2_new as schema

from shardyard_trainer.models.door import MAX_VOCABULARY_BYTES, Folder, FolderInvalid

FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "sentencepiece.model", "spm.model")
_SAVE = "save the tokenizer with tokenizer.save_pretrained, which writes tokenizer.json"
_SPACE = "▁"
_UNIGRAM, _BPE = 1, 2
_CONTROL, _USER_DEFINED = 3, 4
_EXTRA_IDS = 100

Pieces = list[tuple[str, float]]


@dataclass(frozen=True)
class _Family:
    """How a family of models uses its pieces: the tokens around a text, and what is done to the text before."""

    before: str = ""
    after: str = ""
    has_types: bool = False
    separators: int = 1
    cleans: bool = False
    lower_case: bool = False
    keep_accents: bool = True


_BERT_LIKE = _Family("[CLS]", "[SEP]", has_types=True)
_FAMILIES: Mapping[str, _Family] = {
    "LlamaTokenizer": _Family("<s>", "</s>"),
    "CodeLlamaTokenizer": _Family("<s>", "</s>"),
    "GemmaTokenizer": _Family("<bos>", "<eos>"),
    "T5Tokenizer": _Family("", "</s>"),
    "XLMRobertaTokenizer": _Family("<s>", "</s>", separators=2),
    "CamembertTokenizer": _Family("<s>", "</s>", separators=2),
    "AlbertTokenizer": _Family("[CLS]", "[SEP]", has_types=True, cleans=True, lower_case=True, keep_accents=False),
    "FNetTokenizer": _Family("[CLS]", "[SEP]", has_types=True, cleans=True),
    "RemBertTokenizer": _Family("[CLS]", "[SEP]", has_types=True, cleans=True, lower_case=True, keep_accents=False),
    "BigBirdTokenizer": _BERT_LIKE,
    "DebertaV2Tokenizer": _BERT_LIKE,
}
_OPENS_ONLY = frozenset({"LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer"})
"""Families that add a begin token and no end token, unless `add_eos_token` is set."""


def read_pieces(folder: Folder, name: str) -> Any:
    """Parses a file. Raises FolderInvalid if it is not a model of unigrams or byte pairs."""
    proto = schema.ModelProto()
    try:
        proto.ParseFromString(folder.read(name, most_bytes=MAX_VOCABULARY_BYTES))
    except DecodeError:
        raise FolderInvalid(f"{name} is not a SentencePiece model: it cannot be parsed; {_SAVE}", file=name) from None
    if not proto.pieces or proto.trainer_spec.model_type not in {_UNIGRAM, _BPE}:
        raise FolderInvalid(
            f"{name} is not a SentencePiece model of unigrams or byte pairs, the kinds that are read; {_SAVE}",
            file=name,
        )
    if proto.trainer_spec.treat_whitespace_as_suffix:
        raise FolderInvalid(f"{name} puts the space after its words, which is not supported; {_SAVE}", file=name)
    return proto


def backend_of(proto: Any, family: str, switches: Mapping[str, bool], *, file: str) -> Tokenizer:
    """The tokenizer of a model for a family of transformers' classes; an empty one: nothing around the text.

    Raises FolderInvalid for a family whose use of the pieces is not known.
    """
    if family and family not in _FAMILIES:
        raise FolderInvalid(f"a {family} is not made of {file} alone; {_SAVE}", reason="TOKENIZER_MISSING", file=file)
    found = _FAMILIES.get(family, _Family())
    vocab, unknown = _numbered(proto, family)
    backend = Tokenizer(_model(proto, vocab, unknown))
    backend.normalizer = _normalizer(proto, found, switches)
    if not _keeps_spaces(proto):
        backend.pre_tokenizer = pre_tokenizers.Metaspace(
            _SPACE, prepend_scheme=_scheme(proto), split=not any(_SPACE in piece[1:] for piece, _ in vocab)
        )
    backend.decoder = _decoder(proto)
    control = {piece.piece for piece in proto.pieces if piece.type == _CONTROL}
    control |= {"<s>", "<pad>", "</s>", "<unk>", "<mask>"} & {piece for piece, _ in vocab}
    control |= {piece for piece, _ in vocab if piece.startswith("<extra_id_")}
    backend.add_special_tokens([AddedToken(piece, normalized=False) for piece, _ in vocab if piece in control])
    own = [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]
    if proto.trainer_spec.model_type == _BPE and own:
        backend.add_tokens([AddedToken(piece, normalized=False) for piece in own])
    _frame(backend, found, family, switches)
    return backend


def own_roles(proto: Any) -> dict[str, str]:
    """The special tokens that the file itself names."""
    spec = proto.trainer_spec
    places = {"bos_token": spec.bos_id, "eos_token": spec.eos_id, "unk_token": spec.unk_id, "pad_token": spec.pad_id}
    known = {role: index for role, index in places.items() if 0 <= index < len(proto.pieces)}
    return {role: proto.pieces[index].piece for role, index in known.items()}


def _numbered(proto: Any, family: str) -> tuple[Pieces, int]:
    """The pieces in the order of the family's ids, and the id of the unknown one."""
    found = [(piece.piece, piece.score) for piece in proto.pieces]
    unknown = next((index for index, piece in enumerate(proto.pieces) if piece.type == 2), proto.trainer_spec.unk_id)
    if family == "XLMRobertaTokenizer":
        # fairseq's own four tokens come first, instead of the file's three.
        head = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
        return [*head, *found[3:], ("<mask>", 0.0)], 3
    if family == "CamembertTokenizer":
        head = [("<s>NOTUSED", 0.0), ("<pad>", 0.0), ("</s>NOTUSED", 0.0), ("<unk>", 0.0), ("<unk>NOTUSED", -100.0)]
        return [*head, *found[1:], ("<mask>", 0.0)], 3
    if family == "T5Tokenizer" and not any(piece.startswith("<extra_id_") for piece, _ in found):
        found += [(f"<extra_id_{index}>", 0.0) for index in reversed(range(_EXTRA_IDS))]
    return found, unknown


def _model(proto: Any, vocab: Pieces, unknown: int) -> Any:
    has_bytes = proto.trainer_spec.byte_fallback
    if proto.trainer_spec.model_type == _UNIGRAM:
        return Unigram(vocab, unk_id=unknown, byte_fallback=has_bytes)
    numbered = {piece: index for index, (piece, _) in enumerate(vocab)}
    # Control tokens, the unknown one and bytes are never made of smaller pieces.
    ordinary = {piece.piece: piece.score for piece in proto.pieces if piece.type == 1}
    merges = generate_merges(numbered, ordinary, skip_tokens=numbered.keys() - ordinary.keys())
    return BPE(numbered, merges, unk_token=vocab[unknown][0], fuse_unk=True, byte_fallback=has_bytes)


def _normalizer(proto: Any, family: _Family, switches: Mapping[str, bool]) -> Any:
    steps: list[Any] = []
    if family.cleans:
        steps += [normalizers.Replace("``", '"'), normalizers.Replace("''", '"')]
        if not switches.get("keep_accents", family.keep_accents):
            steps += [normalizers.NFKD(), normalizers.StripAccents()]
    if switches.get("do_lower_case", family.lower_case):
        steps.append(normalizers.Lowercase())
    if proto.normalizer_spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap))
    if proto.normalizer_spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    if _keeps_spaces(proto):
        # A text that begins with spaces gets one more, which Metaspace would not give it.
        steps += [normalizers.Prepend(_SPACE)] if proto.normalizer_spec.add_dummy_prefix else []
        steps.append(normalizers.Replace(" ", _SPACE))
    return normalizers.Sequence(steps)


def _keeps_spaces(proto: Any) -> bool:
    return not proto.normalizer_spec.remove_extra_whitespaces


def _scheme(proto: Any) -> str:
    return "always" if proto.normalizer_spec.add_dummy_prefix else "never"


def _decoder(proto: Any) -> Any:
    if not proto.trainer_spec.byte_fallback:
        return decoders.Metaspace(_SPACE, prepend_scheme=_scheme(proto))
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if proto.normalizer_spec.add_dummy_prefix else steps)


def _frame(backend: Tokenizer, found: _Family, family: str, switches: Mapping[str, bool]) -> None:
    before, after = found.before, found.after
    if family in _OPENS_ONLY:
        before = before if switches.get("add_bos_token", True) else ""
        after = after if switches.get("add_eos_token", False) else ""
    tokens = [token for token in (before, after) if token]
    if not tokens or any(backend.token_to_id(token) is None for token in tokens):
        return
    kind = 1 if found.has_types else 0
    first = [*([f"{before}:0"] if before else []), "$A:0", *([f"{after}:0"] if after else [])]
    again = [f"{before}:{kind}"] if before and family in _OPENS_ONLY else []
    middle = [f"{after}:0"] * (found.separators - 1)
    second = [*again, f"$B:{kind}", *([f"{after}:{kind}"] if after else [])]
    backend.post_processor = processors.TemplateProcessing(
        single=" ".join(first),
        pair=" ".join([*first, *middle, *second]),
        special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys(tokens)],
    )
