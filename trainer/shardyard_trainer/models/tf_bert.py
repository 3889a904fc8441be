"""The names of BERT in TensorFlow checkpoints: the original of TensorFlow 1, and Model Garden's encoders V1 and V2.

Kernels are [in, out] in TensorFlow and [out, in] in PyTorch. Model Garden keeps the heads apart (a query's kernel is
[width, heads, width / heads]), so that its shapes say everything but the activation, which is the tanh approximation of
GELU there. The original has no trace of the number of heads: bert_config.json has to give it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count, takewhile
from typing import Any

from shardyard_trainer.data.errors import listed, shorten
from shardyard_trainer.models.conversion import Layout, Shapes, Weight, check_shapes
from shardyard_trainer.models.door import Folder, FolderInvalid
from shardyard_trainer.models.tf_settings import BERT, Settings, bert_settings

_TF1_WORDS = re.compile(r"((?:.*/)?)(bert(?:_[0-9]+)?)/embeddings/word_embeddings")
_NORMS = ("LayerNorm", "layer_normalization")
_V1_POSITIONS = re.compile(r"(.*?)layer_with_weights-1/embeddings")
_V2_POSITIONS = re.compile(r"(.*?)_position_embedding_layer/embeddings")
_ACTIVATIONS = {"relu": "relu", "tanh": "tanh", "silu": "silu", "swish": "silu", "gelu_new": "gelu_new"}
_TF1_PARTS = {
    "attention.self.query": "attention/self/query",
    "attention.self.key": "attention/self/key",
    "attention.self.value": "attention/self/value",
    "attention.output.dense": "attention/output/dense",
    "attention.output.LayerNorm": "attention/output/LayerNorm",
    "intermediate.dense": "intermediate/dense",
    "output.dense": "output/dense",
    "output.LayerNorm": "output/LayerNorm",
}
_GARDEN_PARTS = {
    "attention.self.query": "_attention_layer/_query_dense",
    "attention.self.key": "_attention_layer/_key_dense",
    "attention.self.value": "_attention_layer/_value_dense",
    "attention.output.dense": "_attention_layer/_output_dense",
    "attention.output.LayerNorm": "_attention_layer_norm",
    "intermediate.dense": "_intermediate_dense",
    "output.dense": "_output_dense",
    "output.LayerNorm": "_output_layer_norm",
}


@dataclass(frozen=True)
class _Names:
    """Where the parts of one checkpoint are; those that it does not have are empty.

    `masked` are dense layer, norm and bias of the head of masked words; `heads` are the prefixes in the Hugging Face
    model of heads with a linear layer, and its kernel and bias.
    """

    what: str
    gelu: str
    words: str
    positions: str
    types: str
    norm: str
    pooler: str
    layer: Callable[[int], str]
    parts: Mapping[str, str]
    masked: tuple[str, str, str] | None
    heads: Mapping[str, tuple[str, str]]
    unused: tuple[str, ...] = ()

    @property
    def keeps_heads_apart(self) -> bool:
        """Whether kernels of the attention have an axis for the heads, and those of other heads are [in, out]."""
        return self.parts is _GARDEN_PARTS


def recognise(shapes: Shapes, folder: Folder) -> Layout | None:
    """The layout of a BERT's tensors; None: it is another model. Raises FolderInvalid for one that lacks something."""
    named = _names(shapes)
    return _layout(named, shapes, bert_settings(folder)) if named is not None else None


def _names(shapes: Shapes) -> _Names | None:
    if (match := next((match for name in sorted(shapes) if (match := _TF1_WORDS.fullmatch(name))), None)) is not None:
        return _tf1_names(shapes, match[1], f"{match[1]}{match[2]}")
    if (root := _root(shapes, _V2_POSITIONS)) is not None:
        return _v2_names(shapes, root)
    root = _root(shapes, _V1_POSITIONS)
    if root is not None and f"{root}layer_with_weights-4/_attention_layer/_query_dense/kernel" in shapes:
        return _v1_names(shapes, root)
    return None


def _root(shapes: Shapes, anchor: re.Pattern[str]) -> str | None:
    """What the names of the encoder begin with, such as `encoder/`."""
    return next((match[1] for name in shapes if (match := anchor.fullmatch(name))), None)


