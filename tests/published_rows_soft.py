"""The presets of "Beyond Hungarian", row by row, as in `published_rows`: written by hand from what is on record of it.

Only the paper's table has numbers. On record of its two ablations is which value is best; the other rows are ours. All
are on Deformable-DETR as published (ResNet-50, a total batch of 32), with 20 epochs.
"""

from __future__ import annotations

from tests.published_rows import Flags, Row

E20: Flags = {"epochs": 20, "lr_drop": 16}
TWO_STAGE = E20 | {"with_box_refine": True, "two_stage": True}
LITERAL = E20 | {"matcher": "soft-literal"}
SOFT = E20 | {"matcher": "soft"}


def paper() -> dict[str, Row]:
    """The table of the paper and its ablations of the loss weight and of the normalisation."""
    rows = {"baseline_r50_20ep": Row("25.4", E20), "match_free_r50_20ep": Row("26.1", LITERAL)}
    for weight in ("0.5", "1", "2"):
        rows[f"table_weight/corr{weight}"] = Row("", LITERAL | {"corr_loss_coef": float(weight)})
    for norm in ("row", "column", "global"):
        rows[f"table_norm/{norm}"] = Row("", LITERAL | {"soft_norm": norm})
    return rows


def variants() -> dict[str, Row]:
    """What the paper's two rows are compared with, with learned queries and with two stages."""
    flags = {
        "variants/cost_greedy": E20 | {"matcher": "cost-greedy"},
        "variants/soft": SOFT,
        "variants/soft_rounds": SOFT | {"scg": "rounds"},
        "variants/soft_switch": SOFT | {"scg_switch": 0.7},
        "variants/soft_literal_nobg": LITERAL | {"soft_background": False},
        "two_stage/hungarian": TWO_STAGE,
        "two_stage/cost_greedy": TWO_STAGE | {"matcher": "cost-greedy"},
        "two_stage/soft_literal": TWO_STAGE | {"matcher": "soft-literal"},
        "two_stage/soft": TWO_STAGE | {"matcher": "soft"},
    }
    return {name: Row("", row) for name, row in flags.items()}


def ablations() -> dict[str, Row]:
    """Rows that change one thing of `soft`, whose own value is `variants/soft`; `corr*` change `grad_probe_query`.

    The weight of the correspondence loss matters only where that loss trains more than the probe.
    """
    changes: dict[str, Flags] = {
        "logits_dot": {"probe_logits": "dot"},
        "scale10": {"logit_scale_max": 10.0},
        "scale100": {"logit_scale_max": 100.0},
        "competition_none": {"column_competition": "none"},
        "competition_center": {"column_competition": "center"},
        "competition_sinkhorn": {"column_competition": "sinkhorn"},
        "scg_rowpeak": {"scg": "rowpeak"},
        "scg_mutual": {"scg": "mutual"},
        "rho0.25": {"scg_rho": 0.25},
        "rho0.75": {"scg_rho": 0.75},
        "rho0.9": {"scg_rho": 0.9},
        "warmup_none": {"soft_warmup": "none"},
        "warmup_teacher": {"soft_warmup": "teacher"},
        "key_box_off": {"key_box": False},
        "code_raw": {"box_code": "raw"},
        "target_hard": {"cls_target": "hard"},
        "target_quality": {"cls_target": "quality"},
        "background_off": {"soft_background": False},
        "grad_probe_query": {"corr_grad": "probe+query"},
        "grad_full": {"corr_grad": "full"},
        "corr0.5": {"corr_grad": "probe+query", "corr_loss_coef": 0.5},
        "corr2": {"corr_grad": "probe+query", "corr_loss_coef": 2.0},
        "norm_column": {"soft_norm": "column"},
        "norm_global": {"soft_norm": "global"},
        "extra_layers5": {"soft_extra_layers": 5},
    }
    return {f"ablations/{name}": Row("", SOFT | change) for name, change in changes.items()}


MATCH_FREE = {f"match_free/{name}": row for name, row in (paper() | variants() | ablations()).items()}
