"""ResNets written here, with the parameter names of torchvision and timm."""

from collections.abc import Sequence

from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al., 2015, ResNet-18 and -34)."""

    expansion = 1

    def __init__(
        self, channels: int, width: int, stride: int, downsample: nn.Module, drop_path: nn.Module
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample
        self.drop_path = drop_path
        nn.init.zeros_(self.bn2.weight)  # each block starts as the identity (Goyal et al., 2017)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(self.drop_path(out) + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 beside a shortcut; the stride sits in the 3x3, which loses no pixels ("ResNet v1.5")."""

    expansion = 4

    def __init__(
        self, channels: int, width: int, stride: int, downsample: nn.Module, drop_path: nn.Module
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.drop_path = drop_path
        nn.init.zeros_(self.bn3.weight)  # each block starts as the identity (Goyal et al., 2017)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(self.drop_path(out) + self.downsample(x))


class ResNet(nn.Module):
    """ResNet for images of any height and width: float [B, 3, H, W] -> logits [B, num_classes].

    Parameters are named as in torchvision and timm, so weights travel between the three.

    Args:
        block: of which it is built.
        depths: blocks of each of the four sizes.
        num_classes: length of the logits.
        small_stem: begin with a 3x3 convolution at full size and no pooling, for images below 64 px (He et al., 2015, on CIFAR).
        drop_path: probability that training leaves out the last block, rising linearly from 0 at the first (Huang et al., 2016).
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        num_classes: int,
        small_stem: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        kernel, stride = (3, 1) if small_stem else (7, 2)
        self.conv1 = nn.Conv2d(3, 64, kernel, stride, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small_stem else nn.MaxPool2d(3, stride=2, padding=1)
        drops = iter(_drop_paths(drop_path, sum(depths)))
        channels = 64
        for stage, depth in enumerate(depths):
            width = 64 * 2**stage
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                downsample: nn.Module = nn.Identity()
                if stride != 1 or channels != width * block.expansion:
                    downsample = nn.Sequential(
                        nn.Conv2d(channels, width * block.expansion, 1, stride, bias=False),
                        nn.BatchNorm2d(width * block.expansion),
                    )
                blocks.append(block(channels, width, stride, downsample, next(drops)))
                channels = width * block.expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        # Pixels per cell of the last map, under timm's name for it.
        self.feature_info = [{"reduction": 8 if small_stem else 32}]
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))

    def get_classifier(self) -> nn.Module:
        """The classifier, under timm's name for it."""
        return self.fc

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Depth of each parameter in timm's terms: the stem, every block, the head."""
        return {"stem": r"^(?:conv1|bn1)", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}


def _drop_paths(rate: float, blocks: int) -> list[nn.Module]:
    """What drops each block's branch, from the first to the last."""
    if rate == 0:
        return [nn.Identity() for _ in range(blocks)]
    from timm.layers import DropPath

    return [DropPath(rate * index / (blocks - 1)) for index in range(blocks)]


RESNETS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], Sequence[int], bool]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2), False),
    "resnet34": (BasicBlock, (3, 4, 6, 3), False),
    "resnet50": (Bottleneck, (3, 4, 6, 3), False),
    "resnet101": (Bottleneck, (3, 4, 23, 3), False),
    "resnet18_cifar": (BasicBlock, (2, 2, 2, 2), True),
    "resnet50_cifar": (Bottleneck, (3, 4, 6, 3), True),
}
