"""A stand-in of timm's interface, as far as the wrappers of transformers and this package use it: two architectures of
the names of timm's own tiny ones. Loaded as a plugin of pytest before transformers is imported.

timm itself needs torchvision, which does not import beside the CPU build of torch that the other tests run on.
"""

import sys
from types import ModuleType
from typing import Any

import torch
import transformers.utils
from torch import Tensor, nn
from transformers.utils import import_utils


class _Model(nn.Module):
    """What all models of timm offer."""

    num_features: int
    head_name: str

    def get_classifier(self) -> nn.Module:
        return getattr(self, self.head_name)

    def _head(self, num_classes: int) -> nn.Module:
        return nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def pool(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = self.pool(x)
        return pooled if pre_logits else self.get_classifier()(pooled)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class _ResNet(_Model):
    num_features, head_name = 6, "fc"

    def __init__(self, num_classes: int, in_chans: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, 6, 3, stride=2, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.fc = self._head(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv1(x)).relu()

    def pool(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class _ViT(_Model):
    num_features, head_name = 8, "head"

    def __init__(self, num_classes: int, in_chans: int = 3, img_size: int = 160) -> None:
        super().__init__()
        self.img_size = img_size
        self.patch_embed = nn.Conv2d(in_chans, 8, 16, stride=16)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (img_size // 16) ** 2, 8))
        self.norm = nn.LayerNorm(8)
        self.head = self._head(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        assert x.shape[-1] == self.img_size, f"Input height ({x.shape[-1]}) doesn't match model ({self.img_size})."
        patches = self.patch_embed(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), patches], dim=1) + self.pos_embed
        return self.norm(tokens + tokens.mean(1, keepdim=True).tanh())

    def pool(self, x: Tensor) -> Tensor:
        return x[:, 0]


_MODELS: dict[str, Any] = {"test_resnet": _ResNet, "test_vit": _ViT}


def create_model(architecture: str, pretrained: bool = False, num_classes: int = 1000, **settings: Any) -> nn.Module:
    if architecture not in _MODELS:
        raise RuntimeError(f"Unknown model ({architecture})")
    return _MODELS[architecture](num_classes, **settings)


def _install() -> None:
    timm, data = ModuleType("timm"), ModuleType("timm.data")
    timm.create_model, timm.data, timm.__version__ = create_model, data, "0"  # type: ignore[attr-defined]
    data.ImageNetInfo, data.infer_imagenet_subset = None, lambda config: None  # type: ignore[attr-defined]
    sys.modules["timm"], sys.modules["timm.data"] = timm, data
    import_utils.is_timm_available = lambda: True
    transformers.utils.is_timm_available = import_utils.is_timm_available
    _, message = import_utils.BACKENDS_MAPPING["timm"]
    import_utils.BACKENDS_MAPPING["timm"] = (import_utils.is_timm_available, message)


_install()
