"""Builds tokenizers of folders from tokenizer.json alone or from known vocabulary files, never by a path.

transformers' own loader opens whatever tokenizer_config.json names (`vocab`, `vocab_file`, `merges`, `tokenizer_file`).
Here its classes get a built tokenizer or the content of a vocabulary, and the known settings of `tokenizer_settings`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import transformers
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from shardyard_trainer.data.errors import nearest, shorten
from shardyard_trainer.inputs import pieces
from shardyard_trainer.inputs.tokenizer_settings import CONFIG, ROLES, TokenizerSettings, read_settings
from shardyard_trainer.models.door import MAX_VOCABULARY_BYTES, Folder, FolderInvalid
from shardyard_trainer.plain_words import in_plain_words, panics_raise

_WORDPIECE = frozenset({"BertTokenizer", "FunnelTokenizer", "LxmertTokenizer", "MPNetTokenizer", "MobileBertTokenizer"})
_BYTE_PAIRS = frozenset(
    {
        *("GPT2Tokenizer", "RobertaTokenizer", "BartTokenizer", "DebertaTokenizer", "GPTNeoXTokenizer"),
        *("Qwen2Tokenizer", "BlenderbotTokenizer", "OpenAIGPTTokenizer", "HerbertTokenizer", "LEDTokenizer"),
    }
)
# Class names in folders that this version of transformers no longer has; their tokenizer.json is complete.
_FORMER = frozenset(
    {
        *("BloomTokenizer", "RetriBertTokenizer", "ErnieTokenizer", "ErnieMTokenizer", "RealmTokenizer"),
        *("NystromformerTokenizer", "TransfoXLTokenizer", "PhiTokenizer", "TapexTokenizer", "JukeboxTokenizer"),
        *("FalconTokenizer", "MptTokenizer", "StableLmTokenizer", "NezhaTokenizer", "MegatronBertTokenizer"),
    }
)
# Model types whose published folders read sources and targets in different ways.
_OF_TWO = frozenset({"marian", "fsmt"})
# Model types for which transformers now uses tokenizer.json; a folder without one has pieces of this kind.
_OF_PIECES = dict.fromkeys(("llama", "mistral", "mixtral"), "LlamaTokenizer")
FILES = ("tokenizer.json", "vocab.txt", "vocab.json", *pieces.FILES)
_MOST_IDS = 10_000_000
_MOST_WORDS = 2_000_000
# Words, spaces, signs outside every vocabulary, and nothing: a tokenizer must encode all of these.
_TRIALS = ("a word", "  \n\t", "\u65e5\u672c \U0001f642 \xe9\x00", "")
_SAVE = "save it with tokenizer.save_pretrained, which writes tokenizer.json"


def build_tokenizer(folder: Folder) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder, tried out on some texts. Raises FolderInvalid TOKENIZER_MISSING or MODEL_INVALID."""
    tokenizer = _build(folder)
    _check_ids(tokenizer.get_vocab())
    with encoding_raises(
        lambda said: FolderInvalid(f"the tokenizer fails on a text: {said}; {_SAVE} again", file=FILES[0])
    ):
        encoded = [tokenizer(*texts, verbose=False) for text in _TRIALS for texts in ((text,), (text, text))]
    given = {each for row in encoded for each in row["input_ids"]}
    # What frames a text has ids of its own, which the vocabulary need not have.
    if strange := given - set(tokenizer.get_vocab().values()):
        raise FolderInvalid(
            f"the tokenizer gives the token id {max(strange):,} (its post_processor), which its vocabulary does not "
            f"have; {_SAVE} again",
            file=FILES[0],
        )
    return tokenizer


def _check_ids(vocab: Mapping[str, int]) -> None:
    """Raises FolderInvalid for ids that nobody has embeddings for."""
    highest = max(vocab, key=lambda token: vocab[token], default="")
    if vocab and vocab[highest] >= _MOST_IDS:
        raise FolderInvalid(
            f"the tokenizer has the token id {vocab[highest]:,} ({shorten(highest)!r}); ids are under {_MOST_IDS:,}",
            file=FILES[0],
        )


