"""Flags of pictures that show how a detector works: where queries look, and which queries learn which objects."""

from __future__ import annotations

import argparse

ATTENTION = {  # flag -> value that says nothing was given
    "attention_queries": ["top", "3"],
    "attention_layers": [],
    "attention_encoder": [],
    "attention_ids": [],
    "attention_images": [],
    "analyse_images": 4,
}


def add_pictures(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `--analyse attention` and `--plot_assignment`."""
    group = parser.add_argument_group("pictures of attention and assignment")
    group.add_argument(
        "--analyse_images", default=4, type=int, help="--analyse attention: draw so many first images with objects"
    )
    group.add_argument(
        "--attention_ids", nargs="+", default=[], type=int, help="draw the validation images with these ids instead"
    )
    group.add_argument(
        "--attention_images",
        nargs="+",
        default=[],
        metavar="FILE",
        help="draw these image files instead; no data set is read",
    )
    group.add_argument(
        "--attention_queries",
        nargs="+",
        default=list(ATTENTION["attention_queries"]),
        metavar="QUERY",
        help="decoder queries to draw: top N, those of the N best scores of an image; or their numbers, from 0",
    )
    group.add_argument(
        "--attention_layers", nargs="+", default=[], type=int, help="layers to draw, from 1; not given: all"
    )
    group.add_argument(
        "--attention_encoder",
        nargs="+",
        default=[],
        type=float,
        metavar="X Y",
        help="also draw the encoder tokens at these points, x and y in pixels of the image file",
    )
    group.add_argument(
        "--plot_assignment",
        default=0,
        type=int,
        help="after each evaluation draw which queries learn which objects of so many evaluated images, in every layer "
        "and with every training scheme, into OUTPUT_DIR/assignment",
    )


def wanted_queries(words: list[str]) -> tuple[int, tuple[int, ...]]:
    """Return (N, ()) for `top N` and (0, numbers) for numbers of queries.

    Raises:
        ValueError: it is neither.
    """
    if words[0] == "top":
        count = int(words[1]) if len(words) == 2 else 0
        if count < 1:
            raise ValueError("top wants one number, at least 1")
        return count, ()
    numbers = tuple(dict.fromkeys(int(word) for word in words))
    if min(numbers) < 0:
        raise ValueError("numbers of queries begin at 0")
    return 0, numbers


def picture_rules(a: argparse.Namespace) -> list[tuple[bool, str]]:
    """Return what cannot work among these flags, and the ways out."""
    given = [f"--{name}" for name, nothing in ATTENTION.items() if getattr(a, name) != nothing]
    layers = min(a.enc_layers, a.dec_layers) if a.attention_encoder else a.dec_layers
    wrong_layers = [layer for layer in a.attention_layers if not 1 <= layer <= layers]
    return [
        (
            bool(given) and a.analyse != "attention",
            f"{', '.join(given)}: belongs to --analyse attention; add it",
        ),
        (a.analyse_images < 1, f"--analyse_images {a.analyse_images}: must be at least 1"),
        (
            a.analyse == "attention" and bool(a.analyse_label or a.analyse_with),
            "--analyse attention draws no curves: leave out --analyse_label and --analyse_with",
        ),
        (
            bool(a.attention_ids) and bool(a.attention_images),
            "--attention_ids are images of the validation set and --attention_images are files: give one of them",
        ),
        *_query_rules(a),
        (
            bool(wrong_layers),
            f"--attention_layers {' '.join(map(str, wrong_layers))}: layers are 1 to {layers}",
        ),
        (
            len(a.attention_encoder) % 2 == 1,
            f"--attention_encoder got {len(a.attention_encoder)} numbers: give pairs, x and y of each point",
        ),
        (a.plot_assignment < 0, f"--plot_assignment {a.plot_assignment}: must be 0 or more"),
        (
            a.plot_assignment > 0 and not a.output_dir,
            f"--plot_assignment {a.plot_assignment} draws into --output_dir: give one",
        ),
        (
            a.plot_assignment > 0 and bool(a.analyse),
            "--analyse draws no assignments: leave out --plot_assignment, or use --eval",
        ),
    ]


def _query_rules(a: argparse.Namespace) -> list[tuple[bool, str]]:
    """Return the same for `--attention_queries`."""
    try:
        wanted_queries(a.attention_queries)
    except ValueError:
        said = " ".join(a.attention_queries)
        return [(True, f"--attention_queries {said}: say top N, or numbers of queries from 0, as in 4 17 230")]
    return []
