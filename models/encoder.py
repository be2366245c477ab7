"""Deformable encoder: deformable self-attention over the tokens of all levels (Deformable-DETR, section 4.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ops.module import MSDeformAttn
from util.structures import LevelShapes, Memory


def xavier_matrices(module: nn.Module) -> None:
    """Draw every matrix of `module` Xavier-uniform, then give deformable attention its own initial values back."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    for part in module.modules():
        if isinstance(part, MSDeformAttn):
            part.reset_parameters()


def valid_ratios(paddings: Sequence[Tensor]) -> Tensor:
    """Return the share of each level that is image, (B, levels, 2) as (x, y), from its padding [(B, h, w) bool].

    Counted on the first row and the first column: an image fills the top-left corner.
    """
    ratios = []
    for padding in paddings:
        height, width = padding.shape[1:]
        # Counted in the type they are divided in: PyTorch 2.6 cannot export the quotient of integers.
        dtype = torch.get_default_dtype()
        rows, columns = ((~edge).sum(1, dtype=dtype) for edge in (padding[:, :, 0], padding[:, 0, :]))
        ratios.append(torch.stack([columns / width, rows / height], -1))
    return torch.stack(ratios, 1)


def encoder_reference_points(shapes: LevelShapes, ratios: Tensor) -> Tensor:
    """Return the reference point of every token on every level, (B, S, levels, 2) as (x, y) of the padded map.

    The centre of a cell is first divided by the valid ratio of its own level (so 1 is the border of the image) and
    then multiplied by that of the level looked at.
    """
    points = []
    for level, (height, width) in enumerate(shapes):
        y = torch.arange(height, dtype=torch.float32, device=ratios.device) + 0.5
        x = torch.arange(width, dtype=torch.float32, device=ratios.device) + 0.5
        y = y[None, :] / (ratios[:, None, level, 1] * height)
        x = x[None, :] / (ratios[:, None, level, 0] * width)
        grid = torch.stack([x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], -1)
        points.append(grid.flatten(1, 2))
    return torch.cat(points, 1)[:, :, None] * ratios[:, None]


class EncoderLayer(nn.Module):
    """Deformable self-attention and a feed-forward, each with a residual and a LayerNorm after it."""

    def __init__(self, attention: MSDeformAttn, *, width: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = attention
        self.dropout1 = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, feedforward)
        self.dropout2 = nn.Dropout(dropout)
        self.linear2 = nn.Linear(feedforward, width)
        self.dropout3 = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, pos: Tensor, reference: Tensor, shapes: LevelShapes, padding: Tensor) -> Tensor:
        """Return the tokens (B, S, D) after one layer; `reference` is (B, S, levels, 2), `padding` (B, S)."""
        attended = self.self_attn(x + pos, reference, x, shapes, padding)
        x = self.norm1(x + self.dropout1(attended))
        hidden = self.linear2(self.dropout2(self.linear1(x).relu()))
        return self.norm2(x + self.dropout3(hidden))


class DeformableEncoder(nn.Module):
    """A stack of encoder layers that share the reference points; there is no norm after the last one."""

    def __init__(self, layers: Sequence[EncoderLayer], *, use_checkpoint: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.use_checkpoint = use_checkpoint
        xavier_matrices(self)

    def forward(self, maps: Sequence[Tensor], positions: Sequence[Tensor], paddings: Sequence[Tensor]) -> Memory:
        """Encode all levels together.

        Args:
            maps: [(B, D, h, w)] per level.
            positions: [(B, D, h, w)] position encoding plus level embedding.
            paddings: [(B, h, w)] bool, True at padding.
        """
        shapes = tuple((m.shape[2], m.shape[3]) for m in maps)
        tokens = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1)
        pos = torch.cat([p.flatten(2).transpose(1, 2) for p in positions], 1)
        padding = torch.cat([p.flatten(1) for p in paddings], 1)
        ratios = valid_ratios(paddings)
        reference = encoder_reference_points(shapes, ratios)
        for layer in self.layers:
            if self.use_checkpoint and self.training:
                tokens = checkpoint(layer, tokens, pos, reference, shapes, padding, use_reentrant=False)
            else:
                tokens = layer(tokens, pos, reference, shapes, padding)
        return Memory(tokens, padding, shapes, ratios)
