"""Swin Transformer backbone (arXiv 2103.14030) with the names and numbers of the published detection models.

Maps are (B, h, w, C) inside. As in the published detectors, every map is padded to whole windows: the window never
shrinks, padding cells take part in the attention as zeros, and odd blocks shift even when there is one window only.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from models.backbones.swin_weights import load_swin_weights
from util.errors import UserError

PATCH = 4
BLOCKED = -100.0  # added to logits between regions; not -inf, as in the published models


@dataclass(frozen=True)
class SwinSize:
    """Sizes of a published model, and timm's name of the ImageNet weights that detectors start from."""

    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    window_size: int
    imagenet: str


SWINS = {  # ImageNet-1k for the small ones, ImageNet-22k for the large ones (H-DETR, arXiv 2207.13080)
    "swin_tiny": SwinSize(96, (2, 2, 6, 2), (3, 6, 12, 24), 7, "swin_tiny_patch4_window7_224.ms_in1k"),
    "swin_small": SwinSize(96, (2, 2, 18, 2), (3, 6, 12, 24), 7, "swin_small_patch4_window7_224.ms_in1k"),
    "swin_base": SwinSize(128, (2, 2, 18, 2), (4, 8, 16, 32), 7, "swin_base_patch4_window7_224.ms_in22k"),
    "swin_base_window12": SwinSize(128, (2, 2, 18, 2), (4, 8, 16, 32), 12, "swin_base_patch4_window12_384.ms_in22k"),
    "swin_large": SwinSize(192, (2, 2, 18, 2), (6, 12, 24, 48), 7, "swin_large_patch4_window7_224.ms_in22k"),
    "swin_large_window12": SwinSize(192, (2, 2, 18, 2), (6, 12, 24, 48), 12, "swin_large_patch4_window12_384.ms_in22k"),
}


