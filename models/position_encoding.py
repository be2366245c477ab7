"""Position encodings for feature maps and for boxes.

The sine encoding of a map is that of Deformable DETR (arXiv 2010.04159; published code): DETR's sine encoding with cell
centres at half integers. The learned encoding is the one of DETR (arXiv 2005.12872). `sine_embed_boxes` turns the
proposals of a two-stage model into query embeddings.
"""

import math
from argparse import Namespace

import torch
from torch import Tensor, nn

from ops.module import at_least_float32
from util.errors import UserError

LEARNED_TABLE_ROWS = 50  # as in DETR: maps of stride 32 of an image up to 1600 pixels


class SinePositionEncoding(nn.Module):
    """Sines and cosines of the cell's position inside the valid (unpadded) part of the map.

    Args:
        num_feats: F, features per axis; even. The encoding has 2 F channels.
        temperature: base of the geometric series of wavelengths.
        scale: the angle that one full valid height or width is mapped to, in radians.
        shift: subtracted from the number of a cell, counted from 1: 0.5 puts it into the cell's middle, 0 (DAB-DETR,
            DINO) onto its far border.
    """

    def __init__(
        self, num_feats: int, temperature: float = 10000.0, scale: float = 2 * math.pi, shift: float = 0.5
    ) -> None:
        super().__init__()
        _check_even(num_feats)
        self.num_feats = num_feats
        self.temperature = temperature
        self.scale = scale
        self.shift = shift

    def forward(self, padding: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the encoding (B, 2 F, h, w) of maps with `padding` (B, h, w) bool, True on padding.

        The first F channels encode the row, the others the column. Angles are computed in float32, also under
        autocast; `dtype` is only what the result is cast to. Cells in fully padded rows or columns get arbitrary finite
        values: nothing there may be read.
        """
        valid = ~padding
        rows = valid.cumsum(1, dtype=torch.float32)
        columns = valid.cumsum(2, dtype=torch.float32)
        rows = (rows - self.shift) / (rows[:, -1:, :] + 1e-6) * self.scale
        columns = (columns - self.shift) / (columns[:, :, -1:] + 1e-6) * self.scale
        encoded = [_sine(angle, self.num_feats, self.temperature) for angle in (rows, columns)]
        return torch.cat(encoded, dim=-1).permute(0, 3, 1, 2).to(dtype)


class LearnedPositionEncoding(nn.Module):
    """One learned vector per row and one per column (DETR's alternative to the sines); padding plays no role.

    Args:
        num_feats: F, features per axis. The encoding has 2 F channels.
    """

    def __init__(self, num_feats: int) -> None:
        super().__init__()
        self.row_embed = nn.Embedding(LEARNED_TABLE_ROWS, num_feats)
        self.col_embed = nn.Embedding(LEARNED_TABLE_ROWS, num_feats)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, padding: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the encoding (B, 2 F, h, w) for maps with `padding` (B, h, w); first F channels column, then row.

        Raises UserError for a map with more rows or columns than the tables have.
        """
        batch, height, width = padding.shape
        if max(height, width) > LEARNED_TABLE_ROWS:
            raise UserError(
                f"--position_embedding learned knows {LEARNED_TABLE_ROWS} rows and columns, but a feature map is "
                f"{height} x {width} cells: use --position_embedding sine, smaller images, or --num_feature_levels 1"
            )
        columns = self.col_embed.weight[:width].expand(height, -1, -1)
        rows = self.row_embed.weight[:height, None].expand(-1, width, -1)
        encoded = torch.cat([columns, rows], dim=-1).permute(2, 0, 1)
        return encoded.to(dtype).expand(batch, -1, -1, -1)


def sine_embed_boxes(boxes: Tensor, num_feats: int, temperature: float = 10000.0) -> Tensor:
    """Return the sine embedding (..., 4 F) of `boxes` (..., 4), with F = `num_feats` (even) per coordinate.

    Boxes are (cx, cy, w, h) relative to the image, in [0, 1], where 1 is the angle 2 pi; the blocks of the embedding
    have the same order. Half precision is computed and returned in float32.
    """
    _check_even(num_feats)
    angles = at_least_float32(boxes) * (2 * math.pi)
    return _sine(angles, num_feats, temperature).flatten(-2)


def build_position_encoding(args: Namespace) -> nn.Module:
    """Build the encoding that `--position_embedding` names, for maps of `--hidden_dim` channels."""
    if args.hidden_dim % 4:
        raise UserError(f"--hidden_dim must be a multiple of 4 for the position encoding, got {args.hidden_dim}")
    num_feats = args.hidden_dim // 2
    if args.position_embedding == "sine":
        shift = 0.5 if args.pe_half_cell else 0.0
        return SinePositionEncoding(num_feats, args.pe_temperature, args.position_embedding_scale, shift)
    if args.position_embedding == "learned":
        return LearnedPositionEncoding(num_feats)
    raise UserError(f"--position_embedding must be sine or learned, got {args.position_embedding!r}")


def _sine(angles: Tensor, num_feats: int, temperature: float) -> Tensor:
    """Return (..., F): sin(angle / t_i) at even i, cos at odd i, with t_i = temperature ** (2 floor(i / 2) / F)."""
    exponents = torch.arange(0, num_feats, 2, dtype=angles.dtype, device=angles.device) / num_feats
    angles = angles[..., None] / temperature**exponents
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def _check_even(num_feats: int) -> None:
    if num_feats < 2 or num_feats % 2:
        raise ValueError(f"num_feats must be a positive even number (sine and cosine in pairs), got {num_feats}")
