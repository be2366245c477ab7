"""Co-DINO: the model of its command line with published weights and replayed noise, evaluated and trained."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from main import get_args_parser
from models import build_model
from models.aux_heads import sampling
from models.criterion import Criterion
from models.detector import Detector
from models.groups.denoising import Noise
from models.postprocess import PostProcessor
from tests.golden.runners.co_deformable import check_test, make_images, official_state, reduce_sizes
from tests.golden.runners.co_deformable_training import check_training, own_names
from tests.golden.runners.co_queries import keys_in_order
from tests.golden.runners.co_stored import ABSOLUTE, Stored, subsample
from tests.golden.runners.dino import check_boxes, check_mask, replayed, watched_groups
from util.checkpoint import load_weights
from util.structures import QueryGroup

# Co-DINO with two heads, 5 levels and the 80 classes of COCO, as published. Backbone and recipe are not in it.
FLAGS = (
    "--with_box_refine --two_stage --mixed_selection --look_forward_twice --query_pos box --content_init normal "
    "--decoder_norm --logit_eps 1e-3 --num_queries_one2one 900 --dim_feedforward 2048 --dropout 0.0 "
    "--num_feature_levels 5 --return_interm_indices 0 1 2 3 --pe_temperature 20 --no-pe_half_cell "
    "--cls_target quality --focal_alpha -1 --cls_loss_coef 1 "
    "--dn_number 100 --dn_groups divided --dn_label_noise_ratio 0.5 --dn_box_noise_scale 1.0 --dn_labelbook_size 79 "
    "--aux_heads faster_rcnn atss --lambda1 1 --lambda2 2 --soft_nms_iou 0.8 --clip_boxes --topk 300"
)


def build(meta: dict) -> tuple[Detector, Criterion, PostProcessor]:
    """Return the model of a case; everything that is stored about it is said or checked."""
    model, noise = meta["model"], meta["model"]["denoising"]
    assert model["two_stage"] and model["box_refine"]
    flags = {
        "num_classes": model["num_classes"],
        "num_queries": model["num_queries"],
        "enc_layers": model["enc_layers"],
        "dec_layers": model["dec_layers"],
        "num_feature_levels": model["levels"],
        "aux_heads": " ".join(model["aux_heads"]),
        "lambda1": model["lambda_1"],
        "lambda2": model["lambda_2"],
        "dn_number": noise["num_dn_queries"],
        "dn_label_noise_ratio": noise["label_noise"],
        "dn_box_noise_scale": noise["box_noise"],
    }
    words = f"--backbone_weights none {FLAGS} " + " ".join(f"--{name} {value}" for name, value in flags.items())
    built = build_model(get_args_parser().parse_args(words.split()))
    reduce_sizes(built[0], model["reduced"])
    return built


def run(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    stored, state, images = Stored(arrays), official_state(meta), make_images(meta)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "random_keys", keys_in_order)
        model, criterion, postprocessor = build(meta)
        load_weights(model, state)
        co = model.groups["co"]
        co.evaluated, co.training_only = "atss", False  # as with --eval_head
        check_test(model, meta["model"]["reduced"]["test"], images, stored.part("test."), postprocessor.soft_nms_iou)
        names = own_names(state, model)
        for step, content in meta["train"].items():
            own = stored.part(f"{step}.")
            noise = stored_noise(own.part("dn."), meta["model"]["denoising"]["label_noise"])
            with replayed(noise), watched_groups(model) as groups:
                check_training(model, criterion, images, content, own, names)
            check_denoising({group.name: group for group in groups}, noise, own.part("dn."))
    assert not stored.unread, f"stored, but not compared: {sorted(stored.unread)}"


def stored_noise(stored: Stored, label_noise: float) -> Noise:
    """Return the noise of a training step; of new labels only those that are used are stored."""
    groups = int(stored.take("groups"))
    label = torch.from_numpy(stored.take("label_flip_uniform")).view(groups, 2, -1)
    new_label = torch.zeros(label.shape, dtype=torch.int64)
    new_label[label < label_noise / 2] = torch.from_numpy(stored.take("label_new")).long()
    sign, size = (torch.from_numpy(stored.take(f"box_{name}")).view(*label.shape, 4) for name in ("sign01", "uniform"))
    return Noise(label, new_label, sign.float() * 2 - 1, size)


def check_denoising(groups: dict[str, QueryGroup], noise: Noise, stored: Stored) -> None:
    """Compare denoising queries; that their number of groups is the stored one was seen where noise was drawn."""
    queries = groups["dn"]
    stored.close("query_content_sub", subsample(queries.content))
    check_boxes(f"{stored.prefix}query_box_logits", queries.reference, stored.take("query_box_logits"), ABSOLUTE)
    check_mask(queries, groups["one2one"], stored.take("attn_mask"))
    stored.same("pad_size", torch.tensor(len(queries)))
