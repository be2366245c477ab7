"""Write the tables of README.md's section on speed from the figures that `util/benchmark.py all` measured.

python util/benchmark.py readme                      from every folder of configs/speed
python util/benchmark.py readme FOLDER [FOLDER ...]  from these, one for each machine, in this order
python util/benchmark.py readme --check              change nothing; exit status 1 if README.md says something else

Only what stands between the two markers is written, and nothing in it by hand: a benchmark whose file is missing has no
rows. A folder may hold more than is shown: decoders, half precision and uniform locations with one thread, the layer
of an encoder, and matching of trained predictions only, so that the tables can be read.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from util.bench_all import ROOT, commands
from util.bench_common import markdown_table, ratio
from util.errors import UserError

BEGIN, END = "<!-- speed: begin -->", "<!-- speed: end -->"
FOLDERS = ROOT / "configs" / "speed"
HEAD = ["command", "what", "plain way", "ours", "times as fast (spread)"]
PARTS = {"forward": "forward", "criterion": "losses", "matching": "of it matching", "backward": "backward"}
PARTS |= {"update": "optimiser"}
STEP_HEAD = ["preset", "images/s", "ms a step (spread)", "against the first", *PARTS.values(), "attention"]
STEP_HEAD += ["memory, GiB"]
SHAPES = {"enc800": "encoder of 800 x 1333 pixels", "dec300": "decoder, 300 queries", "dec900": "decoder, 900 queries"}
DTYPES = {"fp32": "", "bf16": ", bfloat16", "fp16": ", float16", "fp64": ", float64"}
KERNELS = {"cpu avx512": "AVX-512", "cpu avx2": "AVX2", "cpu portable": "portable C++", "cuda": "CUDA"}
MEMORY = {
    "cpu": "kept for the backward pass, parameters and gradients",
    "cuda": "the peak of what PyTorch allocates",
}

Record = dict[str, Any]  # a file of `util.bench_all.digest`
Cells = tuple[str, str, str]  # what, plain way, ours


def short(value: float) -> str:
    """Return a number with as many digits as a reader needs: 1048, 25.8, 1.26, 0.051."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 2 else f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def spread(values: Sequence[float], write: Callable[[float], str] = short) -> str:
    """Return median, least and most as "40.7 (39.1 to 41.2)"."""
    middle, least, most = (write(value) for value in values)
    return f"{middle} ({least} to {most})"


def percent(share: float) -> str:
    """Return a share; a small one with one more digit."""
    return f"{share:.1%}" if share < 0.01 else f"{share:.0%}"