@contextmanager
def encoding_raises(fault: Callable[[str], Exception]) -> Iterator[None]:
    """Turns a tokenizer's error or panic over a text into `fault(its message)`."""
    with panics_raise(fault):
        try:
            yield
        except Exception as error:
            # The binding raises bare Exception, such as for an unknown token in a vocabulary without one.
            if type(error) is not Exception:
                raise
            raise fault(in_plain_words(error)) from None


def last_token(tokenizer: PreTrainedTokenizerFast) -> str:
    """The token of the highest id."""
    vocab = tokenizer.get_vocab()
    return shorten(max(vocab, key=lambda token: vocab[token])) if vocab else ""


def too_many_ids(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> str:
    """The message for a tokenizer with ids beyond the model's embeddings; empty if all ids fit."""
    size = num_ids(tokenizer)
    if size <= vocab_size:
        return ""
    return (
        f"the tokenizer has the token id {size - 1:,} ({last_token(tokenizer)!r}), but the model has {vocab_size:,} "
        "embeddings (vocab_size); use the tokenizer that it was trained with, or resize the embeddings and save the "
        "model again"
    )


def too_many_types(tokenizer: PreTrainedTokenizerFast, type_vocab_size: object) -> str:
    """The message for a tokenizer with token types beyond the model's embeddings; empty if all fit.

    A model with fewer than two types never receives any.
    """
    if not isinstance(type_vocab_size, int) or type_vocab_size < 2:
        return ""
    encoded = [tokenizer(*texts, return_token_type_ids=True, verbose=False) for texts in (("a",), ("a", "a"))]
    highest = max((each for row in encoded for each in row["token_type_ids"]), default=0)
    if highest < type_vocab_size:
        return ""
    return (
        f"the tokenizer gives the token type {highest:,} (type_id of its post_processor), but the model has "
        f"{type_vocab_size:,} of them (type_vocab_size); use the tokenizer that it was trained with"
    )


def _build(folder: Folder) -> PreTrainedTokenizerFast:
    settings = read_settings(folder)
    kind = _class(folder, settings)
    with panics_raise(lambda said: FolderInvalid(f"the tokenizer does not load: {said}; {_SAVE}", file=FILES[0])):
        if folder.has("tokenizer.json"):
            return _of_file(folder, settings, kind)
        if (model_type := _model_type(folder)) in _OF_TWO:
            raise FolderInvalid(
                f"a {model_type} has two vocabularies, one for sources and one for targets, which is not supported; "
                "use a model with one for both, such as t5, bart or mbart",
                reason="TOKENIZER_MISSING",
                file="tokenizer.json",
            )
        if name := _native(folder, kind) or next((each for each in FILES[1:] if folder.has(each)), ""):
            if name.endswith(".model"):
                return _of_pieces(folder, settings, kind, name)
            return _of_vocabulary(folder, settings, kind, name)
    message = folder.no_tokenizer or f"the folder has no tokenizer.json; {_SAVE}"
    raise FolderInvalid(message, reason="TOKENIZER_MISSING", file="tokenizer.json")


def _model_type(folder: Folder) -> str:
    return str(folder.read_object("config.json").get("model_type")) if folder.has("config.json") else ""


def num_ids(tokenizer: PreTrainedTokenizerFast) -> int:
    """Rows of an embedding that holds every token: the highest id and one. Ids may have gaps, so it is not `len`."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def _of_file(folder: Folder, settings: TokenizerSettings, kind: Any) -> PreTrainedTokenizerFast:
    name = "tokenizer.json"
    try:
        backend = Tokenizer.from_str(folder.read_text(name, most_bytes=MAX_VOCABULARY_BYTES))
    except FolderInvalid:
        raise
    except Exception as error:  # edge: the binding raises bare Exception for whatever its parser refuses
        raise FolderInvalid(f"{name} does not load: {in_plain_words(error)}; {_SAVE} again", file=name) from None
    # Before transformers writes it all out, which takes a minute for an id of two billions.
    _check_ids(backend.get_vocab())
    # The file's padding and truncation would override the tokenizer's own settings.
    backend.no_padding()
    backend.no_truncation()
    # BPE dropout skips merges at random: the same text would get other tokens each time.
    if getattr(backend.model, "dropout", None) is not None:
        backend.model.dropout = None
    roles = _default_roles(kind, backend) | dict(settings.roles)
    names = {"model_input_names": kind.model_input_names} if kind is not None else {}
    try:
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, **roles, extra_special_tokens=list(settings.extra), **{**names, **settings.common}
        )
    except Exception as error:  # edge: as above
        raise FolderInvalid(f"the tokenizer does not load: {in_plain_words(error)}; {_SAVE} again", file=name) from None


def _default_roles(kind: Any, backend: Tokenizer) -> dict[str, str]:
    """The default special tokens of transformers' class, as far as the vocabulary has them."""
    if kind is None:
        return {}
    parameters = inspect.signature(kind.__init__).parameters
    defaults = {role: parameters[role].default for role in ROLES if role in parameters}
    return {
        role: str(token)
        for role, token in defaults.items()
        if token and token is not inspect.Parameter.empty and backend.token_to_id(str(token)) is not None
    }


def _of_vocabulary(folder: Folder, settings: TokenizerSettings, kind: Any, name: str) -> PreTrainedTokenizerFast:
    is_words = name == "vocab.txt"
    kind = kind or (transformers.BertTokenizer if is_words else transformers.GPT2Tokenizer)
    if not {base.__name__ for base in kind.__mro__} & (_WORDPIECE if is_words else _BYTE_PAIRS):
        raise FolderInvalid(
            f"a {kind.__name__} is not made of {name} alone; {_SAVE}", reason="TOKENIZER_MISSING", file="tokenizer.json"
        )
    switches = dict(settings.switches)
    if is_words:
        content: dict[str, Any] = {"vocab": _words(folder)}
        if "do_lower_case" not in switches:
            # transformers' default would turn every capital letter of a cased vocabulary into an unknown word.
            switches["do_lower_case"] = not _is_cased(content["vocab"])
    else:
        content = {"vocab": _numbered(folder), "merges": _merges(folder)}
    try:
        made = kind(**content, **settings.roles, **switches, **settings.common)
    except Exception as error:  # edge: as above
        raise FolderInvalid(f"{name} does not load: {in_plain_words(error)}; {_SAVE}", file=name) from None
    return _common_kind(made, settings)


def _native(folder: Folder, kind: Any) -> str:
    """The vocabulary file of transformers' class, if the folder has it; other files there belong to other classes."""
    name = str((getattr(kind, "vocab_files_names", None) or {}).get("vocab_file", ""))
    return name if name in FILES and folder.has(name) else ""


def _of_pieces(folder: Folder, settings: TokenizerSettings, kind: Any, name: str) -> PreTrainedTokenizerFast:
    proto = pieces.read_pieces(folder, name)
    try:
        backend = pieces.backend_of(proto, getattr(kind, "__name__", ""), settings.switches, file=name)
        _add_tokens(backend, settings)
        roles = {**pieces.own_roles(proto), **_default_roles(kind, backend), **settings.roles}
        names = {"model_input_names": kind.model_input_names} if kind is not None else {}
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, **roles, extra_special_tokens=list(settings.extra), **{**names, **settings.common}
        )
    except FolderInvalid:
        raise
    except Exception as error:  # edge: as above
        raise FolderInvalid(f"{name} does not load: {in_plain_words(error)}; {_SAVE}", file=name) from None


