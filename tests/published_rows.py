"""The tables of the papers, row by row: what a row changes against the defaults of the parser, and its AP.

Written by hand from the papers and the published model lists, independent of the preset files (batch 2 per process).
"""

from __future__ import annotations

from typing import Any, NamedTuple

Flags = dict[str, Any]


class Row(NamedTuple):
    """Published AP, as the preset's header gives it (empty: the table has none), and the flags of the row."""

    ap: str
    flags: Flags


E12: Flags = {"epochs": 12, "lr_drop": 11}
E36: Flags = {"epochs": 36, "lr_drop": 30}
BASELINE: Flags = {
    "with_box_refine": True,
    "two_stage": True,
    "dim_feedforward": 2048,
    "num_queries_one2many": 0,
    "k_one2many": 0,
    "recipe_batch_size": 16,
}
TRICKS = BASELINE | {"dropout": 0.0, "mixed_selection": True, "look_forward_twice": True}
BRANCH: Flags = {"num_queries_one2many": 1500, "k_one2many": 6, "lambda_one2many": 1.0}
HYBRID = TRICKS | BRANCH
SWIN_L_900: Flags = {"backbone": "swin_large", "num_queries_one2one": 900}


def evaluation(preset: str) -> Flags:
    return {"eval": True, "resume": f"exps/h_detr/{preset}/checkpoint.pth"}


DEFORMABLE_DETR = {
    "single_scale": Row("39.4", {"num_feature_levels": 1}),
    "single_scale_dc5": Row("41.5", {"num_feature_levels": 1, "dilation": True}),
    "r50": Row("44.5", {}),
    "refine": Row("46.2", {"with_box_refine": True}),
    "two_stage": Row("46.9", {"with_box_refine": True, "two_stage": True}),
}


def h_detr_models() -> dict[str, Row]:
    """Table 1 and the published models: three kinds, three backbones, 12 and 36 epochs; then what is beyond that."""
    aps = {  # 12 and 36 epochs
        ("baseline", "r50"): ("43.7", "46.8"),
        ("baseline", "swin_tiny"): ("45.3 and 46.0", "49.0 and 49.6"),
        ("baseline", "swin_large"): ("51.0", "53.7"),
        ("tricks", "r50"): ("47.0", "49.0"),
        ("tricks", "swin_tiny"): ("49.3", "51.8"),
        ("tricks", "swin_large"): ("54.5", "56.3"),
        ("hybrid", "r50"): ("48.7", "50.0"),
        ("hybrid", "swin_tiny"): ("50.6", "53.2"),
        ("hybrid", "swin_large"): ("55.9", "57.1"),
    }
    kinds = {"baseline": BASELINE, "tricks": TRICKS, "hybrid": HYBRID}
    rows = {}
    for (kind, name), (short, long) in aps.items():
        flags = kinds[kind] | {"backbone": {"r50": "resnet50"}.get(name, name)}
        rows[f"{kind}_{name}_12ep"] = Row(short, flags | E12)
        rows[f"{kind}_{name}_36ep"] = Row(long, flags | E36 | ({"drop_path_rate": 0.5} if "large" in name else {}))
    large = "hybrid_swin_large_900q_36ep"
    rows["hybrid_swin_large_900q_12ep"] = Row("56.1", HYBRID | E12 | SWIN_L_900)
    rows[large] = Row("57.4", HYBRID | E36 | SWIN_L_900 | {"drop_path_rate": 0.5})
    for name, ap in {"hybrid_swin_tiny_12ep": "51.2", "hybrid_swin_tiny_36ep": "53.7", large: "57.8"}.items():
        rows[f"{name}_decay0.05"] = Row(ap, rows[name].flags | {"weight_decay": 0.05})
    for name, ap in {large: "57.6", f"{large}_decay0.05": "57.9"}.items():
        rows[f"{name}_top300"] = Row(ap, rows[name].flags | {"topk": 300} | evaluation(name))
    return rows