def read_folder(folder: Path) -> list[Record]:
    """Return the figures of a folder in the order of the table of commands.

    Raises:
        UserError: there are none, they are of a `--quick` run, of several machines or devices, or no figures at all.
    """
    found: list[Record] = []
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text())
            machine, device = record["machine"], record["device"]
            facts = (machine["processor"], machine["gpu"], record["versions"]["torch"], device)
            found.append({**record, "path": path, "facts": facts})
            quick = record["quick"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no file of `util/benchmark.py all` ({error!r}); move it away") from error
        if quick:
            raise UserError(f"{path} was measured with --quick, which only tries things out; measure without it")
        if facts != (first := found[0]["facts"]):
            raise UserError(
                f"{path} was measured on {facts}, {found[0]['path'].name} on {first} (processor, GPU, torch, device): "
                "one folder for each machine; measure with --again, or into another folder"
            )
    if not found:
        raise UserError(f"{folder} holds no figures; measure them: python util/benchmark.py all --output {folder}")
    order = list(commands(found[0]["device"]))
    return sorted(found, key=lambda own: order.index(own["name"]) if own["name"] in order else len(order))


def about(folder: Path, records: Sequence[Record]) -> str:
    """Return what a folder was measured with: hardware, versions, dates."""
    first = min(records, key=lambda own: own["date"])
    machine, versions = first["machine"], dict(first["versions"])
    on = f"{machine['processor']}, {machine['cores']} cores"
    if first["device"] == "cuda":  # figures of a processor are not of the GPU beside it
        on = f"{machine['gpu']}, CUDA {versions.pop('cuda', 'unknown')} (host: {on})"
    names = ", ".join(f"{name} {value}" for name, value in sorted(versions.items(), key=lambda own: own[0] != "torch"))
    days = sorted({own["date"].split()[0] for own in records})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    commits = sorted({own["git"][:7] for own in records if own["git"] != "unknown"})
    code = f", commit {', '.join(commits)}" if commits else ""
    load = "" if machine["load"] is None else f", load {machine['load']:.1f} before the first"
    path = folder.resolve()
    shown = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else folder.as_posix()
    return wrapped(f"**{on}**; {names}; {when}{load}{code}; figures in `{shown}`")


def wrapped(text: str) -> str:
    """Return a paragraph in lines of the README's length."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def is_shown(figure: dict[str, Any]) -> bool:
    """Return whether a figure is one that the README quotes; the docstring of this module tells which."""
    case = figure["case"]
    if figure["kind"] == "matching":
        return case["name"].endswith("trained")
    if figure["kind"] not in ("operator", "layer"):
        return True
    usual = case["dtype"] == "fp32" and case.get("dist", "model") == "model"
    if not case["shape"].startswith("enc"):
        return figure["kind"] == "operator" and usual and case["threads"] < 2
    return usual or case["threads"] < 2


def operator_cells(figure: dict[str, Any]) -> Cells:
    """Return the cells of the operator or, with it, of the layer."""
    case, (plain, *_), (ours, *_) = figure["case"], figure["plain"], figure["ours"]
    details = f"{DTYPES[case['dtype']]}{f', batch {n}' if (n := case['batch']) > 1 else ''}"
    details += f", {n} threads" if (n := case["threads"]) > 1 else ""
    details += ", sampling anywhere" if case.get("dist") == "uniform" else ""
    what = f"{SHAPES[case['shape']]}{details}, {case['mode'].replace('+', ' and ')}"
    if figure["kind"] == "operator":
        return f"deformable attention, {what}", f"grid_sample: {short(plain)} ms", _ours(figure, ours)
    before, after = (round(kept / 2**20) for kept in figure["kept"])
    if case["mode"] != "forward" and before != after:
        what += f" (keeps {after} in place of {before} MiB)"
    return f"the whole layer, {what}", f"not fused: {short(plain)} ms", f"fused: {short(ours)} ms"


def _ours(figure: dict[str, Any], ms: float) -> str:
    return f"{short(ms)} ms ({KERNELS.get(figure['way'], figure['way'])})"


def matching_cells(figure: dict[str, Any]) -> Cells:
    """Return the cells of a step's matching or of the solver alone."""
    case, (plain, *_), (ours, *_) = figure["case"], figure["plain"], figure["ours"]
    what, _, sizes = case["name"].rpartition(",")[0].partition(": ")
    if what == "solver":
        return f"the solver alone, {case['batch']} times {sizes}", f"SciPy: {short(plain)} ms", f"{short(ours)} ms"
    what = f"matching, batch {case['batch']}, {case['layers']} layers, {sizes}"
    return what, f"all pairs, SciPy: {short(plain)} ms", f"{short(ours)} ms"


def loader_cells(figure: dict[str, Any]) -> Cells:
    """Return the cells of the loader, as images per second of one core."""
    case, (plain, *_), (ours, *_) = figure["case"], figure["plain"], figure["ours"]
    images = f"JPEGs of {case['data']}" if case["data"] else "640 x 480 JPEG"
    what = f"{images}, training augmentation, one core"
    return what, f"PIL: {short(1000 / plain)} images/s", f"{short(1000 / ours)} images/s"


def eval_cells(figure: dict[str, Any]) -> Cells:
    """Return the cells of a package for COCO's numbers, in seconds of the processor."""
    case, (plain, *_), (ours, *_) = figure["case"], figure["plain"], figure["ours"]
    what = f"evaluation, {case['images']} images, {case['images'] * case['detections']:,} detections, processor time"
    return what, f"pycocotools: {short(plain)} s", f"{figure['way']}: {short(ours)} s"


CELLS: dict[str, Callable[[dict[str, Any]], Cells]] = {
    "operator": operator_cells,
    "layer": operator_cells,
    "matching": matching_cells,
    "loader": loader_cells,
    "eval": eval_cells,
}


def comparisons(records: Sequence[Record]) -> list[str]:
    """Return the table of plain and own ways, nothing where there is none; a command stands before its first row."""
    rows = []
    for record in records:
        command, last = f"`{record['command']}`", ""
        for figure in record["figures"]:
            if figure["kind"] in CELLS and is_shown(figure):
                what, *ways = CELLS[figure["kind"]](figure)
                case, pass_, rest = what.partition(", forward")
                what = f"the same{pass_}{rest}" if pass_ and case == last else what
                rows.append([command, what, *ways, spread(figure["times_as_fast"])])
                command, last = "", case
    return [markdown_table([HEAD, *rows])] if rows else []


def steps(records: Sequence[Record]) -> list[str]:
    """Return captions and tables of whole steps; what differs only in the presets, one a process, is one table."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        if any(figure["kind"] == "step" for figure in record["figures"]):
            without = re.sub(r" --presets( [^-\s]\S*)+", " --presets PRESET", record["command"])
            groups.setdefault(without, []).append(record)
    found = []
    for without, group in groups.items():
        command = without if len(group) > 1 else group[0]["command"]
        figures = [figure for record in group for figure in record["figures"]]
        case = figures[0]["case"]
        found.append(
            wrapped(
                f"Whole training steps, `{command}`: random images with {case['objects']} objects; medians of "
                f"{case['repeats']}; memory: {MEMORY[case['device']]}"
            )
        )
        found.append(markdown_table([STEP_HEAD, *(step_row(figure, figures[0]) for figure in figures)]))
    return found


def step_row(figure: dict[str, Any], first: dict[str, Any]) -> list[str]:
    """Return the row of a preset, with its time against the `first` one of the table."""
    case, ms, step = figure["case"], figure["ms"], figure["step"][0]
    return [
        f"`{' '.join([case['preset'], *case['way'].split()])}`",
        f"{1000 * case['batch'] / step:.2f}",
        spread(figure["step"], lambda value: f"{value:.0f}"),
        ratio(step, first["step"][0]),
        *(percent(ms[part] / step) for part in PARTS),
        percent(figure["attention"]),
        f"{figure['memory'] / 2**30:.2f}",
    ]


def section(folders: Sequence[Path]) -> str:
    """Return what belongs between the markers.

    Raises:
        UserError: see `read_folder`.
    """
    blocks = []
    for folder in folders:
        records = read_folder(folder)
        blocks += [about(folder, records), *comparisons(records), *steps(records)]
    return "\n\n".join(blocks)


def filled(text: str, content: str, name: str) -> str:
    """Return `text` with `content` between the markers.

    Raises:
        UserError: the file called `name` does not have both markers, once and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(f"{name}: {BEGIN} and, below it, {END} must each stand there once, on lines of their own")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{content}\n{END}{rest.partition(END)[2]}"


def get_parser() -> argparse.ArgumentParser:
    """Return the flags of this command."""
    parser = argparse.ArgumentParser(prog="util/benchmark.py readme", description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="figures of one machine; none: all configs/speed")
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if something would change")
    parser.add_argument("--file", default=str(ROOT / "README.md"), help="file with the markers, default README.md")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 1 if `--check` finds a difference, 2 after a mistake of the user."""
    own = get_parser().parse_args(argv)
    file = Path(own.file)
    try:
        folders = [Path(name) for name in own.folders] or sorted(path for path in FOLDERS.glob("*") if path.is_dir())
        if not folders:
            raise UserError("there are no figures in configs/speed; measure: python util/benchmark.py all --help")
        before = file.read_text()
        after = filled(before, section(folders), file.name)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not own.check:
        file.write_text(after)
        print(f"{file}: {'nothing changed' if after == before else 'written'}")
        return 0
    changes = difflib.unified_diff(before.splitlines(), after.splitlines(), file.name, "the figures", "", "", 0, "")
    print("\n".join(changes) or f"{file} holds what the figures say")
    return int(after != before)


if __name__ == "__main__":
    sys.exit(main())
