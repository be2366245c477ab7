"""The model of a checkpoint and its flags, so that whoever uses a file need not know how it was trained."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Container, Mapping
from typing import Any

from torch import Tensor, nn

from models import build_detector
from util import dist
from util.arg_rules import check_args
from util.args import get_args_parser
from util.checkpoint import load_weights, native_weights, stored_args
from util.errors import UserError
from util.misfit import describe
from util.told_flags import DETECTION, spelt

# What a published file has to say at least; names and shapes of its weights say the rest.
NEEDED = ("nheads", "enc_layers", "dec_layers", "hidden_dim")
# Flags that mean the same in published files, under their names there.
PUBLISHED = {
    **{name: name for name in ("nheads", "enc_n_points", "dec_n_points", "dilation", "position_embedding_scale")},
    **{name: name for name in ("num_queries_one2one", "num_queries_one2many", "num_patterns", "return_interm_indices")},
    "num_queries": "num_queries_one2one",
    "look_forward_twice": "look_forward_twice",
    "num_select": "topk",  # DINO, DAB
}
# Facts of the weights that are flags of the same name.
OF_WEIGHTS = (
    "two_stage with_box_refine mixed_selection query_pos query_scale decoder_norm hidden_dim num_feature_levels "
    "dim_feedforward enc_layers dec_layers num_classes backbone position_embedding"
).split()
# Flags without which the weights do not fit or mean something else: if a file says them, the command line cannot.
MODEL_FLAGS = (
    *OF_WEIGHTS,
    *("nheads", "enc_n_points", "dec_n_points", "dilation", "position_embedding_scale", "pe_temperature"),
    *("pe_half_cell", "num_queries_one2one", "num_patterns", "return_interm_indices", "backbone_norm", "logit_eps"),
)


def flags_of(content: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Namespace | None:
    """Return the flags that a model for the file is built with, all others at their defaults.

    Our files say them all. Published ones of Deformable-DETR, H-DETR, DAB-Deformable-DETR and DINO hold arguments of
    their own: those that mean the same are taken, and the rest is read from names and shapes of the weights.

    Args:
        content: of a checkpoint.
        weights: the weights in it under our names.

    Returns:
        None if the file does not say enough.
    """
    stored, flags = stored_args(content), vars(get_args_parser().parse_args([]))
    if "format" in content:
        return Namespace(**flags | {name: value for name, value in stored.items() if name in flags}) if stored else None
    if not all(name in stored for name in NEEDED):
        return None
    facts = describe(weights)
    if facts["queries"] is not None:
        flags["num_queries_one2one"] = facts["queries"]
    flags |= {ours: stored[name] for name, ours in PUBLISHED.items() if stored.get(name) is not None}
    flags |= {name: facts[name] for name in OF_WEIGHTS if facts[name] is not None}
    if facts["query_pos"] == "box":
        flags["logit_eps"] = 1e-3
    if facts["query_pos"] == "box" and facts["two_stage"]:  # files of DAB hold such a number too, and do not use it
        flags |= {"pe_temperature": stored.get("pe_temperatureH", 20), "pe_half_cell": False}
    return Namespace(**flags)


def with_flags_of(args: Namespace, given: Container[str], content: Mapping[str, Any], name: str) -> Namespace:
    """Return `args` with those flags of the detector that were not given as the checkpoint `name` has them.

    So `--eval --resume FILE` needs none of them. What was given stays: where it does not fit, loading says so. Says
    which flags it took. The number of classes is left to the data.

    Args:
        given: names of the flags that stand on the command line.
        content: of the checkpoint.

    Raises:
        UserError: a given flag cannot be combined with those of the file.
    """
    flags = flags_of(content, native_weights(content, name))
    if flags is None:
        return args
    wanted = dict.fromkeys((*MODEL_FLAGS, *DETECTION))  # in this order, each once
    del wanted["num_classes"]
    now = vars(args)
    taken = {flag: getattr(flags, flag) for flag in wanted if flag not in given and getattr(flags, flag) != now[flag]}
    if taken:
        dist.info(f"from {name}: {' '.join(spelt(flag, value) for flag, value in taken.items())}")
    args = Namespace(**now | taken)
    check_args(args)
    return args


def build_trained(
    content: Mapping[str, Any], name: str, flags: Namespace, *, averaged: bool = False
) -> tuple[nn.Module, Namespace, list[str]]:
    """Return the detector of a checkpoint on the CPU, without the parts that only training needs.

    Args:
        content: of the checkpoint `name`.
        flags: of the model.
        averaged: take the averaged weights.

    Returns:
        the detector, the flags that it was built with, and what there is to say about its weights.

    Raises:
        UserError: the weights do not fit, or there are no averaged ones.
    """
    if averaged and not isinstance(content.get("ema"), Mapping):
        raise UserError(f"{name} holds no averaged weights; leave --use_ema (averaged=True) out")
    weights = native_weights(content["ema"]["model"] if averaged else content, name)
    # Nothing is downloaded: the file fills the backbone.
    fixed = {"eval": True, "backbone_weights": "checkpoint", "pretrained_backbone_path": ""}
    fixed["plot_assignment"] = 0  # else an evaluation has the queries of training too, which stripped files lack
    flags = Namespace(**{**vars(flags), **fixed})
    flags.num_classes = flags.num_classes or describe(weights)["num_classes"]
    model = build_detector(flags)
    report = load_weights(model, dict(content) | {"model": weights}, name=name)
    return model.eval(), flags, report.lines
