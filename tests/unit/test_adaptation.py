"""LoRA and freezing on one architecture of each kind: what is trained, what is merged, and what peft reads of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import nn

from helpers.trainer_tasks import tiny_tagger
from shardyard.v1 import spec_pb2
from shardyard_trainer.data.errors import SpecError
from shardyard_trainer.tasks.adaptation import adapt, layers_of, merged, num_layers_frozen, save_adapter
from shardyard_trainer.tasks.base import compute_again
from shardyard_trainer.tasks.module import HuggingFaceModule

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 1}
BART = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 50,
}  # fmt: skip
PIXELS = {"image_size": 8, "patch_size": 4}
MODELS: dict[str, tuple[Any, Any, int, set[str]]] = {
    # The class, its configuration, layers of the backbone, and the parts that are trained whole beside adapters.
    "bert": (hf.BertForSequenceClassification, hf.BertConfig(**SMALL), 2, {"bert.pooler", "classifier"}),
    "roberta": (hf.RobertaForTokenClassification, hf.RobertaConfig(**SMALL), 2, {"classifier"}),
    "distilbert": (
        hf.DistilBertForSequenceClassification,
        hf.DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=32, vocab_size=50),
        2,
        {"pre_classifier", "classifier"},
    ),
    "albert": (
        hf.AlbertForSequenceClassification,
        hf.AlbertConfig(embedding_size=8, **SMALL),
        1,
        {"albert.pooler", "classifier"},
    ),
    "answers": (hf.BertForQuestionAnswering, hf.BertConfig(**SMALL), 2, {"qa_outputs"}),
    "gpt2": (hf.GPT2ForSequenceClassification, hf.GPT2Config(pad_token_id=0, **GPT2), 2, {"score"}),
    "gpt2 that goes on": (hf.GPT2LMHeadModel, hf.GPT2Config(**GPT2), 2, set()),
    "gpt2 alone": (hf.GPT2Model, hf.GPT2Config(**GPT2), 2, set()),
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**SMALL), 2, set()),
    "opt": (
        hf.OPTForSequenceClassification,
        hf.OPTConfig(
            ffn_dim=32,
            word_embed_proj_dim=8,
            pad_token_id=1,
            **{k: v for k, v in SMALL.items() if k != "intermediate_size"},
        ),
        2,
        {"score"},
    ),
    "t5": (
        hf.T5ForConditionalGeneration,
        hf.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=50, decoder_start_token_id=0),
        4,
        set(),
    ),
    "bart": (hf.BartForConditionalGeneration, hf.BartConfig(**BART), 4, set()),
    "vit": (hf.ViTForImageClassification, hf.ViTConfig(**{**SMALL, **PIXELS}), 2, {"classifier"}),
    "beit": (
        hf.BeitForImageClassification,
        hf.BeitConfig(**{**SMALL, **PIXELS}),
        2,
        {"beit.pooler", "classifier"},
    ),
    "resnet": (
        hf.ResNetForImageClassification,
        hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic"),
        2,
        {"classifier.1"},
    ),
}


class Wrapped(HuggingFaceModule):
    """A transformers model without a task."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        kind, config, _, _ = MODELS[name]
        self.model = kind(config)
        self.own_head = None


def lora(name: str, **settings: Any) -> spec_pb2.FineTuning:
    # A ResNet has no linear layer but its head.
    targets = {"targets": ["convolution"]} if name == "resnet" else {}
    return spec_pb2.FineTuning(lora=spec_pb2.Lora(**{"rank": 2, **targets, **settings}))