class PatchEmbed(nn.Module):
    """Patches of 4 x 4 pixels to vectors; sizes are zero-padded right and bottom to multiples of 4."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=PATCH, stride=PATCH)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return (B, ceil(H / 4), ceil(W / 4), C) from `pixels` (B, 3, H, W)."""
        height, width = pixels.shape[-2:]
        pixels = F.pad(pixels, (0, -width % PATCH, 0, -height % PATCH))
        return self.norm(self.proj(pixels).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Halves a map, rounding up, and doubles its channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, ceil(h / 2), ceil(w / 2), 2 C) from `x` (B, h, w, C)."""
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        corners = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
        return self.reduction(self.norm(torch.cat(corners, dim=-1)))


class WindowAttention(nn.Module):
    """Multi-head attention inside windows, with a learned bias per head and relative position."""

    def __init__(self, dim: int, num_heads: int, window_size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))
        self.register_buffer("relative_position_index", relative_position_index(window_size))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Attend among the T cells of each window.

        `x` (B * W, T, C) are the W windows of each image, image by image; `mask` (W, T, T) is added to the logits.
        """
        windows, cells, dim = x.shape
        query, key, value = self.qkv(x).view(windows, cells, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        logits = (query * self.scale) @ key.transpose(-2, -1)
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
        logits = logits + bias.view(cells, cells, self.num_heads).permute(2, 0, 1)
        if mask is not None:
            logits = (logits.unflatten(0, (-1, len(mask))) + mask[:, None].to(logits.dtype)).flatten(0, 1)
        return self.proj((logits.softmax(dim=-1) @ value).transpose(1, 2).reshape(windows, cells, dim))


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape (..., C) of `x`."""
        return self.fc2(F.gelu(self.fc1(x)))


class SwinBlock(nn.Module):
    """Window attention and MLP, both pre-norm; `shift` moves the windows by that many cells."""

    def __init__(self, dim: int, num_heads: int, window_size: int, shift: int, drop_path: float) -> None:
        super().__init__()
        self.window_size = window_size
        self.shift = shift
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window_size)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim)
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return a map like `x` (B, h, w, C); `mask` (W, T, T) is `shifted_window_mask` of the padded size."""
        height, width = x.shape[1:3]
        size, shift = self.window_size, self.shift
        y = F.pad(self.norm1(x), (0, 0, 0, -width % size, 0, -height % size))
        padded = y.shape
        if shift:
            y = y.roll((-shift, -shift), dims=(1, 2))
        y = self.attn(to_windows(y, size), mask if shift else None)
        y = from_windows(y, size, padded)
        if shift:
            y = y.roll((shift, shift), dims=(1, 2))
        x = x + self.drop_path(y[:, :height, :width])
        return x + self.drop_path(self.mlp(self.norm2(x)))


class SwinStage(nn.Module):
    """The blocks of one resolution, and the merging that leads to the next stage."""

    def __init__(self, dim: int, num_heads: int, window_size: int, drop_paths: list[float], merge: bool) -> None:
        super().__init__()
        self.window_size = window_size
        self.blocks = nn.ModuleList(
            SwinBlock(dim, num_heads, window_size, shift=i % 2 * (window_size // 2), drop_path=rate)
            for i, rate in enumerate(drop_paths)
        )
        if merge:
            self.downsample = PatchMerging(dim)

    def forward(self, x: Tensor, use_checkpoint: bool) -> Tensor:
        """Run the blocks (not the merging) on `x` (B, h, w, C)."""
        size = self.window_size
        height, width = (length + -length % size for length in x.shape[1:3])
        mask = shifted_window_mask(height, width, size, x.device)  # once for all blocks of the stage
        for block in self.blocks:
            x = checkpoint(block, x, mask, use_reentrant=False) if use_checkpoint else block(x, mask)
        return x


class SwinTransformer(nn.Module):
    """The four stages of a Swin Transformer; no absolute positions, no dropout.

    Args:
        embed_dim: E, channels of stage 0; stage s has E * 2**s.
        depths, num_heads: blocks and attention heads of each stage.
        window_size: cells per side of a window.
        drop_path_rate: stochastic depth of the last block, in [0, 1); it rises linearly from 0 over all blocks.
        use_checkpoint: recompute blocks in the backward pass, in training only.
        out_stages: the stages (from 0) that are returned, each through its own norm; later ones are not built.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        depths: tuple[int, ...],
        num_heads: tuple[int, ...],
        window_size: int = 7,
        drop_path_rate: float = 0.0,
        use_checkpoint: bool = False,
        out_stages: tuple[int, ...] = (1, 2, 3),
    ) -> None:
        super().__init__()
        if not out_stages or list(out_stages) != sorted(set(out_stages) & set(range(len(depths)))):
            raise ValueError(f"out_stages must be ascending numbers of 0 to {len(depths) - 1}, got {out_stages}")
        if not 0 <= drop_path_rate < 1:
            raise UserError(f"--drop_path_rate must be at least 0 and below 1, got {drop_path_rate}")
        self.use_checkpoint = use_checkpoint
        self.out_stages = tuple(out_stages)
        self.patch_embed = PatchEmbed(embed_dim)
        rates = (drop_path_rate * i / max(1, sum(depths) - 1) for i in range(sum(depths)))
        last = max(out_stages)
        self.layers = nn.ModuleList(
            SwinStage(
                embed_dim * 2**stage,
                num_heads[stage],
                window_size,
                drop_paths=[next(rates) for _ in range(depths[stage])],
                merge=stage < last,
            )
            for stage in range(last + 1)
        )
        for stage in out_stages:
            self.add_module(f"norm{stage}", nn.LayerNorm(embed_dim * 2**stage))
        self.apply(_init_linear)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Return the maps (B, E * 2**s, ceil(H / r), ceil(W / r)), r = 4 * 2**s, of the chosen stages s.

        `pixels` (B, 3, H, W) are normalised images of any size.
        """
        use_checkpoint = self.use_checkpoint and self.training and torch.is_grad_enabled()
        x = self.patch_embed(pixels)
        maps = []
        for stage, layer in enumerate(self.layers):
            x = layer(x, use_checkpoint)
            if stage in self.out_stages:
                maps.append(getattr(self, f"norm{stage}")(x).permute(0, 3, 1, 2).contiguous())
            if hasattr(layer, "downsample"):
                x = layer.downsample(x)
        return maps


class SwinBackbone(nn.Module):
    """A published Swin as a backbone.

    Args:
        name: a key of `SWINS`.
        train_backbone: False freezes everything and switches stochastic depth off.
        stages: the stages (0 to 3, ascending) whose maps are returned.
        weights: "default" (ImageNet, downloaded if need be: `SwinSize.imagenet`), "none" (random), a file or a timm
            name, see `load_swin_weights`, or "checkpoint" (random now: a checkpoint will fill it).
        drop_path_rate, use_checkpoint: see `SwinTransformer`.

    Attributes:
        body: the `SwinTransformer`.
        strides, channels: of the returned maps.
    """

    def __init__(
        self,
        name: str,
        *,
        train_backbone: bool,
        stages: tuple[int, ...] = (1, 2, 3),
        weights: str = "none",
        drop_path_rate: float = 0.2,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if name not in SWINS:
            raise UserError(f"unknown Swin {name!r}: choose one of {', '.join(SWINS)}")
        size = SWINS[name]
        self.body = SwinTransformer(
            embed_dim=size.embed_dim,
            depths=size.depths,
            num_heads=size.num_heads,
            window_size=size.window_size,
            drop_path_rate=drop_path_rate if train_backbone else 0.0,
            use_checkpoint=use_checkpoint and train_backbone,
            out_stages=stages,
        )
        self.strides = tuple(PATCH * 2**stage for stage in stages)
        self.channels = tuple(size.embed_dim * 2**stage for stage in stages)
        if weights not in ("none", "checkpoint"):
            load_swin_weights(self.body, size.imagenet if weights == "default" else weights)
        self.requires_grad_(train_backbone)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Return the maps (B, channels[i], ceil(H / strides[i]), ceil(W / strides[i])) of `pixels` (B, 3, H, W)."""
        return self.body(pixels)


def relative_position_index(window_size: int) -> Tensor:
    """Return (T, T) int64, T = window_size**2: the row of the bias table for each pair of cells of a window."""
    axis = torch.arange(window_size)
    y, x = (grid.flatten() for grid in torch.meshgrid(axis, axis, indexing="ij"))
    dy = y[:, None] - y[None] + window_size - 1
    dx = x[:, None] - x[None] + window_size - 1
    return dy * (2 * window_size - 1) + dx


def shifted_window_mask(height: int, width: int, window_size: int, device: torch.device) -> Tensor:
    """Return (W, T, T): -100 for pairs of cells that only the roll of a shifted block brought into one window.

    `height` and `width` (cells) are multiples of `window_size`.
    """

    def bands(length: int) -> Tensor:
        position = torch.arange(length, device=device)
        return (position >= length - window_size).long() + (position >= length - window_size // 2)

    regions = 3 * bands(height)[:, None] + bands(width)
    regions = to_windows(regions[None, :, :, None], window_size).squeeze(-1)
    return torch.where(regions[:, None] == regions[:, :, None], 0.0, BLOCKED)


def to_windows(x: Tensor, size: int) -> Tensor:
    """Cut `x` (B, h, w, C), h and w multiples of `size`, into windows (B * h/size * w/size, size**2, C), row by row."""
    batch, height, width, dim = x.shape
    x = x.view(batch, height // size, size, width // size, size, dim)
    return x.transpose(2, 3).reshape(-1, size * size, dim)


def from_windows(windows: Tensor, size: int, shape: tuple[int, ...]) -> Tensor:
    """Undo `to_windows` for a map of `shape` (B, h, w, C)."""
    batch, height, width, dim = shape
    x = windows.view(batch, height // size, width // size, size, size, dim)
    return x.transpose(2, 3).reshape(batch, height, width, dim)


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
