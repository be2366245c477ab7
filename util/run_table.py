"""The last numbers of several runs as one table; runs that are called alike but for their seed share a row.

python -m util.run_table exps/matchers/*                              AP, AP75, by size, and the measures of matchers
python -m util.run_table exps/matchers/* --columns AP nms/AP agree    those only

A run is the `--output_dir` of a training. Folders called NAME_seed1, NAME_seed2 ... are the row NAME; only these names
are looked at, not the flags of the runs. A column is a number of the last line of `log.txt` without its `test_` (`AP`,
`agree`, `loss_ce`), or FOLDER/NUMBER for one of an evaluation that was written into a folder of the run: with
`--eval --nms_iou 0.7 --output_dir RUN/nms`, `nms/AP`. Columns without any value are left out.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from util.bench_common import markdown_table
from util.errors import UserError
from util.plot import read_log

COLUMNS = tuple("AP AP75 APs APm APl nms/AP distinct unassigned agree regret dup flip".split())
COLUMNS += ("agree_small", "regret_small", "c_max", "pos_per_gt")
PERCENT = re.compile(r"(^|/)(AP|AR)")  # shown times 100
NONE = "-"


def number(run: Path, column: str) -> float | None:
    """Return a number of a run, None if it was not measured or stands for "no such object" (-1).

    Raises:
        UserError: the run has no `log.txt`.
    """
    folder, _, name = column.rpartition("/")
    if folder:
        path = run / folder / "eval" / "stats.json"
        entry = json.loads(path.read_text()) if path.is_file() else {}
    else:
        entry, name = read_log(run)[-1], f"test_{name}"
    value = entry.get(name, entry.get(f"{name}_unscaled"))
    return None if value is None or (PERCENT.search(column) and value < 0) else value


def rows(runs: Sequence[Path]) -> dict[str, list[Path]]:
    """Return the runs by the name of their row, seeds in ascending order.

    Raises:
        UserError: two folders have the same row and seed.
    """
    found: dict[str, list[tuple[int, Path]]] = {}
    for run in runs:
        match = re.fullmatch(r"(.+?)_seed(\d+)", run.resolve().name)
        name, seed = (match[1], int(match[2])) if match else (run.resolve().name, 0)
        own = found.setdefault(name, [])
        if twin := next((other for taken, other in own if taken == seed), None):
            raise UserError(
                f"{twin} and {run} are both the row {name}, seed {seed}: give one of them, or rename a folder"
            )
        own.append((seed, run))
    return {name: [run for _, run in sorted(own)] for name, own in found.items()}


def table(runs: Sequence[Path], columns: Sequence[str]) -> str:
    """Return a markdown table: mean over the runs of a row and, behind it, each of them; no columns without numbers."""
    by_row = rows(runs)
    values = {(row, c): [number(run, c) for run in own] for row, own in by_row.items() for c in columns}
    shown = [c for c in columns if any(v is not None for row in by_row for v in values[row, c])]
    lines = [["", *(c.replace("nms/AP", "AP with NMS") for c in shown)]]
    lines += [[name, *(_cell(values[name, column], column) for column in shown)] for name in by_row]
    return markdown_table(lines)


def _cell(values: Sequence[float | None], column: str) -> str:
    if all(value is None for value in values):
        return NONE
    scale, digits = (100, 1) if PERCENT.search(column) else (1, 3)
    single = [NONE if value is None else f"{scale * value:.{digits}f}" for value in values]
    if len(values) == 1:
        return single[0]
    average = mean(value for value in values if value is not None)
    return f"{scale * average:.{digits}f} ({', '.join(single)})"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 2 after a mistake of the user."""
    parser = argparse.ArgumentParser("python -m util.run_table", description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--columns", nargs="+", default=COLUMNS, help="numbers, those without any value are left out")
    parser.add_argument("--output", type=Path, help="markdown file for the table")
    args = parser.parse_args(argv)
    try:
        text = table(args.runs, args.columns)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text + "\n")
        print(f"the table is in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