def _common_kind(made: Any, settings: TokenizerSettings) -> PreTrainedTokenizerFast:
    """The same tokenizer as the common class; everything its own class knew is in the backend by now."""
    backend = made.backend_tokenizer
    _add_tokens(backend, settings)
    roles = {role: made._special_tokens_map.get(role) or getattr(made, role) for role in ROLES}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{role: token for role, token in roles.items() if token},
        extra_special_tokens=list(settings.extra),
        **{"model_input_names": made.model_input_names, **settings.common},
    )


def _add_tokens(backend: Tokenizer, settings: TokenizerSettings) -> None:
    """Adds tokens that belong to the vocabulary but are listed elsewhere, each under its own id."""
    # All in one call: the library goes through all tokens again on every call.
    backend.add_tokens([token for token in settings.added.values() if backend.token_to_id(str(token)) is None])
    for index, token in settings.added.items():
        if (found := backend.token_to_id(str(token))) != index:
            raise FolderInvalid(
                f"the added token {shorten(str(token))!r} has the id {index}, but after this vocabulary it would have "
                f"{found}; {_SAVE}",
                file="added_tokens.json",
            )


def _class(folder: Folder, settings: TokenizerSettings) -> Any:
    """The transformers class that the folder names directly or by its model type; None if it names none.

    Raises FolderInvalid for a name that transformers does not have.
    """
    name, file = settings.class_name, CONFIG
    if not name and folder.has("config.json"):
        config = folder.read_object("config.json")
        model_type = str(config.get("model_type"))
        named = config.get("tokenizer_class") or _OF_PIECES.get(model_type) or TOKENIZER_MAPPING_NAMES.get(model_type)
        name, file = named if isinstance(named, str) else "", "config.json"
    name = name.removesuffix("Fast")
    if not name or name in _FORMER | {"PreTrainedTokenizer", "TokenizersBackend"}:
        return None
    known = {each for each in TOKENIZER_MAPPING_NAMES.values() if each}
    if not name.endswith(("Tokenizer", "Backend")) or not hasattr(transformers, name):
        raise FolderInvalid(
            f"{file} names the tokenizer_class {shorten(name)!r}, which transformers does not have"
            f"{nearest(name, known)}; correct it, or leave it out if there is a tokenizer.json",
            file=file,
        )
    found = getattr(transformers, name)
    try:
        # Slow classes count too: tokenizer.json has everything they need besides a vocabulary.
        return found if issubclass(found, PreTrainedTokenizerBase) and found.model_input_names else None
    except (TypeError, ImportError):
        pass  # a class whose library is not installed
    if folder.has("tokenizer.json"):
        return None
    raise FolderInvalid(
        f"a {name} is not made of a vocabulary alone; {_SAVE}", reason="TOKENIZER_MISSING", file="tokenizer.json"
    )


