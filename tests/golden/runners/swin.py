"""The Swin backbone alone."""

from __future__ import annotations

import json
import re

import numpy as np
import torch

from models.backbones.swin import SwinTransformer
from tests.golden.case import checkpoint
from tests.golden.fill import image
from tests.golden.runners.common import assert_close


def run(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    model = SwinTransformer(**{**meta["flags"], "drop_path_rate": 0.0})
    prefix = meta["weights"]["prefix"]
    state = {name.removeprefix(prefix): value for name, value in checkpoint(meta).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all("relative_position_index" in name for name in missing)
    height, width = map(int, re.search(r"image\((\d+), (\d+), seed\)", meta["inputs"]).groups())
    seeds = json.loads(re.search(r"\[.*?\]", meta["inputs"]).group())
    features = model.eval()(torch.stack([image(height, width, seed) for seed in seeds]))
    stored = {key: value for key, value in arrays.items() if key.startswith("feature.")}
    assert len(features) == len(stored)
    for feature, (key, value) in zip(features, sorted(stored.items())):
        assert_close(key, feature, value, meta["tolerances"]["absolute"])
