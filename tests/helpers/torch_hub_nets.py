"""Modules of PyTorch Hub with the habits of their authors: small networks for pictures, each with one of them."""

from __future__ import annotations

NET = """
import torch
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    def __init__(self, num_classes=10, width=8):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, 2, 1)
        self.bn = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, num_classes)

    def features(self, x):
        return F.relu(self.bn(self.conv(x))).mean((2, 3))

    def forward(self, x):
        return self.fc(self.features(x))

"""
"""A classifier; what follows may derive from it."""

FIXED_POSITIONS = """
class Fixed(Net):
    def __init__(self, num_classes=10):
        super().__init__(num_classes)
        self.pos_embed = nn.Parameter(torch.linspace(-1, 1, 8), requires_grad=False)

    def features(self, x):
        return super().features(x) + self.pos_embed

"""

VIT = """
class V(nn.Module):
    def __init__(self, side, patch, classes, width=16):
        super().__init__()
        self.side = side
        self.patch = nn.Conv2d(3, width, patch, patch)
        self.places = nn.Parameter(torch.randn(1, (side // patch) ** 2, width))
        self.block = nn.TransformerEncoderLayer(width, 2, 32, batch_first=True, dropout=0.0)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes) if classes else nn.Identity()

    def forward(self, x):
        assert x.shape[-1] == self.side, f"pictures of {self.side}, not {x.shape[-1]}"
        x = self.patch(x).flatten(2).transpose(1, 2) + self.places
        return self.head(self.norm(self.block(x)).mean(1))

"""

NESTED_ENCODER = """
import torch
from torch import nn


class Encoder(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.words = nn.Embedding(25, width, padding_idx=0)
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2)

    def forward(self, ids, src_key_padding_mask=None):
        return self.layers(self.words(ids), src_key_padding_mask=src_key_padding_mask)


def nested():
    return Encoder()
"""
"""An encoder of texts with torch's own defaults: in evaluation its layers may be computed by one fused kernel."""

AWKWARD = f"""
{NET}
torch.set_grad_enabled(False)
torch.set_default_dtype(torch.float64)


class Awkward(Net):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.pos_embed = nn.Parameter(torch.linspace(-1, 1, 8), requires_grad=False)
        self.register_buffer("turns", torch.polar(torch.ones(8), torch.linspace(0, 1, 8)))
        self.also = nn.Sequential(self.fc)

    def train(self, mode=True):
        super().train(mode)
        self.bn.eval()

    def forward(self, x):
        found = self.features(x) * self.turns.real + self.pos_embed
        return self.also(found.to(self.fc.weight.dtype))


def make(pretrained=False, num_classes=10):
    net = Awkward(num_classes)
    if pretrained:
        net.load_state_dict(torch.hub.load_state_dict_from_url("https://weights.example/net.pth"))
    return net


globals()["awkward.v1"] = make
"""
"""Many of them together: settings of torch changed when it is imported, weights that are loaded from an address,
frozen and complex tensors, a head under two names whose weight is read, `train` that returns nothing, a dot in a name.
"""
