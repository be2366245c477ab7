"""ResNet backbones of torchvision, with frozen batch norm as in DETR (arXiv 2005.12872, section 4)."""

import pickle
from http.client import HTTPException
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from models.backbones.weights import first_process_first, load_exactly, read_state_dict
from ops.gather import is_portable
from util.errors import UserError

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")
BASIC_BLOCK_RESNETS = ("resnet18", "resnet34")  # torchvision cannot dilate their blocks
STAGE_COUNT = 4


class FrozenBatchNorm2d(torchvision.ops.FrozenBatchNorm2d):
    """Batch norm of fixed statistics and affine numbers: four buffers, no parameters, eps 1e-5.

    Loading and names are torchvision's (a `num_batches_tracked` entry is dropped). The forward pass keeps half
    precision maps in half precision, where torchvision's would promote every map of the backbone to float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised map, of the shape (B, C, h, w) and the dtype of `x`."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        scale, shift = (value.to(x.dtype).view(1, -1, 1, 1) for value in (scale, shift))
        # One way through memory; but PyTorch 2.6 cannot decompose it for maps whose size is a symbol.
        return x * scale + shift if is_portable() else torch.addcmul(shift, x, scale)


class ResNetBackbone(nn.Module):
    """A ResNet without pooling and classifier that returns the maps of some stages.

    The stem and stage 1 stay frozen (Deformable DETR), except when a network with trainable norms starts from random
    weights. The norms of frozen stages never update their statistics.

    Args:
        name: one of `RESNETS`.
        train_backbone: False freezes everything.
        frozen_norm: `FrozenBatchNorm2d`; otherwise ordinary batch norm, to train from scratch or with large batches.
        dilation: the last stage keeps stride 16 and dilates its convolutions (DC5); not for ResNet-18 and -34.
        stages: the stages (1 to 4, ascending) whose maps are returned; later ones are not built.
        weights: "default" (ImageNet, torchvision's IMAGENET1K_V1, downloaded if need be), "none" (random), a file with
            torchvision's names, or "checkpoint" (random now, frozen like "default": a checkpoint will fill it).

    Attributes:
        body: the torchvision module, so that parameters are called `body.conv1.weight`, `body.layer1.0...`.
        strides, channels: of the returned maps.
    """

    def __init__(
        self,
        name: str,
        *,
        train_backbone: bool,
        frozen_norm: bool = True,
        dilation: bool = False,
        stages: tuple[int, ...] = (2, 3, 4),
        weights: str = "default",
    ) -> None:
        super().__init__()
        if name not in RESNETS:
            raise UserError(f"unknown ResNet {name!r}: choose one of {', '.join(RESNETS)}")
        if dilation and name in BASIC_BLOCK_RESNETS:
            raise UserError(f"--dilation needs resnet50 or resnet101: the blocks of {name} cannot be dilated")
        if not stages or list(stages) != sorted(set(stages) & set(range(1, STAGE_COUNT + 1))):
            raise ValueError(f"stages must be ascending numbers of 1 to {STAGE_COUNT}, got {stages}")
        body = torchvision.models.get_model(
            name,
            weights=None,
            norm_layer=FrozenBatchNorm2d if frozen_norm else nn.BatchNorm2d,
            replace_stride_with_dilation=[False, False, dilation],
        )
        widest = body.fc.in_features
        del body.avgpool, body.fc
        if weights not in ("none", "checkpoint"):
            _load_weights(body, name, weights)
        for stage in range(max(stages) + 1, STAGE_COUNT + 1):
            delattr(body, f"layer{stage}")
        self.body = body
        self.stages = tuple(stages)
        self.channels = tuple(widest // 2 ** (STAGE_COUNT - stage) for stage in stages)
        self.strides = tuple(16 if dilation and stage == STAGE_COUNT else 2 ** (stage + 1) for stage in stages)
        self._freeze(train_backbone, from_scratch=weights == "none" and not frozen_norm)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Return the maps of the chosen stages, (B, channels[i], ceil(H / strides[i]), ceil(W / strides[i])).

        `pixels` (B, 3, H, W) are normalised images.
        """
        body = self.body
        x = body.maxpool(body.relu(body.bn1(body.conv1(pixels))))
        maps = []
        for stage in range(1, max(self.stages) + 1):
            x = getattr(body, f"layer{stage}")(x)
            if stage in self.stages:
                maps.append(x)
        return maps

    def train(self, mode: bool = True) -> "ResNetBackbone":
        """Switch the mode; batch norms in frozen stages stay in evaluation mode, so that frozen means frozen."""
        super().train(mode)
        for module in self.body.modules():
            if isinstance(module, nn.BatchNorm2d) and not module.weight.requires_grad:
                module.eval()
        return self

    def _freeze(self, train_backbone: bool, from_scratch: bool) -> None:
        for name, parameter in self.body.named_parameters():
            in_trainable_stage = name.startswith(("layer2", "layer3", "layer4"))
            parameter.requires_grad_(train_backbone and (in_trainable_stage or from_scratch))
        self.train(self.training)


def _load_weights(body: nn.Module, name: str, weights: str) -> None:
    if weights == "default":
        state, source = first_process_first(lambda: _fetch(name)), f"of torchvision for {name}"
    else:
        state, source = read_state_dict(weights), weights
    counters = {key for key in body.state_dict() if key.endswith("num_batches_tracked")}  # none with frozen norms
    state = {
        key: value
        for key, value in state.items()
        if not key.startswith("fc.") and (counters or not key.endswith("num_batches_tracked"))
    }
    load_exactly(body, state, source, may_miss=counters)


def _fetch(name: str) -> dict[str, Tensor]:
    """Return torchvision's IMAGENET1K_V1 weights, from the cache of torch.hub or downloaded into it."""
    weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1
    try:
        return weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, HTTPException, pickle.UnpicklingError, EOFError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise UserError(
            f"could not get the ImageNet weights of {name} ({error}). Put {weights.url} into {folder}, or give the "
            "file with --backbone_weights PATH, or start from random weights with --backbone_weights none"
        ) from error
