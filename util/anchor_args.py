"""The flags of `main.py` that make queries boxes (DAB, DINO) and add denoising (DINO)."""

from __future__ import annotations

import argparse

SWITCH = argparse.BooleanOptionalAction

# What only denoising, and only queries that are boxes read, and the values that change nothing.
DN_ONLY = {"dn_label_noise_ratio": 0.5, "dn_box_noise_scale": 1.0, "dn_labelbook_size": None, "dn_groups": "published"}
BOX_ONLY = {"query_scale": False, "num_patterns": 0, "random_refpoints_xy": False, "content_init": "xavier"}


def add_anchors(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("queries that are boxes (DAB-DETR, DINO)")
    group.add_argument(
        "--query_pos",
        default="fixed",
        choices=["fixed", "box"],
        help="position of a query in attention. fixed: the same in all layers; box: made of its present box in every "
        "layer (DAB-DETR, section 4). With --two_stage the best proposals by class are these boxes, and only they are "
        "taught, with their classes (DINO, section 3.4)",
    )
    group.add_argument(
        "--query_scale",
        action=SWITCH,
        default=False,
        help="from the second layer on, multiply that position by a function of the content (DAB-DETR)",
    )
    group.add_argument("--num_patterns", default=0, type=int, help="learned contents of every learned box; 0: one")
    group.add_argument(
        "--random_refpoints_xy",
        action=SWITCH,
        default=False,
        help="learned boxes start with centres spread over the image",
    )
    group.add_argument(
        "--content_init",
        default="xavier",
        choices=["xavier", "normal"],
        help="first values of the learned contents of --two_stage: DINO, Co-DINO",
    )
    group.add_argument(
        "--decoder_norm",
        action=SWITCH,
        default=False,
        help="a LayerNorm between every decoder layer and its heads (DINO)",
    )
    group.add_argument(
        "--share_heads", action=SWITCH, default=False, help="one class and one box head for all decoder layers (DINO)"
    )
    group.add_argument(
        "--logit_eps",
        default=1e-5,
        type=float,
        help="clamps boxes before an offset is added to their logits (DAB, DINO: 1e-3)",
    )
    group.add_argument(
        "--giou_eps", default=0.0, type=float, help="added to both denominators of the GIoU (DAB, DINO: 1e-6)"
    )


def add_denoising(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("denoising (DINO, section 3.3)")
    group.add_argument(
        "--dn_number",
        default=0,
        type=int,
        help="positive denoising queries of an image, about (DINO: 100); 0: none. Needs --query_pos box",
    )
    group.add_argument(
        "--dn_label_noise_ratio", default=0.5, type=float, help="twice the share of labels that are drawn anew"
    )
    group.add_argument(
        "--dn_box_noise_scale", default=1.0, type=float, help="largest shift of a positive's corners, in half sides"
    )
    group.add_argument(
        "--dn_labelbook_size",
        type=int,
        help="the table of label embeddings has one row more (default: number of classes)",
    )
    group.add_argument(
        "--dn_groups",
        default="published",
        choices=["published", "divided"],
        help="number of groups: --dn_number divided by the most objects of an image; published: below 50 "
        "twice --dn_number, whatever the images show, as in DINO's code. The losses' divisor over several processes is "
        "the mean of objects times the own groups (published), or the mean of positive queries (divided, Co-DINO)",
    )


def anchor_rules(a: argparse.Namespace) -> list[tuple[bool, str]]:
    """Return what cannot work, as `util.arg_rules.check_args` lists it: (broken, what is wrong and the way out)."""
    boxes = a.query_pos == "box"
    changed = [f"--{n} {getattr(a, n)}" for n, plain in BOX_ONLY.items() if getattr(a, n) != plain]
    idle = [f"--{n} {getattr(a, n)}" for n, plain in DN_ONLY.items() if getattr(a, n) != plain]
    stages = list(a.return_interm_indices or [])
    return [
        (
            bool(changed) and not boxes,
            f"{', '.join(changed)}: for queries that are boxes; add --query_pos box",
        ),
        (boxes and not a.with_box_refine, "--query_pos box needs --with_box_refine: the box of a query is refined"),
        (
            boxes and a.two_stage and (a.num_patterns > 0 or a.random_refpoints_xy),
            "--num_patterns and --random_refpoints_xy are for learned boxes: leave out --two_stage, or them",
        ),
        (a.num_patterns < 0, f"--num_patterns {a.num_patterns}: must be 0 or more"),
        (a.dn_number < 0, f"--dn_number {a.dn_number}: must be 0 or more"),
        (a.dn_number > 0 and not boxes, "--dn_number: noised boxes are queries only with --query_pos box; add it"),
        (
            # A preset of DINO is evaluated with --dn_number 0 where the file has no label embeddings.
            bool(idle) and a.dn_number == 0 and not (a.eval or a.analyse),
            f"{', '.join(idle)}: there is no denoising; add --dn_number",
        ),
        (not 0 <= a.dn_label_noise_ratio <= 2, f"--dn_label_noise_ratio {a.dn_label_noise_ratio}: 0 to 2"),
        (a.dn_box_noise_scale < 0, f"--dn_box_noise_scale {a.dn_box_noise_scale}: must be 0 or more"),
        (
            a.dn_labelbook_size is not None and a.num_classes is not None and a.dn_labelbook_size + 1 < a.num_classes,
            f"--dn_labelbook_size {a.dn_labelbook_size}: a row for each of the {a.num_classes} classes is needed",
        ),
        (not 0 < a.logit_eps < 0.5, f"--logit_eps {a.logit_eps}: must be between 0 and 0.5"),
        (a.giou_eps < 0, f"--giou_eps {a.giou_eps}: must be 0 or more"),
        (a.pe_temperature <= 0, f"--pe_temperature {a.pe_temperature}: must be above 0"),
        (
            stages != sorted(set(stages) & {0, 1, 2, 3}),
            f"--return_interm_indices {stages}: ascending numbers of 0 (stride 4) to 3 (stride 32)",
        ),
        (
            bool(a.aux_heads) and bool(stages) and (stages[-1] != 3 or stages != list(range(stages[0], 4))),
            f"--return_interm_indices {stages}: --aux_heads need all maps up to the last one, 3",
        ),
        (
            a.num_patterns > 0 and a.one2many_groups == "isolated",
            "--num_patterns multiplies the queries, which --one2many_groups isolated cannot cut: leave out one of them",
        ),
        (
            len(stages) > a.num_feature_levels,
            f"--return_interm_indices {stages}: more maps than --num_feature_levels {a.num_feature_levels}",
        ),
    ]
