"""Flags of a matcher that were given and change nothing beside the others: users expect something of what they give."""

from __future__ import annotations

import argparse


def class_target(a: argparse.Namespace) -> str:
    """Return the target of the class loss: what `models.assign.class_target` says, without PyTorch."""
    if a.matcher == "soft-literal":
        return a.cls_target or "pairwise"
    return a.cls_target or ("weight" if a.matcher == "soft" and a.scg not in ("rounds", "mutual") else "hard")


def idle_flags(a: argparse.Namespace) -> dict[str, str]:
    """Return the idle flags by name, each with the reason and the way out.

    Flags of learned matchers where nothing is learned are not among them, except `--corr_loss_coef`.
    """
    return {name: message for name, (idle, message) in (_of_choices(a) | _of_help(a)).items() if idle}


def _of_choices(a: argparse.Namespace) -> dict[str, tuple[bool, str]]:
    """Return which flags about the choice of pairs are idle, and what to say if they are."""
    learned, switched, many = _learned(a), _switches(a), _many_to_one(a)
    layers = a.soft_extra_layers or 0
    soft_rounds = learned and (switched or a.scg == "rounds" or (many and a.scg != "mutual"))
    always_one = a.scg in ("rounds", "mutual") or a.scg_switch == 0
    return {
        "greedy_rounds": (
            a.greedy_rounds is not None and not soft_rounds and not _by_cost(a),
            f"--greedy_rounds {a.greedy_rounds}: "
            + ("--scg mutual has one round" if learned and a.scg == "mutual" else "nobody bids here")
            + f"; add {'--scg rounds' if learned else '--matcher cost-greedy'}",
        ),
        "scg_rho": (
            learned and a.scg_rho is not None and always_one and not many and layers == 0,
            f"--scg_rho {a.scg_rho}: an object gets one query here, there is no share to keep; add --soft_extra_layers "
            "or use --scg colpeak",
        ),
        "scg_switch": (
            a.scg == "rounds" and switched,
            "--scg_switch changes to --scg rounds, which is there from the start: leave out one of them",
        ),
        "soft_extra_layers": _extra_layers(a, layers, switched),
    }


def _extra_layers(a: argparse.Namespace, layers: int, switched: bool) -> tuple[bool, str]:
    flag = f"--soft_extra_layers {layers}"
    if not a.matcher.startswith("soft"):
        return layers > 0 and _learned(a), f"{flag} is about decoder layers, not proposals; add --matcher soft"
    if a.scg == "rowpeak" and not switched:
        return layers > 0, f"{flag}: --scg rowpeak keeps such pairs on every layer; leave it out, or use another --scg"
    return (
        not a.aux_loss and 0 < layers < a.dec_layers,
        f"{flag} ends before the last layer, the only one that is taught; leave out --no_aux_loss",
    )


def _of_help(a: argparse.Namespace) -> dict[str, tuple[bool, str]]:
    """Return the same for flags about warm-ups and the correspondence loss."""
    learned = _learned(a)
    warmup = a.soft_warmup or ("none" if a.matcher == "soft-literal" else "prior")
    return {
        "soft_warmup_share": (
            learned and a.soft_warmup_share is not None and warmup == "none",
            f"--soft_warmup_share {a.soft_warmup_share}: there is no warm-up; add --soft_warmup prior or teacher",
        ),
        "soft_warmup": (
            learned and a.soft_warmup == "teacher" and not a.matcher.startswith("soft"),
            "--soft_warmup teacher teaches decoder queries, not proposals; add --matcher soft or use prior",
        ),
        "corr_loss_coef": (
            not learned and a.corr_loss_coef != 1,
            f"--corr_loss_coef {a.corr_loss_coef}: nothing is learned here; add --matcher soft",
        ),
    }


def _learned(a: argparse.Namespace) -> bool:
    return a.matcher.startswith("soft") or (a.two_stage and a.enc_matcher == "soft")


def _by_cost(a: argparse.Namespace) -> bool:
    """Say whether queries or proposals are matched by `cost-greedy`, the default for the proposals of most matchers."""
    proposals = a.enc_matcher or ("hungarian" if a.matcher == "hungarian" else "cost-greedy")
    return a.matcher == "cost-greedy" or (a.two_stage and proposals == "cost-greedy")


def _switches(a: argparse.Namespace) -> bool:
    return a.scg_switch is not None and a.scg_switch < 1  # 1: never


def _many_to_one(a: argparse.Namespace) -> bool:
    """Say whether a learned matcher may give an object several queries: with rounds first, then by their share."""
    queries = a.matcher.startswith("soft")
    if a.hybrid != "branch" and queries and a.hybrid_k > 1:
        return True
    branch = a.num_queries_one2many > 0 and a.k_one2many > 0
    joint = queries and a.one2many_groups == "joint" and a.k_one2many > 1  # isolated groups are matched one-to-one
    return branch and (joint or (a.enc_matcher == "soft" and a.one2many_proposals == "own"))
