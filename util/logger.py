"""Numbers of a run: averages over an epoch, progress lines, `log.txt` and TensorBoard."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from util import dist
from util.structures import LossReport

T = TypeVar("T")
# What a progress line shows; log.txt has everything.
SHOWN = ("loss", "class_error", "loss_ce", "loss_bbox", "loss_giou", "grad_norm")


class Meters:
    """Averages of device scalars, fetched from the device only when somebody reads them.

    A step costs one `stack` and one addition on the device; the weights of losses are multiplied on the host.
    """

    def __init__(self) -> None:
        self.weights: dict[str, float] = {}
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        # Per set of names: on the device the sums, with what was counted there at the end; counted on the host.
        self._pending: dict[tuple[str, ...], tuple[Tensor, int]] = {}
        self.recent: dict[str, float] = {}

    def update(self, values: Mapping[str, Tensor], keep: bool | Tensor = True) -> None:
        """Add one value per name; scalars on one device, not synchronised.

        Args:
            keep: False: they do not count. A boolean scalar on the device decides there.
        """
        if keep is False:
            return
        names = tuple(values)
        vector = torch.stack([v.detach().float().reshape(()) for v in values.values()])
        counted = vector.new_zeros(1) if keep is True else keep.to(vector).reshape(1)
        if keep is not True:
            vector = torch.where(keep, vector, 0.0)
        vector = torch.cat([vector, counted])
        total, count = self._pending.get(names, (None, 0))
        self._pending[names] = (vector if total is None else total + vector, count + (keep is True))

    def update_losses(self, report: LossReport, keep: bool | Tensor = True) -> None:
        """Add a step: the total as `loss` and every term as `*_unscaled`; `averages` derives the weighted terms."""
        self.weights = {**self.weights, **report.weights}
        terms = {f"{name}_unscaled": value for name, value in report.terms.items()}
        self.update({"loss": report.total, **terms}, keep)

    def flush(self) -> None:
        """Fetch what was added since the last time; `recent` holds its averages."""
        recent: dict[str, list[float]] = {}
        for names, (total, on_host) in self._pending.items():
            *values, on_device = total.tolist()
            count = on_host + round(on_device)
            for name, value in zip(names, values) if count else ():
                self.sums[name] = self.sums.get(name, 0.0) + value
                self.counts[name] = self.counts.get(name, 0) + count
                seen = recent.setdefault(name, [0.0, 0])
                seen[0] += value
                seen[1] += count
        if recent:
            self.recent = self._with_weighted(recent)
        self._pending.clear()

    def averages(self) -> dict[str, float]:
        """Return the averages over everything so far in this process.

        Keys are the family's: `loss`, `class_error`, every weighted term, every term as `*_unscaled`, and the others.
        """
        self.flush()
        return self._with_weighted({name: (self.sums[name], self.counts[name]) for name in self.sums})

    def global_averages(self) -> dict[str, float]:
        """Return the averages over all processes; a collective."""
        self.flush()
        sums: dict[str, list[float]] = {}
        for own_sums, own_counts in dist.gather_objects((self.sums, self.counts)):
            for name, value in own_sums.items():
                entry = sums.setdefault(name, [0.0, 0])
                entry[0] += value
                entry[1] += own_counts[name]
        return self._with_weighted(sums)

    def _with_weighted(self, sums: Mapping[str, Sequence[float]]) -> dict[str, float]:
        plain = {name: value / count for name, (value, count) in sums.items()}
        shown = {"class_error": 1.0, **self.weights}
        weighted = {n: w * plain[f"{n}_unscaled"] for n, w in shown.items() if f"{n}_unscaled" in plain}
        first = {"loss": plain.pop("loss")} if "loss" in plain else {}
        return {**first, **weighted, **plain}

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers, so that a run resumed inside an epoch logs the whole epoch."""
        self.flush()
        return {"weights": dict(self.weights), "sums": dict(self.sums), "counts": dict(self.counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue an average."""
        self.weights, self.sums, self.counts = (dict(state[name]) for name in ("weights", "sums", "counts"))


class Progress:
    """Iterates over batches and prints a line with remaining time now and then, main process only.

    Args:
        header: beginning of every line.
        total: number of batches of a whole pass.
        start: number of batches already done.
        print_freq: batches between lines; the last one always gets a line.
    """

    def __init__(self, header: str, total: int, *, start: int = 0, print_freq: int = 10) -> None:
        self.header, self.total, self.start, self.print_freq = header, total, start, print_freq
        self.data_seconds = 0.0
        self.seconds = 0.0

    def over(self, batches: Iterable[T], meters: Meters, extra: Mapping[str, Any] | None = None) -> Iterator[T]:
        """Yield the batches.

        Args:
            meters: shown in the line and fetched from the device when a line is due.
            extra: further entries of the line, read when it is printed.
        """
        began = last_line = time.time()
        data_since_line, batches = 0.0, iter(batches)
        done = last_done = self.start
        while True:
            before = time.time()
            try:
                batch = next(batches)
            except StopIteration:
                break
            data_since_line += time.time() - before
            yield batch
            done += 1
            if (done - 1) % self.print_freq == 0 or done == self.total:
                meters.flush()
                now, fresh = time.time(), done - last_done
                times = ((now - last_line) / fresh, data_since_line / fresh)
                remaining = (now - began) / (done - self.start) * (self.total - done)
                dist.info(self._line(done, remaining, times, meters, extra or {}))
                self.data_seconds += data_since_line
                last_line, last_done, data_since_line = now, done, 0.0
        self.seconds = time.time() - began

    def _line(
        self, done: int, remaining: float, times: tuple[float, float], meters: Meters, extra: Mapping[str, Any]
    ) -> str:
        width = len(str(self.total))
        parts = [f"{self.header} [{done:{width}d}/{self.total}]", f"eta: {timedelta(seconds=int(remaining))}"]
        parts += [f"{name}: {value() if callable(value) else value}" for name, value in extra.items()]
        averages = meters.averages()
        parts += [f"{n}: {meters.recent[n]:.4f} ({averages[n]:.4f})" for n in SHOWN if n in meters.recent]
        parts += [f"time: {times[0]:.3f}", f"data: {times[1]:.3f}"]
        if torch.cuda.is_available():
            parts.append(f"max mem: {max_memory_mb():.0f}")
        return "  ".join(parts)


def max_memory_mb() -> float:
    """Return the peak of allocated GPU memory in MiB since the last reset, 0 without a GPU."""
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0


class RunLog:
    """`log.txt`: one JSON object per epoch; and TensorBoard when it is installed. Silent outside the main process.

    Args:
        output_dir: where; None writes nothing.
        tensorboard: also write event files.
    """

    def __init__(self, output_dir: Path | None, *, tensorboard: bool = True) -> None:
        active = output_dir is not None and dist.is_main()
        self.path = output_dir / "log.txt" if active else None
        self.board = _open_board(output_dir) if active and tensorboard else None

    def entries(self) -> list[dict[str, Any]]:
        """Return what is in the file, in every process; a line cut off by a killed run is left out."""
        found = []
        if self.path is not None and self.path.is_file():
            for line in self.path.read_text().splitlines():
                with suppress(json.JSONDecodeError):
                    found.append(json.loads(line))
        return dist.gather_objects(found)[0]

    def write(self, entry: dict[str, Any]) -> None:
        """Append the line of one epoch."""
        if self.path is None:
            return
        cut = self.path.is_file() and not self.path.read_bytes().endswith(b"\n") and self.path.stat().st_size > 0
        with self.path.open("a") as file:
            file.write(("\n" if cut else "") + json.dumps(entry) + "\n")
        if self.board is not None:
            for name, value in entry.items():
                if isinstance(value, (int, float)):
                    self.board.add_scalar(name.replace("_", "/", 1), value, entry["epoch"])
                elif name.endswith("coco_eval_bbox"):
                    self.board.add_scalar(name.replace("_", "/", 1) + "_AP", value[0], entry["epoch"])
            self.board.flush()

    def close(self) -> None:
        """Close the event files."""
        if self.board is not None:
            self.board.close()


def _open_board(output_dir: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        dist.info("TensorBoard is not installed: log.txt only (pip install tensorboard)")
        return None
    return SummaryWriter(str(output_dir / "tensorboard"))
