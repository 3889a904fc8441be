"""Makes the TensorFlow checkpoints of the tests with the real Model Garden, and what TensorFlow computes with them.

Not run by the tests: it needs an environment of its own (some 2 GB), which is made once:

    python3.11 -m venv garden && garden/bin/pip install tensorflow-cpu==2.21.0 tf-keras==2.21.0 gin-config \
        pyyaml tensorflow-hub sentencepiece immutabledict tensorflow-datasets==4.9.7 pandas pillow \
        opencv-python-headless pycocotools matplotlib tf-slim
    garden/bin/pip install --no-deps tf-models-official==2.20.0
    garden/bin/python tests/checkpoints/make.py tests/checkpoints

Each folder gets a checkpoint of random weights and `expected.npz`: inputs, and the outputs of the model in inference.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.update(TF_USE_LEGACY_KERAS="1", TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="-1")

import numpy as np
import tensorflow as tf
import tf_keras
import yaml
from official.nlp.modeling import layers, models, networks
from official.nlp.modeling.models import seq2seq_transformer
from official.vision.modeling import classification_model
from official.vision.modeling.backbones import resnet

WORDS = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "all", "work", "and", "no", "play", "makes", "jack", "a", "dull"),
    *("boy", "the", "film", "was", "good", "bad"),
]
PICTURES = tf_keras.layers.InputSpec(shape=[None, None, None, 3])
SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "num_layers": 2,
    "num_attention_heads": 4,
    "max_sequence_length": 32,
    "type_vocab_size": 2,
}


def main(target: Path, names: Sequence[str]) -> None:
    """Writes the folders of these names under `target`; without names, every one."""
    for number, make in enumerate(MAKERS):
        if names and make.__name__ not in names:
            continue
        tf_keras.utils.set_random_seed(17 + number)
        folder = target / make.__name__
        folder.mkdir(parents=True, exist_ok=True)
        make(folder)
        (folder / "checkpoint").unlink(missing_ok=True)  # It has this machine's path.
        print(folder.name, sum(path.stat().st_size for path in folder.iterdir()), "bytes")


def bert_v1(folder: Path) -> None:
    """The encoder alone, saved as its example does; no settings beside it: all is in the shapes."""
    encoder = shaken(networks.BertEncoder(**SIZES, intermediate_size=64))
    inputs = bert_inputs()
    outputs = encoder([inputs["input_word_ids"], inputs["input_mask"], inputs["input_type_ids"]])
    tf.train.Checkpoint(encoder=encoder).save(str(folder / "ckpt"))
    expect(folder, inputs, sequence=outputs[0], pooled=outputs[1])


def bert_v2(folder: Path) -> None:
    """The encoder of version 2 with bert_config.json beside it, as the published checkpoints have one."""
    encoder = v2()
    inputs = bert_inputs()
    outputs = encoder(inputs)
    shaken(encoder)
    outputs = encoder(inputs)
    tf.train.Checkpoint(model=encoder).write(str(folder / "bert_model.ckpt"))
    (folder / "bert_config.json").write_text(json.dumps(bert_config(), indent=2))
    vocabulary(folder)
    expect(folder, inputs, sequence=outputs["sequence_output"], pooled=outputs["pooled_output"])


def bert_v2_pretrained(folder: Path) -> None:
    """After a step of pretraining: heads for masked words and next sentences, and an optimizer's slots."""
    head = layers.ClassificationHead(inner_dim=32, num_classes=2, dropout_rate=0.1, name="next_sentence")
    activation = lambda x: tf_keras.activations.gelu(x, approximate=True)  # noqa: E731 - as Model Garden writes it
    model = models.BertPretrainerV2(v2(), mlm_activation=activation, classification_heads=[head])
    inputs = bert_inputs()
    given = {**inputs, "masked_lm_positions": tf.constant([[1, 2], [1, 3]])}
    model(given)
    shaken(model)
    optimizer = tf_keras.optimizers.Adam(1e-3)
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(model(given, training=True)["mlm_logits"] ** 2)
    pairs = zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables, strict=True)
    optimizer.apply_gradients([pair for pair in pairs if pair[0] is not None])
    outputs = model(given)
    tf.train.Checkpoint(model=model, optimizer=optimizer, **model.checkpoint_items).save(str(folder / "ckpt"))
    vocabulary(folder)
    expect(
        folder, given, sequence=outputs["sequence_output"], masked=outputs["mlm_logits"], next=outputs["next_sentence"]
    )


