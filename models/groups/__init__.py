"""Training schemes as query groups: *adding a scheme is adding a file here* and a line to `BUILDERS`."""

from __future__ import annotations

from argparse import Namespace

from models.groups.base import Context, GroupSource, visibility
from models.groups.hybrid import OneToMany
from models.groups.matching import OneToOne

__all__ = ["BUILDERS", "Context", "GroupSource", "build_groups", "visibility"]


def _one2one(args: Namespace) -> GroupSource | None:
    return OneToOne(args.num_queries_one2one)


def _one2many(args: Namespace) -> GroupSource | None:
    if args.num_queries_one2many == 0 or args.k_one2many == 0:
        return None
    return OneToMany(args.num_queries_one2many, repeat=args.k_one2many, weight=args.lambda_one2many)


# In the order in which they take ranked queries; a scheme is on when its flags ask for something.
BUILDERS = (_one2one, _one2many)


def build_groups(args: Namespace) -> list[GroupSource]:
    """Return the group sources that the flags ask for."""
    built = [build(args) for build in BUILDERS]
    return [source for source in built if source is not None]