def _words(folder: Folder) -> dict[str, int]:
    lines = folder.read_text("vocab.txt", most_bytes=MAX_VOCABULARY_BYTES).replace("\r\n", "\n").split("\n")
    if lines and not lines[-1]:
        lines.pop()
    if not lines or len(lines) > _MOST_WORDS:
        what = f"has {len(lines):,} lines" if lines else "is empty"
        raise FolderInvalid(f"vocab.txt {what}; it has one token a line, {_MOST_WORDS:,} at most", file="vocab.txt")
    return {token: index for index, token in enumerate(lines)}


def _is_cased(vocab: dict[str, int]) -> bool:
    return any(token != token.lower() for token in vocab if token.removeprefix("##").isalpha())


def _numbered(folder: Folder) -> dict[str, int]:
    name = "vocab.json"
    vocab = folder.read_json(name, most_bytes=MAX_VOCABULARY_BYTES)
    if (
        not isinstance(vocab, dict)
        or len(vocab) > _MOST_WORDS
        or not all(type(index) is int and 0 <= index < _MOST_IDS for index in vocab.values())
    ):
        raise FolderInvalid(
            f"{name} is not an object of up to {_MOST_WORDS:,} tokens and their ids under {_MOST_IDS:,}", file=name
        )
    return vocab


def _merges(folder: Folder) -> list[tuple[str, str]]:
    name = "merges.txt"
    if not folder.has(name):
        raise FolderInvalid(
            f"the folder has vocab.json, but no {name}, without which its tokens cannot be made; {_SAVE}",
            reason="TOKENIZER_MISSING",
            file=name,
        )
    merges = []
    lines = folder.read_text(name, most_bytes=MAX_VOCABULARY_BYTES).replace("\r\n", "\n").split("\n")
    for number, line in enumerate(lines, 1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        parts = line.split(" ")
        if len(parts) != 2:
            raise FolderInvalid(
                f"{name}, line {number}: {shorten(line)!r} is not two tokens with a space between", file=name
            )
        merges.append((parts[0], parts[1]))
    return merges
