"""Assigners by role: from the predictions of all sets of a step to matched pairs."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial

from models.assign.dense import PairCosts
from models.assign.greedy import GreedyMatcher
from models.assign.hungarian import HungarianMatcher, Request
from models.assign.probe import LayerwiseProbe, Probe
from models.assign.soft import LITERAL, SoftMatcher, SoftOptions
from models.parts import num_classes
from util.structures import Assignment, Role

# One call per step with every set that it serves, so that one copy to the host serves them all.
Assigner = Callable[[Sequence[Request]], list[Assignment]]

__all__ = [
    "Assigner",
    "GreedyMatcher",
    "HungarianMatcher",
    "LayerwiseProbe",
    "Probe",
    "Request",
    "SoftMatcher",
    "build_assigners",
    "class_target",
]


def build_assigners(args: Namespace) -> dict[Role, Assigner]:
    """Return who matches decoder queries and who matches encoder proposals; often it is the same."""
    queries = _build(args.matcher, args)
    name = args.enc_matcher or ("hungarian" if args.matcher == "hungarian" else "cost-greedy")
    same = name == args.matcher or (name == "soft" and isinstance(queries, SoftMatcher))
    return {"queries": queries, "proposals": queries if same else _build(name, args)}


def class_target(args: Namespace) -> str:
    """Return the target of the class loss, `--cls_target` or what fits the matcher."""
    if args.matcher == "soft-literal":
        return args.cls_target or "pairwise"
    one_hot = args.matcher != "soft" or args.scg in ("rounds", "mutual")
    return args.cls_target or ("hard" if one_hot else "weight")


def _build(name: str, args: Namespace) -> Assigner:
    weights = {key: getattr(args, f"set_{key}") for key in ("cost_class", "cost_bbox", "cost_giou")}
    weights["giou_eps"] = args.giou_eps
    if name == "hungarian":
        return HungarianMatcher(**weights)
    if name == "cost-greedy":
        return GreedyMatcher(PairCosts(**weights), rounds=_or(args.greedy_rounds, SoftOptions.greedy_rounds))
    literal = name == "soft-literal"
    given = {f.name: getattr(args, f.name) for f in fields(SoftOptions)}
    given["cls_target"] = class_target(args)
    options = replace(
        LITERAL if literal else SoftOptions(), **{key: value for key, value in given.items() if value is not None}
    )
    return SoftMatcher(
        _probe(args, literal),
        PairCosts(**weights, all_classes=_or(args.corr_class, "full" if literal else "match") == "full"),
        options,
        epochs=args.epochs,
        proposals=args.num_queries_one2one,
        teacher=HungarianMatcher(**weights) if options.soft_warmup == "teacher" else None,
    )


def _probe(args: Namespace, literal: bool) -> Probe | LayerwiseProbe:
    """Return one probe for all that is matched softly, or one for every supervised layer of it."""
    make = partial(
        Probe,
        args.hidden_dim,
        num_classes(args),
        logits=_or(args.probe_logits, "dot" if literal else "cosine"),
        scale_max=_or(args.logit_scale_max, 30.0),
        box_code=_or(args.box_code, "raw" if literal else "sine"),
        key_box=_or(args.key_box, not literal),
    )
    if not args.probe_per_layer:
        return make()
    layers = range(0 if args.aux_loss else args.dec_layers - 1, args.dec_layers)
    queries = layers if args.matcher.startswith("soft") else ()
    return LayerwiseProbe(make, queries, proposals=args.enc_matcher == "soft")


def _or(given, otherwise):
    """Return the value of a flag, or what the matcher takes where it was not given."""
    return otherwise if given is None else given