def _tf1_names(shapes: Shapes, root: str, encoder: str) -> _Names:
    """Of the encoder whose names begin with `encoder`; `root` is what those of its heads begin with."""
    _refuse_albert(shapes, encoder)
    transform = f"{root}cls/predictions/transform"
    has_masked = f"{transform}/dense/kernel" in shapes
    heads = {
        "cls.seq_relationship": f"{root}cls/seq_relationship/",
        "qa_outputs": f"{root}cls/squad/",
        "classifier": root,
    }
    # Code that was moved to Keras' layers calls its norms so.
    norm = next((name for name in _NORMS if f"{encoder}/embeddings/{name}/gamma" in shapes), _NORMS[0])
    masked = (f"{transform}/dense", f"{transform}/{norm}", f"{root}cls/predictions/output_bias")
    return _Names(
        what="the original BERT (TensorFlow 1)",
        gelu="gelu",
        words=f"{encoder}/embeddings/word_embeddings",
        positions=f"{encoder}/embeddings/position_embeddings",
        types=f"{encoder}/embeddings/token_type_embeddings",
        norm=f"{encoder}/embeddings/{norm}",
        pooler=f"{encoder}/pooler/dense" * (f"{encoder}/pooler/dense/kernel" in shapes),
        layer=lambda index: f"{encoder}/encoder/layer_{index}/",
        parts={part: place.replace("LayerNorm", norm) for part, place in _TF1_PARTS.items()},
        masked=masked if has_masked else None,
        heads={
            name: (f"{place}output_weights", f"{place}output_bias")
            for name, place in heads.items()
            if f"{place}output_weights" in shapes
        },
    )


def _refuse_albert(shapes: Shapes, encoder: str) -> None:
    """Raises FolderInvalid for the names of an ALBERT, which has the same embeddings."""
    place = f"{encoder}/encoder/transformer/"
    if inner := sorted(name for name in shapes if name.startswith(place)):
        raise FolderInvalid(
            f"this is an ALBERT ({shorten(inner[0])}), which is not converted; give a Hugging Face folder of it as "
            "`uri`, or its name as `hub`",
            tensor=inner[0],
        )


def _v1_names(shapes: Shapes, root: str) -> _Names:
    """Of the encoder that is a functional model of Keras, whose layers have numbers."""
    layer = f"{root}layer_with_weights-"
    kernels = [name for name in shapes if name.startswith(layer) and name.count("/") == layer.count("/") + 1]
    pooler = next((name.removesuffix("/kernel") for name in kernels if name.endswith("/kernel")), "")
    return _garden_names(
        shapes,
        root,
        what="Model Garden's BERT encoder V1",
        words=f"{layer}0/embeddings",
        positions=f"{layer}1/embeddings",
        types=f"{layer}2/embeddings",
        norm=f"{layer}3",
        pooler=pooler,
        layer=lambda index: f"{layer}{index + 4}/",
    )


def _v2_names(shapes: Shapes, root: str) -> _Names:
    """Of the encoder that is a layer of Keras, whose parts are its attributes."""
    return _garden_names(
        shapes,
        root,
        what="Model Garden's BERT encoder V2",
        words=f"{root}_embedding_layer/embeddings",
        positions=f"{root}_position_embedding_layer/embeddings",
        types=f"{root}_type_embedding_layer/embeddings",
        norm=f"{root}_embedding_norm_layer",
        pooler=f"{root}_pooler_layer" * (f"{root}_pooler_layer/kernel" in shapes),
        layer=lambda index: f"{root}_transformer_layers/{index}/",
    )


