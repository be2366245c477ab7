"""One runner per `case_kind`: `run(meta, arrays)` asserts everything that the case stores."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.golden.runners import (
    attention,
    boxes,
    co_deformable,
    co_dino,
    co_head_atss,
    co_head_rpn_roi,
    co_other_heads,
    co_postprocess,
    co_queries,
    co_swin,
    construction,
    criterion,
    data_transforms,
    detector,
    dino,
    matching,
    parts,
    swin,
)

RUNNERS: dict[str, Callable[[dict, dict[str, np.ndarray]], None]] = {
    "op_ms_deform_attn": attention.run_operator,
    "module_ms_deform_attn": attention.run_module,
    "box_ops": boxes.run_box_ops,
    "postprocess": boxes.run_postprocess,
    "matcher": matching.run,
    "criterion": criterion.run,
    "sine_position": parts.run_sine_position,
    "frozen_bn": parts.run_frozen_bn,
    "two_stage_proposals": parts.run_two_stage_proposals,
    "swin_small_window": swin.run,
    "data_transforms": data_transforms.run,
    "construction": construction.run,
    "co_aux_queries": co_queries.run,
    "co_postprocess": co_postprocess.run,
    "co_deformable_model": co_deformable.run,
    "co_dino_model": co_dino.run,
    "co_head_atss": co_head_atss.run,
    "co_head_rpn_roi": co_head_rpn_roi.run,
    "co_other_heads": co_other_heads.run,
    "co_swin": co_swin.run,
    "deformable_detr_model": detector.run,
    "dino_model": dino.run_model,
    "dab_deformable_model": dino.run_model,
    "dino_parts": dino.run_parts,
    "dino_checkpoint_names": dino.run_checkpoint_names,
}