def bert_v1_classifier(folder: Path) -> None:
    """A classifier of three classes that was fine-tuned on the encoder of version 1."""
    model = shaken(models.BertClassifier(networks.BertEncoder(**SIZES, intermediate_size=64), num_classes=3))
    inputs = bert_inputs()
    outputs = model([inputs["input_word_ids"], inputs["input_mask"], inputs["input_type_ids"]])
    tf.train.Checkpoint(model=model).write(str(folder / "classifier.ckpt"))
    vocabulary(folder)
    expect(folder, inputs, logits=outputs)


def resnet_10(folder: Path) -> None:
    """A classifier of basic blocks, without settings: its epsilon is Model Garden's default."""
    backbone = resnet.ResNet(10, PICTURES, depth_multiplier=0.125)
    model = shaken(classification_model.ClassificationModel(backbone, num_classes=3, input_specs=PICTURES))
    pictures = np.random.default_rng(3).normal(size=(2, 40, 33, 3)).astype(np.float32)
    tf.train.Checkpoint(model=model, **model.checkpoint_items).save(str(folder / "ckpt"))
    expect(folder, {"pictures": pictures}, logits=model(pictures, training=False))


def resnet_50(folder: Path) -> None:
    """A backbone of bottlenecks, trained as on ImageNet: with another epsilon, which params.yaml says."""
    backbone = shaken(resnet.ResNet(50, PICTURES, depth_multiplier=0.0625, norm_epsilon=1e-5, norm_momentum=0.9))
    pictures = np.random.default_rng(4).normal(size=(1, 64, 64, 3)).astype(np.float32)
    tf.train.Checkpoint(model=backbone).write(str(folder / "resnet.ckpt"))
    settings = {
        "backbone": {"type": "resnet", "resnet": {"model_id": 50, "se_ratio": 0.0, "stem_type": "v0"}},
        "input_size": [64, 64, 3],
        "norm_activation": {"activation": "relu", "norm_epsilon": 1e-5, "norm_momentum": 0.9, "use_sync_bn": True},
        "num_classes": 1001,
    }
    (folder / "params.yaml").write_text(yaml.safe_dump({"task": {"model": settings}}))
    expect(folder, {"pictures": pictures}, hidden=backbone(pictures, training=False)["5"])


def transformer(folder: Path) -> None:
    """An encoder-decoder for translation."""
    sizes = {"num_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = seq2seq_transformer.Seq2SeqTransformer(
        vocab_size=40,
        embedding_width=32,
        encoder_layer=seq2seq_transformer.TransformerEncoder(**sizes),
        decoder_layer=seq2seq_transformer.TransformerDecoder(**sizes),
    )
    given = {
        "inputs": tf.constant([[5, 6, 7, 8, 9, 1], [8, 9, 1, 0, 0, 0]]),
        "targets": tf.constant([[10, 11, 12, 1], [12, 1, 0, 0]]),
    }
    model(given)
    shaken(model)
    tf.train.Checkpoint(model=model).save(str(folder / "ckpt"))
    expect(folder, given, logits=model(given))


def v2() -> networks.BertEncoderV2:
    """An encoder of version 2."""
    return networks.BertEncoderV2(**SIZES, inner_dim=64)


def bert_config() -> dict[str, object]:
    """What a published BERT has beside it."""
    return {
        "attention_probs_dropout_prob": 0.1,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 64,
        "max_position_embeddings": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "type_vocab_size": 2,
        "vocab_size": len(WORDS),
    }


def bert_inputs() -> dict[str, tf.Tensor]:
    """Two texts, the second one padded."""
    return {
        "input_word_ids": tf.constant([[2, 5, 6, 7, 8, 9, 3], [2, 15, 16, 17, 3, 0, 0]]),
        "input_mask": tf.constant([[1] * 7, [1, 1, 1, 1, 1, 0, 0]]),
        "input_type_ids": tf.constant([[0, 0, 0, 1, 1, 1, 1], [0] * 7]),
    }


def shaken(model: tf_keras.Model) -> tf_keras.Model:
    """The model with noise on all weights: fresh biases are 0 and scales 1, which would hide a mistake in mapping."""
    noise = np.random.default_rng(5)
    for variable in model.variables:
        values = noise.normal(0, 0.2, variable.shape).astype(np.float32)
        is_variance = "moving_variance" in variable.name
        variable.assign_add(abs(values) if is_variance else values)
    return model


def vocabulary(folder: Path) -> None:
    """One token a line, as BERT has it."""
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")


def expect(folder: Path, inputs: dict[str, tf.Tensor], **outputs: tf.Tensor) -> None:
    """Stores what goes in and what comes out."""
    np.savez_compressed(
        folder / "expected.npz", **{name: np.array(value) for name, value in {**inputs, **outputs}.items()}
    )


MAKERS = (bert_v1, bert_v2, bert_v2_pretrained, bert_v1_classifier, resnet_10, resnet_50, transformer)

if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