def _garden_names(shapes: Shapes, root: str, *, words: str, pooler: str, **places: Any) -> _Names:
    # The head of masked words shares the table of words, which is stored under the shorter of its two paths.
    if words not in shapes:
        words = next((name for name in shapes if name.endswith("/embedding_table")), words)
    # `.S` is a slash in the name of an attribute, and two dots are one.
    bias = next((name for name in shapes if name.endswith(("/output_bias.Sbias", "/output_bias"))), "")
    head = bias.rpartition("/")[0]
    own = next((name.removesuffix("/kernel") for name in shapes if name.endswith("..pooler_dense/kernel")), "")
    unused = (f"{pooler}/kernel", f"{pooler}/bias") if own and pooler else ()
    outputs = [name.removesuffix("/kernel") for name in shapes if _is_classifier(name, root)]
    name = "cls.seq_relationship" if bias and outputs and shapes[f"{outputs[0]}/kernel"][-1:] == (2,) else "classifier"
    return _Names(
        gelu="gelu_new",
        words=words,
        pooler=own or pooler,
        parts=_GARDEN_PARTS,
        masked=(f"{head}/dense", f"{head}/layer_norm", bias) if bias else None,
        heads={name: (f"{outputs[0]}/kernel", f"{outputs[0]}/bias")} if len(outputs) == 1 else {},
        unused=unused,
        **places,
    )


def _is_classifier(name: str, root: str) -> bool:
    """Whether it is the kernel of a head's last layer: of a `ClassificationHead`, or of a model in the model."""
    is_inner = name.endswith("layer_with_weights-1/layer_with_weights-0/kernel") and not name.startswith(f"{root}layer")
    return name.endswith("/out_proj/kernel") or is_inner


def _layout(named: _Names, shapes: Shapes, settings: Settings) -> Layout:
    num_layers = sum(1 for _ in takewhile(lambda i: f"{named.layer(i)}{_first(named)}" in shapes, count()))
    sizes = _sizes(named, shapes, settings, num_layers)
    weights = dict(_weights(named, sizes, shapes))
    check_shapes(weights, shapes, named.what)
    config = {
        "model_type": "bert",
        "architectures": [_architecture(named)],
        **sizes,
        "hidden_act": _activation(named, settings),
        "hidden_dropout_prob": settings.number("hidden_dropout_prob", 0.1),
        "attention_probs_dropout_prob": settings.number("attention_probs_dropout_prob", 0.1),
        "initializer_range": settings.number("initializer_range", 0.02),
        "layer_norm_eps": 1e-12,
    }
    for name, (kernel, _) in named.heads.items():
        if name == "classifier":
            config["num_labels"] = _outputs(named, shapes[kernel])
    notes: tuple[str, ...] = (
        () if settings.values else (f"without {BERT}, its activation is taken to be {config['hidden_act']}",)
    )
    if named.unused:
        notes += (f"its pooler is {named.pooler}, as in Model Garden's own fine-tuning",)
    return Layout(named.what, config, weights, notes, frozenset(named.unused))


def _first(named: _Names) -> str:
    return f"{named.parts['attention.self.query']}/kernel"


def _sizes(named: _Names, shapes: Shapes, settings: Settings, num_layers: int) -> dict[str, int]:
    """The counts of the configuration: from the shapes, and compared with what the settings say."""
    first = {
        named.words: 2, named.positions: 2, named.types: 2,
        f"{named.layer(0)}{_first(named)}": 3 if named.keeps_heads_apart else 2,
        f"{named.layer(0)}{named.parts['intermediate.dense']}/kernel": 2,
    }  # fmt: skip
    for name, dimensions in first.items():
        if len(shapes.get(name, ())) != dimensions:
            found = f"has the shape {list(shapes[name])}" if name in shapes else "is missing"
            raise FolderInvalid(
                f"this is {named.what}, but its tensor {shorten(name)!r} {found}; save the whole model again",
                tensor=name,
            )
    words, positions, types, query, inner = (shapes[name] for name in first)
    found_sizes = {
        "vocab_size": words[0],
        "hidden_size": words[1],
        "num_hidden_layers": num_layers,
        "intermediate_size": inner[1],
        "max_position_embeddings": positions[0],
        "type_vocab_size": types[0],
    }
    if named.keeps_heads_apart:
        found_sizes["num_attention_heads"] = query[1]
    settings.check_same(found_sizes)
    if not named.keeps_heads_apart:
        found_sizes["num_attention_heads"] = _heads_of(settings, words[1])
    return found_sizes


def _heads_of(settings: Settings, width: int) -> int:
    heads = settings.count("num_attention_heads")
    if heads is None:
        raise FolderInvalid(
            f"the number of attention heads is not in the tensors of the original BERT: put its {BERT}, which has "
            "num_attention_heads, beside the checkpoint"
            + (f" ({listed(settings.others, most=2)} beside it is not read: call it {BERT})" * bool(settings.others)),
            file=BERT,
        )
    if width % heads:
        raise settings.wrong(
            "num_attention_heads",
            f"does not divide hidden_size {width:,}; put the {settings.file} of this checkpoint beside it",
        )
    return heads


