"""A report on the training and validation sets before a training: `main.py --check_data` with the data flags.

It says what is there, what is wrong with it, and what the loader will do about it. In `--output_dir` it writes

    data_report.json    the same for programs, with all classes
    data_report.png     histograms (needs matplotlib)
    data_targets.png    training samples after augmentation, as the model will see them
"""

from __future__ import annotations

import contextlib
import io
import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from datasets import build_dataset, check_same_categories
from datasets.annotations import read_coco
from datasets.base import DetectionDataset
from datasets.coco import coco_files
from datasets.collate import collate
from datasets.files import ImageFiles
from datasets.samplers import TrainBatchSampler
from util.check_data_files import in_both, look_at_files
from util.check_data_survey import FILE_REFUSED, KEPT, REFUSED, Finding, Survey, look_closer, refused, survey, verdict
from util.dist import info
from util.environment import prepare_output_dir
from util.errors import UserError
from util.visualize import draw_batch, of_target

SMALL, MEDIUM = 32.0, 96.0  # pixels: square roots of COCO's limits of the area
SHOWN_CLASSES = 20


def check_command(args: Namespace) -> int:
    """Run `main.py --check_data`; return 0 if training can start and go through, 1 if not."""
    folder = prepare_output_dir(args.output_dir)
    sets = {part: _survey(part, args) for part in parts_of(args)}
    surveys = {part: one for part, (one, _) in sets.items()}
    built = {part: _build(one, args) for part, one in surveys.items()}
    between = _between(surveys, built, sets)
    for one in surveys.values():
        info("\n".join(report_lines(one)))
    info("\n".join(["", "both sets", *_indented(between)]) if len(surveys) > 1 else "")
    wrong = [f for one in surveys.values() for f in one.findings if f.level == REFUSED]
    wrong += [f for f in between if f.level == REFUSED]
    pictures = _write(folder, surveys, between, built.get("train"), args) if folder else []
    info(f"written: {', '.join(map(str, pictures))}" if folder else "no pictures: there is no --output_dir")
    if wrong:
        info(f"NOT TRAINABLE: {len(wrong)} kind(s) of faults stop the training, marked [{REFUSED}] above")
        return 1
    looked = {"none": "; image files were not looked at", "sizes": "; of image files only the headers were read"}
    info(f"TRAINABLE{looked.get(args.check_images, '') if args.dataset_file == 'coco' else ''}")
    return 0


def parts_of(args: Namespace) -> list[str]:
    """Return which of `train` and `val` the flags name."""
    if args.eval_in_training_set:
        return ["train"]
    named = [part for part in ("train", "val") if getattr(args, f"{part}_json")]
    return named if args.dataset_file == "coco" and named else ["train", "val"]


def _survey(part: str, args: Namespace) -> tuple[Survey, Any]:
    """Return what is in a set, and its files with their lengths: (files, bytes or None), None if it has no files."""
    if args.dataset_file != "coco":
        with _silence():
            dataset = build_dataset(part, args)
        result, files = survey(part, Path(f"{args.dataset_file} {part}"), dataset.ground_truth()), None
    else:
        folder, path, flags = coco_files(part, args)
        try:
            data = read_coco(path, flags[1])
        except UserError as error:
            result = Survey(part, path)
            result.add(REFUSED, "annotation file", [path.name], FILE_REFUSED, str(error))
            return result, None
        result = survey(part, path, data)
        of_folder = ImageFiles(folder, result.entries, path)
        lengths = None
        if args.check_images != "none":
            decode = args.check_images == "decode"
            lengths = look_at_files(result, of_folder, decode=decode, threads=args.num_workers)
        files = of_folder, lengths
    look_closer(result, args.num_queries_one2one, args.topk)
    return result, files


def _build(result: Survey, args: Namespace) -> DetectionDataset | None:
    """Build the set as training does; add what the loader says against it."""
    dataset, error = None, None
    try:
        with _silence():
            dataset = build_dataset(result.part, args)
    except UserError as found:
        error = found
    verdict(result, error)
    return dataset


