"""The Swin of Co-DETR under the names of a published file: all four maps of an image of odd size."""

from __future__ import annotations

import numpy as np
import torch

from models.backbones.swin import SwinTransformer
from tests.golden.fill import draw, image
from tests.golden.runners.co_stored import Stored, subsample


@torch.no_grad()
def run(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    settings = dict(meta["model"])
    assert not settings.pop("ape") and settings.pop("patch_norm")  # the only ones we have
    stages = tuple(settings.pop("out_indices"))
    model = SwinTransformer(**settings, out_stages=stages)
    names, seed = meta["weights"]["tensors"], meta["weights"]["seed"]
    state = {n.removeprefix("backbone."): torch.from_numpy(draw(n, tuple(shape), seed)) for n, shape in names}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(name.endswith("relative_position_index") for name in missing)
    features = model.eval()(image(**meta["inputs"])[None])
    stored = Stored(arrays)
    for stage, feature in zip(stages, features, strict=True):
        stored.close(f"s{stage}_sub", subsample(feature))
    assert not stored.unread, f"not compared: {sorted(stored.unread)}"
