"""Weights under timm's names against a ResNet written here in plain torch, feature by feature."""

import pytest
import torch
from torch import Tensor, nn
from transformers import ResNetModel

from bissl_hf.models.timm_resnet import (
    infer_resnet_config,
    projection_dims,
    split_timm_weights,
    to_timm_name,
    to_timm_weights,
    to_transformers_name,
)


class Block(nn.Module):
    """A basic block, or a bottleneck with the stride in its second convolution."""

    def __init__(self, before: int, width: int, stride: int, *, bottleneck: bool) -> None:
        super().__init__()
        after = 4 * width if bottleneck else width
        sizes = [(before, width, 1, 1), (width, width, 3, stride), (width, after, 1, 1)]
        if not bottleneck:
            sizes = [(before, width, 3, stride), (width, width, 3, 1)]
        for number, (first, second, kernel, step) in enumerate(sizes, 1):
            setattr(self, f"conv{number}", nn.Conv2d(first, second, kernel, step, kernel // 2, bias=False))
            setattr(self, f"bn{number}", nn.BatchNorm2d(second))
        self.count = len(sizes)
        self.downsample = None
        if stride != 1 or before != after:
            self.downsample = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, images: Tensor) -> Tensor:
        out = images
        for number in range(1, self.count + 1):
            out = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(out))
            if number < self.count:
                out = out.relu()
        return (out + (images if self.downsample is None else self.downsample(images))).relu()