def _silence() -> contextlib.AbstractContextManager:
    """The loader prints what it mends; the report says it in full."""
    return contextlib.redirect_stdout(io.StringIO())


def _between(surveys: dict[str, Survey], built: dict[str, Any], sets: dict[str, Any]) -> list[Finding]:
    """Return what is wrong with the two sets together."""
    if len(surveys) < 2:
        return []
    train, val = surveys["train"], surveys["val"]
    both = Survey("both", train.source)
    pair = [built[p] or _classes(surveys[p]) for p in ("train", "val")]
    if train.categories and val.categories:
        try:
            check_same_categories(*pair)
        except UserError as error:
            mine, other = (set(one.categories.items()) for one in (train, val))
            odd = [f"{number} {name}" for number, name in sorted(mine ^ other)]
            both.add(REFUSED, "categories that are not the same in both files", odd, FILE_REFUSED, str(error))
    used = [set(one.category_of[np.unique(one.packed.labels)].tolist()) for one in (train, val)]
    unseen = [f"{number} {val.categories[number]}" for number in sorted(used[1] - used[0])]
    both.add(KEPT, "categories with objects in validation and none in training", unseen, "they cannot be learned")
    if sets["train"][1] and sets["val"][1]:
        (train_files, lengths), (val_files, others) = sets["train"][1], sets["val"][1]
        same = in_both(train_files, val_files, None if lengths is None else (lengths, others))
        action = "they are trained on and evaluated: AP comes out too high; take them out of one of the files"
        both.add(KEPT, "images that are in both sets", same, action)
    return both.findings


def _classes(result: Survey) -> SimpleNamespace:
    """Stands for a set that the loader refuses, as far as categories go."""
    names = result.categories
    return SimpleNamespace(category_ids=list(names), class_names=list(names.values()))


# ---- what is said ----


def summary(result: Survey) -> dict[str, Any]:
    """Return the numbers of a set: counts, and per class; sides and roots of areas in pixels of the files."""
    targets = result.targets()
    labels, image_of = result.packed.labels[targets], result.image_of[targets]
    roots = np.sqrt(np.maximum(result.packed.areas[targets], 0))
    per_image = np.bincount(image_of, minlength=len(result.image_ids))
    classes = np.bincount(labels, minlength=len(result.categories))
    pairs = np.unique(np.column_stack([labels, image_of]), axis=0)[:, 0] if len(labels) else labels
    images_of = np.bincount(pairs, minlength=len(result.categories))
    return {
        "images": len(result.image_ids),
        "empty_images": int((per_image == 0).sum()),
        "annotations": result.annotations,
        "targets": len(labels),
        "crowd_regions": result.crowd,
        "sizes": {
            "small": int((roots < SMALL).sum()),
            "medium": int(((roots >= SMALL) & (roots < MEDIUM)).sum()),
            "large": int((roots >= MEDIUM).sum()),
        },
        "root_of_area": _spread(roots),
        "objects_per_image": _spread(per_image),
        "fullest_image": result.image_ids[int(per_image.argmax())] if len(per_image) else None,
        "image_height": _spread(result.sizes[:, 0]),
        "image_width": _spread(result.sizes[:, 1]),
        "classes": [
            {"id": number, "name": name, "objects": int(classes[k]), "images": int(images_of[k])}
            for k, (number, name) in enumerate(result.categories.items())
        ],
    }