def _activation(named: _Names, settings: Settings) -> str:
    # Both call it `gelu`: the original computes it with erf, Model Garden with tanh.
    known = {**_ACTIVATIONS, "gelu": named.gelu}
    own = settings.word("hidden_act", "gelu", known)
    masked = settings.word("mlm_activation", "gelu", known) if "mlm_activation" in settings.values else own
    if named.masked is not None and masked != own:
        # transformers has one activation for both.
        raise settings.wrong("mlm_activation", "is not that of the encoder; save the encoder alone")
    return own


def _architecture(named: _Names) -> str:
    if named.masked is not None:
        return "BertForPreTraining"
    if "classifier" in named.heads:
        return "BertForSequenceClassification"
    return "BertForQuestionAnswering" if "qa_outputs" in named.heads else "BertModel"


def _weights(named: _Names, sizes: Mapping[str, int], shapes: Shapes) -> Iterator[tuple[str, Weight]]:
    width, inner = sizes["hidden_size"], sizes["intermediate_size"]
    for name, table, rows in (
        ("word", named.words, sizes["vocab_size"]),
        ("position", named.positions, sizes["max_position_embeddings"]),
        ("token_type", named.types, sizes["type_vocab_size"]),
    ):
        yield f"bert.embeddings.{name}_embeddings.weight", Weight(table, (rows, width))
    yield from _norm("bert.embeddings.LayerNorm", named.norm, width)
    for index in range(sizes["num_hidden_layers"]):
        for part, place in named.parts.items():
            target, source = f"bert.encoder.layer.{index}.{part}", f"{named.layer(index)}{place}"
            if part.endswith("LayerNorm"):
                yield from _norm(target, source, width)
            else:
                fan_in = inner if part == "output.dense" else width
                fan_out = inner if part == "intermediate.dense" else width
                heads = sizes["num_attention_heads"] if named.keeps_heads_apart and "attention" in part else 0
                yield from _dense(target, source, fan_in, fan_out, heads=heads)
    if named.pooler:
        yield from _dense("bert.pooler.dense", named.pooler, width, width)
    if named.masked is not None:
        dense, norm, bias = named.masked
        yield from _dense("cls.predictions.transform.dense", dense, width, width)
        yield from _norm("cls.predictions.transform.LayerNorm", norm, width)
        yield "cls.predictions.bias", Weight(bias, (sizes["vocab_size"],))
    for target, (kernel, bias) in named.heads.items():
        outputs = _outputs(named, shapes[kernel])
        shape, axes = ((width, outputs), (1, 0)) if named.keeps_heads_apart else ((outputs, width), ())
        yield f"{target}.weight", Weight(kernel, shape, axes)
        yield f"{target}.bias", Weight(bias, (outputs,))


def _outputs(named: _Names, shape: tuple[int, ...]) -> int:
    """The number of outputs of a head's last layer."""
    return (shape[-1] if named.keeps_heads_apart else shape[0]) if shape else 0


def _norm(target: str, source: str, width: int) -> Iterator[tuple[str, Weight]]:
    yield f"{target}.weight", Weight(f"{source}/gamma", (width,))
    yield f"{target}.bias", Weight(f"{source}/beta", (width,))


def _dense(target: str, source: str, fan_in: int, fan_out: int, *, heads: int = 0) -> Iterator[tuple[str, Weight]]:
    """A linear layer; with `heads` the kernel has an axis for them, of the inputs if it is the attention's output."""
    kernel: tuple[int, ...] = (fan_in, fan_out)
    bias: tuple[int, ...] = (fan_out,)
    if heads and target.endswith("output.dense"):
        kernel = (heads, fan_in // heads, fan_out)
    elif heads:
        kernel, bias = (fan_in, heads, fan_out // heads), (heads, fan_out // heads)
    yield f"{target}.weight", Weight(f"{source}/kernel", (fan_in, fan_out), (1, 0), stored=kernel)
    yield f"{target}.bias", Weight(f"{source}/bias", (fan_out,), stored=bias)
