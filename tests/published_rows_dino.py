"""The tables of DAB-Deformable-DETR and DINO, row by row, as in `published_rows`: by hand from the model lists."""

from __future__ import annotations

from tests.published_rows import BRANCH, E12, E36, Flags, Row

BOXES: Flags = {
    "with_box_refine": True,
    "query_pos": "box",
    "dim_feedforward": 2048,
    "dropout": 0.0,
    "logit_eps": 1e-3,
    "giou_eps": 1e-6,
    "cls_loss_coef": 1.0,
    "lr": 1e-4,
    "lr_backbone": 1e-5,
    "lr_linear_proj_mult": 1.0,
    "recipe_batch_size": 16,
}
DAB = BOXES | {"query_scale": True}
DINO = BOXES | {
    "two_stage": True,
    "mixed_selection": True,
    "look_forward_twice": True,
    "decoder_norm": True,
    "share_heads": True,
    "num_queries_one2one": 900,
    "topk": 300,
    "pe_temperature": 20.0,
    "pe_half_cell": False,
    "dn_number": 100,
}
E24: Flags = {"epochs": 24, "lr_drop": 20}
FIVE: Flags = {"num_feature_levels": 5, "return_interm_indices": [0, 1, 2, 3], "batch_size": 1}
SWIN_L: Flags = {"backbone": "swin_large_window12", "drop_path_rate": 0.2, "use_checkpoint": True, "batch_size": 1}

ROWS = {
    "dab_deformable_r50_50ep": Row("48.7", DAB),
    "dino_4scale_r50_12ep": Row("49.0", DINO | E12),
    "dino_4scale_r50_24ep": Row("50.4", DINO | E24),
    "dino_4scale_r50_36ep": Row("50.9", DINO | E36),
    "dino_5scale_r50_12ep": Row("49.4", DINO | E12 | FIVE),
    "dino_5scale_r50_24ep": Row("51.3", DINO | E24 | FIVE),
    "dino_5scale_r50_36ep": Row("51.2", DINO | E36 | FIVE),
    "dino_4scale_swin_large_12ep": Row("56.8", DINO | E12 | SWIN_L),
    "dino_4scale_swin_large_36ep": Row("58.0", DINO | E36 | SWIN_L),
    "dino_5scale_swin_large_12ep": Row("57.3", DINO | E12 | FIVE | SWIN_L),
    "dino_5scale_swin_large_36ep": Row("58.5", DINO | E36 | FIVE | SWIN_L),
    "h_dino_4scale_r50_12ep": Row("", DINO | E12 | BRANCH),
    "soft_dino_4scale_r50_12ep": Row("", DINO | E12 | {"matcher": "soft"}),
    "co_dab_k1_r50_50ep": Row("", DAB | {"aux_heads": ["atss"]}),
}

DAB_DINO = {f"dab_dino/{name}": row for name, row in ROWS.items()}