def _spread(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    low, middle, high = (float(v) for v in np.percentile(values, [5, 50, 95]))
    ends = {"least": float(values.min()), "most": float(values.max()), "mean": float(values.mean())}
    return {key: round(v, 2) for key, v in {**ends, "p5": low, "median": middle, "p95": high}.items()}


def report_lines(result: Survey) -> list[str]:
    """Return the report on one set as text."""
    lines = ["", f"{result.part}: {result.source}"]
    if not result.image_ids:
        return [*lines, *_indented(result.findings)]
    n = summary(result)
    sizes, roots, many = n["sizes"], n["root_of_area"], n["objects_per_image"]
    high, wide = n["image_height"], n["image_width"]
    lines.append(
        f"  {n['images']} images, {n['empty_images']} of them without objects; width {wide['least']:g} to "
        f"{wide['most']:g}, height {high['least']:g} to {high['most']:g} pixels"
        + " (0: not known)"
        * (wide["least"] == 0)
    )
    lines.append(
        f"  {n['annotations']} annotations: {n['targets']} objects to train on or evaluate, {n['crowd_regions']} crowd "
        "regions"
    )
    lines.append(
        f"  objects per image: mean {many['mean']:g}, median {many['median']:g}, most {many['most']:g} (image id "
        f"{n['fullest_image']})"
    )
    if roots:
        lines.append(
            f"  sizes by COCO's limits: {sizes['small']} small, {sizes['medium']} medium, {sizes['large']} large; root "
            f"of the area {roots['least']:g} to {roots['most']:g} pixels, median {roots['median']:g}"
        )
    ranked = sorted(n["classes"], key=lambda c: -c["objects"])
    shown = [f"{c['name']} {c['objects']}" for c in ranked[:SHOWN_CLASSES]]
    rest = f", and {len(ranked) - SHOWN_CLASSES} more down to {ranked[-1]['objects']}" if ranked[SHOWN_CLASSES:] else ""
    lines.append(f"  objects of {len(ranked)} classes: {', '.join(shown)}{rest}")
    return [*lines, *_indented(result.findings)]


def _indented(findings: list[Finding]) -> list[str]:
    ordered = sorted(findings, key=lambda f: ("refused", "mended", "kept").index(f.level))
    return [f"  {line}" for finding in ordered for line in finding.lines()] or ["  nothing odd"]


# ---- what is written ----


def _write(
    folder: Path, surveys: dict[str, Survey], between: list[Finding], train: DetectionDataset | None, args: Namespace
) -> list[Path]:
    """Write the report and the pictures; return the files."""
    found = {part: {**summary(one), "findings": [vars(f) for f in one.findings]} for part, one in surveys.items()}
    everything = [*between, *(f for one in surveys.values() for f in one.findings)]
    report = {"trainable": not refused(everything), "sets": found, "between": [vars(f) for f in between]}
    paths = [folder / "data_report.json"]
    paths[0].write_text(json.dumps(report, indent=1) + "\n")
    try:
        from util.check_data_plot import draw_histograms

        numbers = {part: one for part, one in surveys.items() if one.image_ids}
        if numbers:
            paths.append(draw_histograms(numbers, args.num_queries_one2one, folder / "data_report.png"))
    except UserError as error:
        info(f"no histograms: {error}")
    if train is not None and args.check_samples:
        paths += draw_samples(train, args.check_samples, args.seed, folder / "data_targets.png")
    return paths


def draw_samples(dataset: DetectionDataset, count: int, seed: int, path: Path) -> list[Path]:
    """Draw the first samples of the first epoch as the model will see them; return the file, none without a sample.

    Images that cannot be loaded are left out.
    """
    sampler = TrainBatchSampler(dataset, batch_size=1, seed=seed)
    sampler.set_epoch(0)
    samples = []
    for index in sampler.order():
        if len(samples) == count:
            break
        with contextlib.suppress(UserError):
            samples.append(dataset[index])
    if not samples:
        return []
    images, targets = collate(samples)
    boxes = [of_target(target, dataset.class_names) for target in targets]
    titles = [
        f"image {t.image_id}, {len(t)} object{'' if len(t) == 1 else 's'}, {t.size[1]} x {t.size[0]}" for t in targets
    ]
    return [draw_batch(images, [(titles, boxes)], path)]