def h_detr_tables() -> dict[str, Row]:
    """Tables 6 to 10, 12, 13 and 16: ResNet-50, 12 epochs."""
    many: Flags = {"num_queries_one2one": 1800}
    rows = {
        "table6/baseline": Row("43.7", BASELINE | E12),
        "table6/baseline_1.3x": Row("44.6", BASELINE | {"epochs": 16, "lr_drop": 14}),
        "table6/1800q": Row("44.1", BASELINE | E12 | many),
        "table6/1800q_1.15x": Row("44.5", BASELINE | many | {"epochs": 14, "lr_drop": 13}),
        "table6/branch": Row("45.9", BASELINE | E12 | BRANCH),
        "table6/epoch": Row("45.5", BASELINE | E12 | many | {"hybrid": "epoch", "hybrid_k": 10, "hybrid_rho": 2 / 3}),
        "table6/layer": Row("45.6", BASELINE | E12 | many | {"hybrid": "layer", "hybrid_k": 10, "hybrid_layers": 4}),
        "table7/t0": Row("", TRICKS | E12),
        "table8/1_base": Row("43.3", BASELINE | E12 | {"dim_feedforward": 1024}),
        "table8/2_wide_ffn": Row("43.7", BASELINE | E12),
        "table8/3_zero_dropout": Row("44.3", BASELINE | E12 | {"dropout": 0.0}),
        "table8/4_mixed_selection": Row("46.3", BASELINE | E12 | {"dropout": 0.0, "mixed_selection": True}),
        "table8/5_look_forward_twice": Row("47.0", TRICKS | E12),
        "table8/6_hybrid": Row("48.7", HYBRID | E12),
        "table9/k0": Row("47.0", TRICKS | E12),
    }
    for queries in (300, 600, 900, 1200, 1500):
        rows[f"table7/t{queries}"] = Row("", HYBRID | E12 | {"num_queries_one2many": queries})
    for k, ap in enumerate("46.4 46.7 48.1 48.4 48.3 48.6 48.5 48.6".split(), start=1):
        rows[f"table9/k{k}"] = Row(ap, HYBRID | E12 | {"num_queries_one2many": 300 * k, "k_one2many": k})
    for k, ap in ((1, "47.9"), (6, "")):
        rows[f"table9/k{k}_careful"] = Row(ap, rows[f"table9/k{k}"].flags | {"one2many_proposals": "own"})
    for queries, ap in zip(range(300, 1801, 300), "47.8 48.3 48.4 48.4 48.7 48.6".split(), strict=True):
        rows[f"table10/t{queries}"] = Row(ap, HYBRID | E12 | {"num_queries_one2many": queries})
    own = {"nothing": "48.7", "class": "48.6", "heads": "48.5", "decoder": "48.3", "encoder": "47.3"}
    for part, ap in own.items():
        rows[f"table12/{part}"] = Row(ap, HYBRID | E12 | {"one2many_own": part})
    alone = {"hybrid": "epoch", "hybrid_rho": 1.0, "hybrid_k": 10, "nms_iou": 0.7}
    rows["table13/one2many_only"] = Row("49.4", TRICKS | E12 | many | alone)
    for group, plain, nms in (("one2one", "48.7", "48.7"), ("one2many", "13.5", "48.6")):
        flags = HYBRID | E12 | evaluation("hybrid_r50_12ep") | {"eval_group": group}
        rows[f"table13/{group}"] = Row(plain, flags)
        rows[f"table13/{group}_nms"] = Row(nms, flags | {"nms_iou": 0.7})
    for weight, ap in {"0.1": "47.8", "0.2": "48.0", "0.5": "48.4", "1": "48.7", "2": "48.5", "5": "48.3"}.items():
        rows[f"table16/lambda{weight}"] = Row(ap, HYBRID | E12 | {"lambda_one2many": float(weight)})
    return rows


PUBLISHED: dict[str, Row] = {
    **{f"deformable_detr/{name}": row for name, row in DEFORMABLE_DETR.items()},
    **{f"h_detr/{name}": row for name, row in (h_detr_models() | h_detr_tables()).items()},
}
