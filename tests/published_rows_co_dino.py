"""The rows of Co-DETR on DINO, as in `published_rows`: by hand from the paper and the model list.

Co-DINO (table 4, published models) has settings of its own; the rows of table 3 are DINO's with auxiliary heads.
"""

from __future__ import annotations

from tests.published_rows import E12, E36, Flags, Row
from tests.published_rows_co import CO, HEADS
from tests.published_rows_dino import DINO, E24, FIVE, SWIN_L

CO_DINO = CO | {
    # The model: that of DINO with 5 scales, heads of each layer its own, label table without a spare row.
    "with_box_refine": True,
    "two_stage": True,
    "mixed_selection": True,
    "look_forward_twice": True,
    "query_pos": "box",
    "content_init": "normal",
    "decoder_norm": True,
    "logit_eps": 1e-3,
    "num_queries_one2one": 900,
    "dim_feedforward": 2048,
    "dropout": 0.0,
    "num_feature_levels": 5,
    "return_interm_indices": [0, 1, 2, 3],
    "pe_temperature": 20.0,
    "pe_half_cell": False,
    "dn_number": 100,
    "dn_groups": "divided",
    "dn_labelbook_size": 79,
    "aux_heads": ["faster_rcnn", "atss"],
    # Quality focal loss; soft-NMS.
    "cls_target": "quality",
    "focal_alpha": -1.0,
    "cls_loss_coef": 1.0,
    "soft_nms_iou": 0.8,
    "topk": 300,
    # Only the backbone has a lower rate.
    "lr": 2e-4,
    "lr_backbone": 2e-5,
    "lr_linear_proj_mult": 1.0,
    "recipe_batch_size": 16,
}
LSJ: dict[str, Flags] = {
    "r50": {"augment": "lsj", "lsj_size": 1024, "lsj_scale": [0.1, 2.0], "copy_paste": 100},
    "swin_large": {"augment": "lsj", "lsj_size": 1280, "lsj_scale": [0.1, 2.0], "copy_paste": 100},
}
NINE: Flags = {"enc_layers": 9}


def swin(drop_path: float) -> Flags:
    return CO_DINO | SWIN_L | {"drop_path_rate": drop_path}


ROWS = {
    "co_dino_5scale_r50_12ep": Row("52.1", CO_DINO | E12),
    "co_dino_5scale_r50_lsj_12ep": Row("52.1", CO_DINO | E12 | LSJ["r50"]),
    "co_dino_5scale_r50_lsj_36ep": Row("54.8", CO_DINO | E36 | LSJ["r50"]),
    "co_dino_5scale_9enc_r50_lsj_12ep": Row("52.6", CO_DINO | E12 | LSJ["r50"] | NINE),
    "co_dino_5scale_9enc_r50_lsj_36ep": Row("55.4", CO_DINO | E36 | LSJ["r50"] | NINE),
    "co_dino_5scale_swin_large_12ep": Row("58.9", swin(0.3) | E12),
    "co_dino_5scale_swin_large_24ep": Row("59.8", swin(0.5) | E24),
    "co_dino_5scale_swin_large_36ep": Row("60.0", swin(0.6) | E36),
    "co_dino_5scale_swin_large_lsj_12ep": Row("59.3", swin(0.3) | E12 | LSJ["swin_large"]),
    "co_dino_5scale_swin_large_lsj_24ep": Row("60.4", swin(0.5) | E24 | LSJ["swin_large"]),
    "co_dino_5scale_swin_large_lsj_36ep": Row("60.7", swin(0.5) | E36 | LSJ["swin_large"]),
    "table3/dino_k1_r50_12ep": Row("51.0", DINO | CO | E12 | FIVE | HEADS[1]),
    "table3/dino_k2_r50_12ep": Row("51.2", DINO | CO | E12 | FIVE | HEADS[2]),
    "table3/dino_k1_swin_large_36ep": Row("59.3", DINO | CO | E36 | FIVE | SWIN_L | HEADS[1]),
    "table3/dino_k2_swin_large_36ep": Row("59.5", DINO | CO | E36 | FIVE | SWIN_L | HEADS[2]),
}

CO_DETR_ON_DINO = {f"co_detr/{name}": row for name, row in ROWS.items()}
