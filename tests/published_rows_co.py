"""The tables of Co-DETR, row by row, as in `published_rows`: written by hand from the paper and the model lists.

Deformable-DETR++ is H-DETR's baseline with tricks. Tables 2, 8 to 10, 12 and 13 are on Deformable-DETR as published:
one stage, no refinement, FFN 1024, dropout 0.1, a total batch of 32.
"""

from __future__ import annotations

from tests.published_rows import E12, E36, HYBRID, TRICKS, Flags, Row

CO: Flags = {"category_ids": "contiguous", "clip_boxes": True, "antialias": False}
PLUS = TRICKS | CO | E12
HEADS: dict[int, Flags] = {0: {}, 1: {"aux_heads": ["atss"]}, 2: {"aux_heads": ["atss", "faster_rcnn"]}}
K0_12, K1_12, K0_36, K1_36 = (CO | epochs | HEADS[k] for epochs in (E12, E36) for k in (0, 1))


def evaluation(file: str) -> Flags:
    return {"eval": True, "resume": file}


def trained(preset: str) -> Flags:
    return evaluation(f"exps/co_detr/{preset}/checkpoint.pth")


def swin(backbone: str, drop_path: float) -> Flags:
    return PLUS | {"backbone": backbone, "drop_path_rate": drop_path, "weight_decay": 0.05}


# 12 epochs, then 36.
SWIN = {
    "swin_tiny_12ep": swin("swin_tiny", 0.2),
    "swin_small_12ep": swin("swin_small", 0.2),
    "swin_base_12ep": swin("swin_base_window12", 0.2),
    "swin_large_12ep": swin("swin_large_window12", 0.3),
    "swin_tiny_36ep": swin("swin_tiny", 0.3) | E36,
    "swin_small_36ep": swin("swin_small", 0.4) | E36,
    "swin_base_36ep": swin("swin_base_window12", 0.4) | E36,
    "swin_large_900q_36ep": swin("swin_large_window12", 0.6) | E36 | {"num_queries_one2one": 900},
}


def models() -> dict[str, Row]:
    """Table 3, the published models, the authors' files, and models on and beside H-Deformable-DETR."""
    rows = {
        "k0_r50_12ep": Row("47.1", PLUS),
        "k1_r50_12ep": Row("48.7", PLUS | HEADS[1]),
        "k2_r50_12ep": Row("49.5", PLUS | HEADS[2]),
        "k0_swin_tiny_12ep": Row("49.8", SWIN["swin_tiny_12ep"]),
        "k0_swin_base_12ep": Row("54.0", SWIN["swin_base_12ep"]),
        "k0_swin_large_12ep": Row("55.2", SWIN["swin_large_12ep"]),
        "co_h_k1_r50_12ep": Row("49.2", HYBRID | CO | E12 | HEADS[1]),
        "co_h_k2_r50_12ep": Row("49.7", HYBRID | CO | E12 | HEADS[2]),
        "group_detr_r50_36ep": Row(
            "44.6", K0_36 | {"num_queries_one2many": 600, "k_one2many": 2, "one2many_groups": "isolated"}
        ),
    }
    aps = {  # K = 1 and K = 2
        "swin_tiny_12ep": ("51.6", "51.7"),
        "swin_small_12ep": ("53.4", "53.4"),
        "swin_base_12ep": ("55.2", "55.5"),
        "swin_large_12ep": ("56.4", "56.9"),
        "swin_tiny_36ep": ("53.9", "54.1"),
        "swin_small_36ep": ("55.0", "55.3"),
        "swin_base_36ep": ("57.0", "57.5"),
        "swin_large_900q_36ep": ("58.1", "58.3"),
    }
    for name, pair in aps.items():
        for k, ap in zip((1, 2), pair, strict=True):
            rows[f"k{k}_{name}"] = Row(ap, SWIN[name] | HEADS[k])
    for k, ap in ((1, "58.3"), (2, "58.5")):
        name = f"k{k}_swin_large_900q_36ep"
        rows[f"{name}_top300"] = Row(ap, rows[name].flags | {"topk": 300} | trained(name))
    return rows | files(rows)