def shaken(module: HuggingFaceModule) -> None:
    """Changes all that is trained."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def outputs(name: str, model: nn.Module) -> torch.Tensor:
    torch.manual_seed(4)
    inputs = {"input_ids": torch.randint(3, 50, (2, 5))}
    if name in {"vit", "beit", "resnet"}:
        inputs = {"pixel_values": torch.randn(2, 3, 8, 8)}
    if name in {"t5", "bart"}:
        inputs["decoder_input_ids"] = torch.randint(3, 50, (2, 4))
    with torch.no_grad():
        found = model.eval()(**inputs)
    return next(found[key] for key in ("logits", "start_logits", "last_hidden_state") if key in found)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", MODELS)
def test_adapters_and_heads_are_trained_and_nothing_else(name: str) -> None:
    module, (_, _, _, heads) = Wrapped(name), MODELS[name]
    before = outputs(name, module.model)
    adapt(module, lora(name))
    assert torch.equal(outputs(name, module.model), before), "B is 0 at first"
    trained = {each for each, parameter in module.model.named_parameters() if parameter.requires_grad}
    adapters = {each for each in trained if ".lora_" in each}
    assert adapters and not any(part in each for each in adapters for part in ("lm_head", "embeddings", "embed_tokens"))
    assert {each for head in heads for each in trained if each.startswith(f"{head}.")} == trained - adapters
    for head in heads:
        assert any(each.startswith(f"{head}.") for each in trained)


@pytest.mark.parametrize("name", MODELS)
def test_merged_weights_compute_what_the_adapters_do_and_leave_those_as_they_are(name: str) -> None:
    module = Wrapped(name)
    adapt(module, lora(name, alpha=7.0))
    shaken(module)
    state = {key.removeprefix("model."): tensor for key, tensor in module.state_dict().items()}
    held = {key: tensor.clone() for key, tensor in state.items()}
    plain = type(module.model)(module.model.config)
    plain.load_state_dict(merged(module.model, state), strict=True)
    wanted = outputs(name, module.model)
    assert torch.allclose(outputs(name, plain), wanted, atol=1e-5)
    assert all(torch.equal(state[key], tensor) for key, tensor in held.items())


@pytest.mark.parametrize("name", MODELS)
def test_peft_reads_the_adapter_onto_the_model_that_training_began_with(name: str, tmp_path: Path) -> None:
    module, wanted = Wrapped(name), lora(name)
    adapt(module, wanted)
    shaken(module)
    save_adapter(tmp_path / "adapter", module, module.state_dict(), wanted.lora)
    read = peft.PeftModel.from_pretrained(Wrapped(name).model, str(tmp_path / "adapter"))
    assert torch.allclose(outputs(name, read), outputs(name, module.model), atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_the_first_layers_and_the_embeddings_are_frozen_and_stay_in_evaluation(name: str) -> None:
    module, (_, _, number, _) = Wrapped(name), MODELS[name]
    layers = layers_of(module.backbone)
    assert len(layers) == number
    if number > 1:
        adapt(module, spec_pb2.FineTuning(freeze=spec_pb2.Freeze(layers=1)))
        module.train()
        assert num_layers_frozen(module) == 1
        assert not any(parameter.requires_grad for parameter in layers[0].parameters())
        assert all(parameter.requires_grad for parameter in layers[1].parameters())
        assert not layers[0].training and layers[1].training
        tables = [each for each in module.backbone.modules() if isinstance(each, nn.Embedding)]
        outside = [each for each in tables if not any(each is part for layer in layers for part in layer.modules())]
        assert not any(each.weight.requires_grad for each in outside)
    too_many = spec_pb2.FineTuning(freeze=spec_pb2.Freeze(layers=number + 1))
    with pytest.raises(SpecError, match=f"{number + 1} layers are to be frozen, but the model has {number}") as caught:
        adapt(Wrapped(name), too_many)
    assert caught.value.field == "spec.fine_tuning.freeze.layers"


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (hf.XLMForSequenceClassification, hf.XLMConfig(n_layers=2, emb_dim=16, n_heads=2, vocab_size=50)),
        (hf.FlaubertForSequenceClassification, hf.FlaubertConfig(n_layers=2, emb_dim=16, n_heads=2, vocab_size=50)),
    ],
)
def test_layers_whose_parts_are_in_lists_of_their_own_are_not_counted(model: Any, config: Any) -> None:
    module = Wrapped("bert")
    module.model = model(config)
    with pytest.raises(SpecError, match="freeze the backbone") as caught:
        adapt(module, spec_pb2.FineTuning(freeze=spec_pb2.Freeze(layers=1)))
    assert caught.value.field == "spec.fine_tuning.freeze.layers"
    adapt(module, spec_pb2.FineTuning(lora=spec_pb2.Lora(targets=["lin1"])))
    assert num_layers_frozen(module) == 0, "the plan must not take the attentions for whole layers that are frozen"


def test_embeddings_alone_are_frozen() -> None:
    module = Wrapped("bert")
    adapt(module, spec_pb2.FineTuning(freeze=spec_pb2.Freeze(embeddings=True)))
    frozen = {name.split(".")[1] for name, each in module.model.named_parameters() if not each.requires_grad}
    assert frozen == {"embeddings"} and num_layers_frozen(module) == 0


def test_a_frozen_backbone_leaves_the_head_and_takes_no_adapter() -> None:
    module = Wrapped("roberta")
    adapt(module, spec_pb2.FineTuning(freeze=spec_pb2.Freeze(backbone=True)))
    trained = {name.split(".")[0] for name, each in module.model.named_parameters() if each.requires_grad}
    assert trained == {"classifier"} and num_layers_frozen(module) == 2
    both = spec_pb2.FineTuning(freeze=spec_pb2.Freeze(backbone=True), lora=spec_pb2.Lora())
    with pytest.raises(SpecError, match="all layers that would get adapters are frozen; freeze fewer layers"):
        adapt(Wrapped("roberta"), both)
    first = lora("bert", targets=["layer.0.attention.self.query"])
    first.freeze.layers = 1
    with pytest.raises(SpecError, match="all layers that would get adapters are frozen; freeze fewer layers"):
        adapt(Wrapped("bert"), first)
    with pytest.raises(SpecError, match="nothing is left to train") as caught:
        adapt(Wrapped("gpt2 that goes on"), spec_pb2.FineTuning(freeze=spec_pb2.Freeze(backbone=True)))
    assert caught.value.field == "spec.fine_tuning.freeze"


def test_adapters_are_put_beside_the_layers_named_but_not_into_frozen_ones() -> None:
    module = Wrapped("bert")
    wanted = lora("bert", targets=["query", "attention.output.dense"])
    wanted.freeze.layers = 1
    adapt(module, wanted)
    beside = {name.partition(".lora_A")[0] for name in module.model.state_dict() if ".lora_A." in name}
    assert beside == {f"bert.encoder.layer.1.attention.{end}" for end in ("self.query", "output.dense")}


@pytest.mark.parametrize(
    ("name", "targets", "said"),
    [
        ("bert", ["query", "valu"], "no layer of this bert is called 'valu'; did you mean value?; adapters go beside"),
        ("gpt2", ["q_proj"], "adapters go beside c_attn, c_fc, c_proj"),
        ("llama", ["lm_head"], "adapters go beside down_proj, gate_proj, k_proj"),
        ("bert", ["word_embeddings"], "adapters go beside dense, key, query, value"),
        ("bert", ["classifier"], "adapters go beside dense, key, query, value"),
        ("resnet", [], "has no linear layer to put adapters beside; name some of convolution"),
    ],
)
def test_a_target_that_there_is_not_is_refused_with_those_that_there_are(
    name: str, targets: list[str], said: str
) -> None:
    with pytest.raises(SpecError) as caught:
        adapt(Wrapped(name), spec_pb2.FineTuning(lora=spec_pb2.Lora(targets=targets)))
    assert said in str(caught.value)
    assert caught.value.field.startswith("spec.fine_tuning.lora.targets")


def test_batch_normalisation_beside_adapters_keeps_its_statistics() -> None:
    module = Wrapped("resnet")
    adapt(module, lora("resnet"))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items() if "running" in name}
    module.train()
    module.model(pixel_values=torch.randn(4, 3, 8, 8))
    assert before and all(torch.equal(module.state_dict()[name], tensor) for name, tensor in before.items())


def test_in_halves_the_sum_is_made_in_fp32_and_rounded_once() -> None:
    module = Wrapped("bert")
    adapt(module, lora("bert"))
    shaken(module)
    state = {key.removeprefix("model."): tensor.bfloat16() for key, tensor in module.state_dict().items()}
    name = "bert.encoder.layer.0.attention.self.query"
    a, b, weight = (state[f"{name}.{end}.weight"] for end in ("lora_A.default", "lora_B.default", "base_layer"))
    found = merged(module.model, state)[f"{name}.weight"]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, (weight.float() + 8 * b.float() @ a.float()).bfloat16())


def test_layers_compute_themselves_again_in_the_backward_pass() -> None:
    module = tiny_tagger(0.1)
    compute_again(module)
    calls: list[bool] = []
    module.model.bert.encoder.layer[0].attention.register_forward_hook(lambda *_: calls.append(True))
    ids = torch.arange(1, 13).reshape(2, 6)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids % 3}
    module.train()
    module(**inputs).loss_sum.backward()
    assert len(calls) == 2
    with torch.no_grad():
        module.eval()(**inputs)
    assert len(calls) == 3
