"""VGG-16 (Simonyan and Zisserman, 2015): torchvision's, and the convolutions of shift-tolerant LPIPS."""

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import vgg16

from cat_fast.evaluation.features.network import FeatureNetwork, normalise
from cat_fast.evaluation.features.resize import resize_bilinear_tf1
from cat_fast.tokenizer.perceptual import BlurPool

SIDE = 224
_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(FeatureNetwork):
    """Features of precision and recall in their paper and in torch-fidelity: fc2 after ReLU, 4,096."""

    name = "vgg16"
    resize = f"bilinear as in TensorFlow 1, {SIDE} px"

    def __init__(self) -> None:
        super().__init__()
        self.sizes = {"pool": 4096}
        network = vgg16(weights=None, init_weights=False)
        self.features, self.avgpool, self.classifier = network.features, network.avgpool, network.classifier
        self.freeze()

    def _features(self, images: Tensor) -> dict[str, Tensor]:
        x = normalise(resize_bilinear_tf1(images.float(), SIDE))
        x = self.avgpool(self.features(x)).flatten(1)
        return {"pool": self.classifier[:5](x)}  # both layers of 4,096 with their ReLUs


class ShiftTolerantVGG16(FeatureNetwork):
    """Stand-in without a download: the 13 convolutions of `stlpips-pytorch`, averaged over positions.

    They were trained on ImageNet, with blurred pooling and padding of their own, and fine-tuned for LPIPS.
    Distances between their features rank sets of images, but cannot be compared with published figures.
    """

    name = "vgg16"
    resize = "none"

    def __init__(self) -> None:
        super().__init__()
        self.sizes = {"pool": 512}
        layers: list[nn.Module] = []
        in_channels = 3
        for stage, widths in enumerate(_STAGES):
            if stage:
                layers += [nn.MaxPool2d(2, stride=1), BlurPool(in_channels)]
            for width in widths:
                layers += [nn.Conv2d(in_channels, width, 3, padding=1), nn.ReLU()]
                in_channels = width
        self.layers = nn.Sequential(*layers)
        self.freeze()

    def load_published(self, state: dict[str, Tensor]) -> None:
        """Load the state dict of the package, which names a layer by its slice and its index in the stack."""
        theirs = {name.split(".", 2)[2]: value for name, value in state.items() if name.startswith("net.")}
        self.layers.load_state_dict(theirs)

    def _features(self, images: Tensor) -> dict[str, Tensor]:
        x = images.float()
        if min(x.shape[2:]) < 64:  # reflected padding needs two pixels at the last stage
            x = F.interpolate(x, scale_factor=64 / min(x.shape[2:]), mode="bilinear", antialias=True)
        return {"pool": self.layers(normalise(x)).mean((2, 3))}
