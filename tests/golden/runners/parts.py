"""Small parts: position encoding, frozen norm, proposals."""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import nn

from models.backbones import FrozenBatchNorm2d
from models.encoder import encoder_reference_points, valid_ratios
from models.heads import heads_of
from models.position_encoding import SinePositionEncoding, sine_embed_boxes
from models.proposals import proposal_logits
from models.transformer import TwoStageTransformer
from tests.golden.case import checkpoint
from tests.golden.runners.common import assert_close, subcases
from util.structures import Memory


def run_sine_position(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    for name, stored in subcases(arrays).items():
        encoding = SinePositionEncoding(meta["subcases"][name]["num_pos_feats"])
        found = encoding(torch.from_numpy(stored["mask"]))
        assert_close(name, found, stored["pos"], meta["tolerances"]["absolute"])


def drawn_input(text: str) -> torch.Tensor:
    """Return the array that a case describes as `numpy.random.RandomState(seed).randn(shape)`."""
    seed, shape = re.search(r"RandomState\((\d+)\)\.randn\(([\d, ]+)\)", text).groups()
    values = np.random.RandomState(int(seed)).randn(*map(int, shape.split(",")))
    return torch.from_numpy(values.astype(np.float32))


def run_frozen_bn(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    x = drawn_input(meta["inputs"])
    norm = nn.Module()
    norm.bn1 = FrozenBatchNorm2d(x.shape[1])
    state = checkpoint(meta)
    state["bn1.running_var"][0] = 0
    state["bn1.num_batches_tracked"] = torch.tensor(7)
    norm.load_state_dict(state)
    assert "bn1.num_batches_tracked" not in norm.state_dict()
    assert len(list(norm.parameters())) == int(arrays["parameters"])
    found = norm.train().bn1(x)
    np.testing.assert_allclose(found.numpy(), arrays["output"], rtol=meta["tolerances"]["relative"], atol=1e-6)


def run_two_stage_proposals(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    tolerance = meta["tolerances"]["absolute"]
    shapes = tuple(tuple(s) for s in meta["shapes_hw"])
    paddings = _paddings(shapes, meta["valid_hw_per_level_and_image"])
    padding = torch.cat([p.flatten(1) for p in paddings], 1)
    assert (padding.numpy() == arrays["mask_flat"]).all()
    ratios = valid_ratios(paddings)
    assert_close("valid ratios", ratios, arrays["valid_ratios"], tolerance)
    points = encoder_reference_points(shapes, ratios)
    assert_close("encoder reference points", points, arrays["encoder_reference_points"], tolerance)

    logits, _ = proposal_logits(padding, shapes)
    assert (logits.isinf().numpy() == arrays["proposals_is_inf"]).all()
    assert_close("proposals", logits.sigmoid(), arrays["proposals_sigmoid"], tolerance)
    finite = logits.masked_fill(logits.isinf(), 0.0)
    assert_close("proposal logits", finite, np.where(logits.isinf(), 0, arrays["proposals_logit_finite"]), tolerance)

    memory = Memory(drawn_input(meta["inputs"]), padding, shapes, ratios)
    width = memory.tokens.shape[-1]
    transformer = TwoStageTransformer(
        nn.Identity(), nn.Identity(), num_levels=len(shapes), width=width, mixed_selection=False
    )
    prefix = meta["weights"]["prefix"]
    state = {name.removeprefix(prefix): value for name, value in checkpoint(meta).items()}
    assert not transformer.load_state_dict(state, strict=False).unexpected_keys
    tokens = {}
    transformer.enc_output_norm.register_forward_hook(lambda module, inputs, output: tokens.update(memory=output))
    heads = heads_of(width=width, num_classes=3, dec_layers=1, refine=True, two_stage=True)
    transformer.propose(memory, heads)
    assert_close("output memory", tokens["memory"], arrays["output_memory"], tolerance)
    # Stored in logit space; `sigmoid` gives the boxes whose embedding is stored.
    boxes = torch.from_numpy(arrays["pos_embed_input"]).sigmoid()
    embedded = sine_embed_boxes(boxes, width // 2)
    assert_close("embedding of proposals", embedded, arrays["pos_embed"], tolerance)
    normed = transformer.pos_trans_norm(transformer.pos_trans(embedded))
    assert_close("projected embedding", normed, arrays["pos_trans_norm"], tolerance)


def _paddings(shapes: tuple[tuple[int, int], ...], valid: list) -> list[torch.Tensor]:
    """Return [(B, h, w) bool] from valid_hw[level][image]."""
    paddings = []
    for shape, sizes in zip(shapes, valid):
        padding = torch.ones(len(sizes), *shape, dtype=torch.bool)
        for image, (h, w) in enumerate(sizes):
            padding[image, :h, :w] = False
        paddings.append(padding)
    return paddings