def files(rows: dict[str, Row]) -> dict[str, Row]:
    """Files of the authors, all with K = 2; `rows` has the models."""
    aps = {  # name of the authors, ours, AP
        "r50_1x": ("r50_12ep", "49.5"),
        "swin_tiny_1x": ("swin_tiny_12ep", "51.7"),
        "swin_small_1x": ("swin_small_12ep", "53.4"),
        "swin_base_1x": ("swin_base_12ep", "55.5"),
        "swin_large_1x": ("swin_large_12ep", "56.9"),
        "swin_tiny_3x": ("swin_tiny_36ep", "54.1"),
        "swin_small_3x": ("swin_small_36ep", "55.3"),
        "swin_base_3x": ("swin_base_36ep", "57.5"),
        "swin_large_900q_3x": ("swin_large_900q_36ep", "58.5"),
    }
    result = {}
    for theirs, (ours, ap) in aps.items():
        kept = {"topk": 300} if "900q" in theirs else {}
        file = f"data/co_detr/co_deformable_detr_{theirs}_coco.pth"
        result[f"published/{ours}"] = Row(ap, rows[f"k2_{ours}"].flags | kept | evaluation(file))
    return result


def strong_tables() -> dict[str, Row]:
    """Tables 7 and 11: Deformable-DETR++, ResNet-50, 12 epochs."""
    rows = {
        "table7/atss": Row("48.7", PLUS | {"aux_heads": ["atss"]}),
        "table7/atss_paa": Row("49.0", PLUS | {"aux_heads": ["atss", "paa"]}),
        "table7/atss_faster_rcnn": Row("49.5", PLUS | {"aux_heads": ["atss", "faster_rcnn"]}),
        "table7/atss_faster_rcnn_paa": Row("49.5", PLUS | {"aux_heads": ["atss", "faster_rcnn", "paa"]}),
        "table7/six": Row("48.9", PLUS | {"aux_heads": "atss faster_rcnn paa retinanet fcos gfl".split()}),
        "table7/two_atss": Row("49.2", PLUS | {"aux_heads": ["atss"] * 2}),
        "table7/six_atss": Row("49.5", PLUS | {"aux_heads": ["atss"] * 6}),
    }
    evaluated = [(0, "detr", "47.1"), (1, "detr", "48.7"), (2, "detr", "49.5")]
    evaluated += [(1, "atss", "47.4"), (2, "atss", "48.0"), (2, "faster_rcnn", "46.7")]
    for k, part, ap in evaluated:
        head = {} if part == "detr" else {"eval_head": part}
        rows[f"table11/k{k}_{part}"] = Row(ap, PLUS | HEADS[k] | trained(f"k{k}_r50_12ep") | head)
    return rows


def plain_tables() -> dict[str, Row]:
    """Tables 2, 8 to 10, 12 and 13: Deformable-DETR, ResNet-50."""
    rows = {
        "table2/k0_12ep": Row("37.1", K0_12),
        "table2/k1_12ep": Row("42.3", K1_12),
        "table2/k2_12ep": Row("42.9", K0_12 | HEADS[2]),
        "table2/k0_36ep": Row("43.3", K0_36),
        "table2/k1_36ep": Row("46.8", K1_36),
        "table2/k2_36ep": Row("46.5", K0_36 | HEADS[2]),
        "table8/none": Row("43.3", K0_36),
        "table9/neither": Row("37.1", K0_12),
        "table9/head": Row("41.6", K1_12 | {"lambda1": 0.0}),
        "table9/queries": Row("40.5", K1_12 | {"lambda2": 0.0}),
        "table9/both": Row("42.3", K1_12),
        "table10/k1_36ep": Row("46.8", K1_36),
        "table10/k0_50ep": Row("44.5", CO | {"epochs": 50, "lr_drop": 40}),
        "table10/k0_100ep": Row("46.0", CO | {"epochs": 100, "lr_drop": 80}),
        "table10/k0_150ep": Row("45.9", CO | {"epochs": 150, "lr_drop": 120}),
    }
    heads = {"retinanet": "46.1", "faster_rcnn": "46.3", "fcos": "46.5", "paa": "46.5", "gfl": "46.5", "atss": "46.8"}
    for head, ap in heads.items():
        rows[f"table8/{head}"] = Row(ap, K0_36 | {"aux_heads": [head]})
    for convs, ap in enumerate("41.8 42.3 41.9 42.1 42.3 42.0".split()):
        rows[f"table12/convs{convs}"] = Row(ap, K1_12 | {"aux_convs": convs})
    for weight, ap in {"0.25": "46.2", "0.5": "46.6", "1": "46.8", "2": "46.1"}.items():
        rows[f"table13/lambda1_{weight}"] = Row(ap, K1_36 | {"lambda1": float(weight)})
    for weight, ap in {"1": "46.1", "2": "46.8", "3": "46.5", "4": "46.3"}.items():
        rows[f"table13/lambda2_{weight}"] = Row(ap, K1_36 | {"lambda2": float(weight)})
    return rows


CO_DETR = {f"co_detr/{name}": row for name, row in (models() | strong_tables() | plain_tables()).items()}
