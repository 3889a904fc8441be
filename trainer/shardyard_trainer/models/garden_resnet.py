"""ResNet as TensorFlow's Model Garden computes it, in the form of a transformers model. Needs torch and transformers.

It differs from transformers' own: every stage begins with a projection, convolutions and the pool with stride 2 are
padded as TensorFlow does it ('same': nothing before and one after on even sizes), and normalisation has an epsilon of
0.001. Each exported model has a copy of this file; `register()` makes it known to transformers' auto classes.

Shape suffixes: B pictures, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)

MODEL_TYPE = "garden_resnet"


class GardenResNetConfig(PreTrainedConfig):  # type: ignore[misc]
    """Channels after the stem and each stage, blocks in each stage, and their kind: basic or bottleneck."""

    model_type = MODEL_TYPE
    num_channels: int = 3
    embedding_size: int = 64
    hidden_sizes: list[int] | tuple[int, ...] = (256, 512, 1024, 2048)
    depths: list[int] | tuple[int, ...] = (3, 4, 6, 3)
    layer_type: str = "bottleneck"
    image_size: int = 224
    norm_epsilon: float = 1e-3
    norm_momentum: float = 0.99


class SameConv(nn.Conv2d):
    """A convolution without bias, padded so that a stride of s leaves size / s, rounded up."""

    def __init__(self, wide: int, to: int, kernel: int, stride: int = 1) -> None:
        super().__init__(wide, to, kernel, stride=stride, bias=False)

    def forward(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """[B, C', H / s, W / s]."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        return super().forward(F.pad(pixels_BCHW, same(pixels_BCHW, kernel, stride)))


def same(pixels_BCHW: torch.Tensor, kernel: int, stride: int) -> list[int]:
    """TensorFlow's padding: what is missing after the last step, the smaller half of it before."""
    found = []
    for size in (pixels_BCHW.shape[-1], pixels_BCHW.shape[-2]):
        missing = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        found += [missing // 2, missing - missing // 2]
    return found


class Block(nn.Module):
    """Convolutions beside a shortcut: two of 3 × 3, or 1 × 1, 3 × 3 and 1 × 1 with a quarter of the channels inside."""

    def __init__(self, config: Any, wide: int, to: int, *, stride: int, projects: bool) -> None:
        super().__init__()
        inner = to if config.layer_type == "basic" else to // 4
        shapes = [(wide, inner, 3, stride), (inner, to, 3, 1)]
        if config.layer_type != "basic":
            shapes = [(wide, inner, 1, 1), (inner, inner, 3, stride), (inner, to, 1, 1)]
        self.convolutions = nn.ModuleList(SameConv(*shape) for shape in shapes)
        self.norms = nn.ModuleList(norm(config, shape[1]) for shape in shapes)
        self.shortcut = SameConv(wide, to, 1, stride) if projects else None
        self.shortcut_norm = norm(config, to) if projects else None

    def forward(self, hidden_BCHW: torch.Tensor) -> torch.Tensor:
        """[B, C', H / s, W / s]."""
        beside = hidden_BCHW
        if self.shortcut is not None and self.shortcut_norm is not None:
            beside = self.shortcut_norm(self.shortcut(hidden_BCHW))
        for index, (convolution, normalise) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            hidden_BCHW = normalise(convolution(hidden_BCHW))
            if index + 1 < len(self.norms):
                hidden_BCHW = hidden_BCHW.relu()
        return (hidden_BCHW + beside).relu()


def norm(config: Any, channels: int) -> nn.BatchNorm2d:
    """Normalisation over a batch; TensorFlow's momentum is the share that stays."""
    return nn.BatchNorm2d(channels, eps=config.norm_epsilon, momentum=1 - config.norm_momentum)


class GardenResNetPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What both models have in common."""

    config_class: Any = GardenResNetConfig
    base_model_prefix = "resnet"
    main_input_name = "pixel_values"
    _keys_to_ignore_on_load_missing: ClassVar[list[str]] = [r"num_batches_tracked"]
    _supports_sdpa = True  # It has no attention.


class GardenResNetModel(GardenResNetPreTrainedModel):
    """The backbone."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.stem = SameConv(config.num_channels, config.embedding_size, 7, 2)
        self.stem_norm = norm(config, config.embedding_size)
        wide = config.embedding_size
        stages = []
        for stage, (to, depth) in enumerate(zip(config.hidden_sizes, config.depths, strict=True)):
            blocks = [Block(config, wide, to, stride=1 if stage == 0 else 2, projects=True)]
            blocks += [Block(config, to, to, stride=1, projects=False) for _ in range(depth - 1)]
            stages.append(nn.Sequential(*blocks))
            wide = to
        self.stages = nn.ModuleList(stages)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **_options: Any) -> BaseModelOutputWithPoolingAndNoAttention:
        """The last hidden state [B, C, H, W], and its mean over the places [B, C, 1, 1]."""
        hidden_BCHW = self.stem_norm(self.stem(pixel_values)).relu()
        # What is padded never wins.
        padded = F.pad(hidden_BCHW, same(hidden_BCHW, 3, 2), value=float("-inf"))
        hidden_BCHW = F.max_pool2d(padded, 3, 2)
        for stage in self.stages:
            hidden_BCHW = stage(hidden_BCHW)
        pooled = hidden_BCHW.mean((2, 3), keepdim=True)
        return BaseModelOutputWithPoolingAndNoAttention(last_hidden_state=hidden_BCHW, pooler_output=pooled)


class GardenResNetForImageClassification(GardenResNetPreTrainedModel):
    """The backbone with a linear layer."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.resnet = GardenResNetModel(config)
        self.classifier = nn.Linear(config.hidden_sizes[-1], config.num_labels)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **_options: Any) -> ImageClassifierOutputWithNoAttention:
        """Logits [B, K]."""
        pooled = self.resnet(pixel_values).pooler_output
        return ImageClassifierOutputWithNoAttention(logits=self.classifier(pooled.flatten(1)))


def register() -> None:
    """Makes the model known to transformers' auto classes."""
    AutoConfig.register(MODEL_TYPE, GardenResNetConfig, exist_ok=True)
    AutoModel.register(GardenResNetConfig, GardenResNetModel, exist_ok=True)
    AutoModelForImageClassification.register(GardenResNetConfig, GardenResNetForImageClassification, exist_ok=True)
