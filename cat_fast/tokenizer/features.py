"""ResNet feature distance, the paper's loss term on MoCo-v2's ResNet-50.

The sources state the network and the weight (0.2), not the layers. We follow LPIPS without its learned
weights: feature maps of the four stages are normalised to unit length per position, and mean squared
differences are summed over stages.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models.feature_extraction import create_feature_extractor

from cat_fast.errors import UserError, first_line
from cat_fast.weights.tensor_pickle import load_checkpoint

STAGES = ("layer1", "layer2", "layer3", "layer4")
_MOCO_PREFIX = "module.encoder_q."


class ResNetFeatures(nn.Module):
    """Distance per image, (B,), of images in [-1, 1], (B, 3, H, W); only the first argument gets a gradient.

    Args:
        trunk: name of a torchvision ResNet, such as `resnet50`, or of one from timm, such as `timm/resnet50`.
        weights: checkpoint in MoCo's layout or plain state dict of the trunk. None leaves the trunk
            untrained, for measurements of time and memory only.

    Raises:
        UserError: an unknown trunk, a missing file, or weights of another network.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, weights: str | Path | None, trunk: str = "resnet50") -> None:
        super().__init__()
        network = _trunk(trunk)
        if weights is not None:
            state = _trunk_state(Path(weights))
            for name, value in network.state_dict().items():
                if not name.startswith("fc.") and getattr(state.get(name), "shape", None) != value.shape:
                    raise UserError(
                        f"{weights}: not the weights of a {trunk}: {name} is missing or has another shape"
                    )
            network.load_state_dict(state, strict=False)
        self.network = create_feature_extractor(network.eval(), return_nodes=list(STAGES))
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "ResNetFeatures":
        return super().train(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            targets = self._unit_features(y)
        distance = x.new_zeros(x.shape[0])
        for feature, target in zip(self._unit_features(x), targets, strict=True):
            distance = distance + (feature - target).square().sum(1).mean((1, 2))
        return distance

    def _unit_features(self, x: Tensor) -> list[Tensor]:
        stages = self.network((0.5 * (x + 1) - self.mean) / self.std)
        return [F.normalize(stages[name].float(), dim=1) for name in STAGES]  # bf16 under autocast


def _trunk(name: str) -> nn.Module:
    library, _, model = name.rpartition("/")
    try:
        if library == "timm":
            import timm

            network = timm.create_model(model, pretrained=False)
        else:
            network = get_model(name, weights=None)
    except (ImportError, ValueError, RuntimeError) as error:
        raise UserError(f"loss.features_trunk: {name}: {first_line(error)}") from None
    if not all(hasattr(network, stage) for stage in STAGES):
        raise UserError(
            f"loss.features_trunk: expected a ResNet with {', '.join(STAGES)}, got {name} without them"
        )
    return network


def _trunk_state(path: Path) -> dict[str, Tensor]:
    checkpoint: Any = load_checkpoint(path)
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, Mapping) else {}
    if any(name.startswith(_MOCO_PREFIX) for name in state):
        state = {
            name.removeprefix(_MOCO_PREFIX): value
            for name, value in state.items()
            if name.startswith(_MOCO_PREFIX)
        }
    return {name: value for name, value in state.items() if not name.startswith("fc.")}
