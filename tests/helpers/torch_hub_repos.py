"""Repositories of PyTorch Hub: folders with a `hubconf.py`, as their authors write them.

The ResNet has the names of torchvision's parameters, the encoder is plain torch too; the BERT and the encoder-decoder
are classes of transformers.
"""

from __future__ import annotations

from pathlib import Path

from helpers.tiny_folders import bert_tokenizer

RESNET = """
import torch
from torch import nn


class BasicBlock(nn.Module):
    def __init__(self, before, after, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.downsample = None
        if stride != 1 or before != after:
            self.downsample = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + shortcut)


class ResNet(nn.Module):
    def __init__(self, width, num_classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        before = width
        for number in range(4):
            after = width * 2**number
            blocks = [BasicBlock(before, after, 1 if number == 0 else 2), BasicBlock(after, after, 1)]
            setattr(self, f"layer{number + 1}", nn.Sequential(*blocks))
            before = after
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(before, num_classes)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))
"""

RESNET_HUBCONF = '''
dependencies = ["torch"]

from resnet import ResNet


def resnet18(width=64, num_classes=1000):
    """A ResNet-18 with drawn weights."""
    return ResNet(width, num_classes)
'''


ENCODER_HUBCONF = '''
dependencies = ["torch"]

import math

import torch
from torch import nn


class Encoder(nn.Module):
    def __init__(self, vocab_size, width, longest):
        super().__init__()
        self.words = nn.Embedding(vocab_size, width)
        places, rates = torch.arange(longest)[:, None], torch.arange(0, width, 2) * (-math.log(1e4) / width)
        table = torch.zeros(longest, width)
        table[:, 0::2], table[:, 1::2] = torch.sin(places * rates.exp()), torch.cos(places * rates.exp())
        self.register_buffer("places", table, persistent=False)
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, ids, src_key_padding_mask=None):
        assert ids.shape[1] <= len(self.places), f"at most {len(self.places)} tokens"
        hidden = self.words(ids) + self.places[: ids.shape[1]]
        return self.layers(hidden, src_key_padding_mask=src_key_padding_mask), None


def encoder(vocab_size=25, width=16, longest=24):
    """A transformer's encoder with fixed positions."""
    return Encoder(vocab_size, width, longest)
'''

BERT_HUBCONF = '''
dependencies = ["torch", "transformers"]

from transformers import BertConfig, BertForMaskedLM


def bert(hidden_size=16):
    """A BERT with drawn weights."""
    config = BertConfig(
        vocab_size=25, hidden_size=hidden_size, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, initializer_range=0.5,
    )
    return BertForMaskedLM(config)
'''

TRANSFORMER_HUBCONF = '''
dependencies = ["torch", "transformers"]

from transformers import BartConfig, BartForConditionalGeneration


def transformer(d_model=16):
    """An encoder with a decoder."""
    config = BartConfig(
        vocab_size=25, d_model=d_model, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=32,
        pad_token_id=0, bos_token_id=2, eos_token_id=3, decoder_start_token_id=3, forced_eos_token_id=3,
    )
    return BartForConditionalGeneration(config)
'''


def write_repository(folder: Path, **files: str) -> Path:
    """Writes Python files by their names without the ending."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    return folder


def resnet(folder: Path) -> Path:
    """A ResNet-18 with the names of torchvision's."""
    return write_repository(folder, hubconf=RESNET_HUBCONF, resnet=RESNET)


def encoder(folder: Path) -> Path:
    """A plain encoder of texts, whose positions are not in its weights, with a tokenizer."""
    bert_tokenizer().save_pretrained(write_repository(folder, hubconf=ENCODER_HUBCONF))
    return folder


def bert(folder: Path) -> Path:
    """A BERT of transformers with a tokenizer."""
    bert_tokenizer().save_pretrained(write_repository(folder, hubconf=BERT_HUBCONF))
    return folder


def transformer(folder: Path) -> Path:
    """An encoder-decoder of transformers with a tokenizer."""
    bert_tokenizer().save_pretrained(write_repository(folder, hubconf=TRANSFORMER_HUBCONF))
    return folder
