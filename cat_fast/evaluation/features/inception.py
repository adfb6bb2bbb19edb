"""Inception-v3 of FID: the TensorFlow graph of 2015 on torchvision's blocks.

It differs from torchvision's network in three ways: average pooling leaves padding out of its counts, the
last block pools by maximum, and there are 1,008 classes. State dicts have the names of pytorch-fid and
torch-fidelity (`pt_inception-2015-12-05-6726825d.pth`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.inception import (
    BasicConv2d,
    InceptionA,
    InceptionB,
    InceptionC,
    InceptionD,
    InceptionE,
)

from cat_fast.evaluation.features.network import FeatureNetwork
from cat_fast.evaluation.features.resize import resize_bilinear_tf1

SIDE = 299
SPATIAL_CHANNELS = 7
"""Channels of sFID's layer that enter its features."""
SPATIAL_SIDE = 17


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class _BlockA(InceptionA):
    def _forward(self, x: Tensor) -> list[Tensor]:
        return [
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(_average(x)),
        ]


class _BlockC(InceptionC):
    def _forward(self, x: Tensor) -> list[Tensor]:
        double = x
        for part in range(1, 6):
            double = self.get_submodule(f"branch7x7dbl_{part}")(double)
        return [
            self.branch1x1(x),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            double,
            self.branch_pool(_average(x)),
        ]


class _BlockE(InceptionE):
    """Block of the 8 x 8 stage.

    Args:
        maximum: pool by maximum, as in the graph's last block.
    """

    def __init__(self, in_channels: int, maximum: bool) -> None:
        super().__init__(in_channels)
        self.maximum = maximum

    def _forward(self, x: Tensor) -> list[Tensor]:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.maximum else _average(x)
        return [
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(pooled),
        ]


class InceptionV3(FeatureNetwork):
    """Features of FID (`pool`), sFID (`spatial`) and the Inception Score (`logits`, without the bias).

    `spatial` is ADM's layer for sFID (Nash et al., 2021): the first 7 channels of Mixed_6d.branch1x1 after
    batch normalisation and ReLU, 17 x 17, flattened in the order row, column, channel of ADM's reference
    statistics.
    """

    name = "inception"
    resize = f"bilinear as in TensorFlow 1, {SIDE} px"

    def __init__(self) -> None:
        super().__init__()
        self.sizes = {"pool": 2048, "spatial": SPATIAL_CHANNELS * SPATIAL_SIDE**2, "logits": 1008}
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, kernel_size=3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, kernel_size=3)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, kernel_size=3, padding=1)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, kernel_size=1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, kernel_size=3)
        self.Mixed_5b = _BlockA(192, pool_features=32)
        self.Mixed_5c = _BlockA(256, pool_features=64)
        self.Mixed_5d = _BlockA(288, pool_features=64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = _BlockC(768, channels_7x7=128)
        self.Mixed_6c = _BlockC(768, channels_7x7=160)
        self.Mixed_6d = _BlockC(768, channels_7x7=160)
        self.Mixed_6e = _BlockC(768, channels_7x7=192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = _BlockE(1280, maximum=False)
        self.Mixed_7c = _BlockE(2048, maximum=True)
        self.fc = nn.Linear(2048, 1008)
        self.freeze()

    def _features(self, images: Tensor) -> dict[str, Tensor]:
        x = (resize_bilinear_tf1(images.float(), SIDE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        branches = self.Mixed_6d._forward(self.Mixed_6c(self.Mixed_6b(x)))
        spatial_BHWC = branches[0][:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1)
        x = self.Mixed_7a(self.Mixed_6e(torch.cat(branches, 1)))
        pool = self.Mixed_7c(self.Mixed_7b(x)).mean((2, 3))
        return {"pool": pool, "spatial": spatial_BHWC.flatten(1), "logits": pool @ self.fc.weight.T}