class TimmStyleResNet(nn.Module):
    """The layers of a ResNet under timm's names; returns its map and the pooled features."""

    def __init__(self, widths: list[int], depths: list[int], *, bottleneck: bool, num_classes: int = 0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        before = widths[0]
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True), 1):
            blocks = []
            for block in range(depth):
                blocks.append(Block(before, width, 2 if stage > 1 and block == 0 else 1, bottleneck=bottleneck))
                before = 4 * width if bottleneck else width
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.stages = len(widths)
        if num_classes:
            self.fc = nn.Linear(before, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        out = self.maxpool(self.bn1(self.conv1(images)).relu())
        for stage in range(1, self.stages + 1):
            out = getattr(self, f"layer{stage}")(out)
        return out, out.mean(dim=(2, 3))


def plain_resnet(*, bottleneck: bool, num_classes: int = 0) -> TimmStyleResNet:
    """The depths of ResNet-50 or ResNet-18 at a fraction of their widths, with statistics that tell on a mistake."""
    torch.manual_seed(0)
    depths = [3, 4, 6, 3] if bottleneck else [2, 2, 2, 2]
    model = TimmStyleResNet([4, 8, 12, 16], depths, bottleneck=bottleneck, num_classes=num_classes)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.double().eval()


def projection_head(feature_size: int, *, bias: bool = False) -> nn.Sequential:
    first = [nn.Linear(feature_size, 7), nn.BatchNorm1d(7), nn.ReLU()]
    return nn.Sequential(*first, nn.Linear(7, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5, bias=bias))


@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize("prefix", ["", "module.", "module.backbone.", "model.encoder."])
def test_features_are_those_of_the_plain_network(bottleneck: bool, prefix: str) -> None:
    plain = plain_resnet(bottleneck=bottleneck)
    weights = {prefix + name: tensor for name, tensor in plain.state_dict().items()}
    backbone, head, classifier = split_timm_weights(weights, None)
    assert (head, classifier) == ({}, {})
    model = ResNetModel(infer_resnet_config(backbone)).double().eval()
    model.load_state_dict(backbone)  # strict: every weight has its place, and every place its weight
    images = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    with torch.no_grad():
        found, (feature_map, pooled) = model(images), plain(images)
    torch.testing.assert_close(found.last_hidden_state, feature_map, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.pooler_output.flatten(1), pooled, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bottleneck", [False, True])
def test_names_go_there_and_back(bottleneck: bool) -> None:
    for name in plain_resnet(bottleneck=bottleneck).state_dict():
        translated = to_transformers_name(name)
        assert translated is not None
        assert to_timm_name(translated) == name
    for name in ("fc.weight", "conv1.kernel", "layer5.0.conv1.weight", "xconv1.weight"):
        assert to_transformers_name(name) is None
    assert to_timm_name("pooler.weight") is None


def test_weights_go_back_under_prefixes() -> None:
    plain = plain_resnet(bottleneck=False).state_dict()
    head = projection_head(16).state_dict()
    released = {f"backbone.{n}": t for n, t in plain.items()} | {f"projector.{n}": t for n, t in head.items()}
    backbone, found, _ = split_timm_weights(released, None)
    again = to_timm_weights(backbone, found, backbone_prefix="backbone.", head_prefix="projector.")
    assert set(again) == set(released)
    assert all(torch.equal(tensor, released[name]) for name, tensor in again.items())


@pytest.mark.parametrize("names", [["0", "1", "3", "4", "6"], ["0", "1", "2", "3", "4"], ["1", "2", "5", "6", "9"]])
def test_layers_of_a_head_are_numbered_anew(names: list[str]) -> None:
    head = projection_head(16).state_dict()
    renamed = dict(zip(["0", "1", "3", "4", "6"], names, strict=True))
    weights = {f"head.layers.{renamed[n.split('.')[0]]}.{n.split('.')[1]}": t for n, t in head.items()}
    for prefix in (None, "head.layers."):
        _, found, _ = split_timm_weights(plain_resnet(bottleneck=False).state_dict() | weights, prefix)
        assert set(found) == set(head)
        assert all(torch.equal(tensor, head[name]) for name, tensor in found.items())
    assert projection_dims(found) == [7, 6, 5]


def test_a_classifier_is_told_from_a_head() -> None:
    _, head, classifier = split_timm_weights(plain_resnet(bottleneck=False, num_classes=3).state_dict(), None)
    assert head == {}
    assert classifier["weight"].shape == (3, 16)


@pytest.mark.parametrize(
    ("change", "prefix", "message"),
    [
        (
            {"conv1.weight": None},
            None,
            "There is no ResNet of timm among the weights, whose names begin with bn1.bias",
        ),
        ({"fancy.weight": torch.ones(1)}, None, "1 names are not understood: fancy.weight. Name the projection head"),
        ({"a.0.weight": torch.ones(1, 1), "b.0.weight": torch.ones(1, 1)}, None, "2 names are not understood: a.0"),
        ({"module.bn1.bias": torch.ones(4)}, None, "Two names stand for the backbone's 'bn1.bias', one of them"),
        ({}, "projector.", "head_prefix is 'projector.'; no name of the weights begins so"),
    ],
)
def test_names_that_are_not_understood(change: dict, prefix: str | None, message: str) -> None:
    weights = plain_resnet(bottleneck=False).state_dict() | change
    with pytest.raises(ValueError, match=message):
        split_timm_weights({name: tensor for name, tensor in weights.items() if tensor is not None}, prefix)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (projection_head(16, bias=True), "The last linear layer of the projection head has a bias"),
        (nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, bias=False)), "must be linear layers with batch norm between"),
        (nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3, bias=False)), "must be linear layers with batch norm"),
    ],
)
def test_heads_of_another_kind(head: nn.Sequential, message: str) -> None:
    weights = {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    _, found, _ = split_timm_weights(plain_resnet(bottleneck=False).state_dict() | weights, None)
    with pytest.raises(ValueError, match=message):
        projection_dims(found)


def test_other_backbones_have_no_names_in_timm() -> None:
    with pytest.raises(
        ValueError, match=r"The backbone is no ResNet: timm has no names for encoder\.layer\.0\.weight"
    ):
        to_timm_weights({"encoder.layer.0.weight": torch.ones(1)}, {}, backbone_prefix="", head_prefix="")
