"""Compare an exported file with the model it was made of: same images in, same detections out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as pictures

from datasets.decode import decode_rgb
from datasets.transforms import resized_hw
from models import proposals
from util import dist
from util.errors import UserError

BOX_LIMIT = 0.5  # pixels
SCORE_LIMIT = 1e-3
TIE = 1e-5  # scores closer than this may change places

Found = tuple[Tensor, Tensor, Tensor]  # boxes (B, K, 4), scores (B, K), labels (B, K)


@dataclass
class Comparison:
    """Largest differences of one case."""

    case: str
    box: float = 0.0  # pixels
    score: float = 0.0
    labels: int = 0  # detections whose label differs
    tied: int = 0  # detections at the lowest kept score that another one of the same score replaces
    moved: int = 0  # proposals of another rank
    gap: float = 0.0  # largest difference between scores of proposals that changed places

    @property
    def passed(self) -> bool:
        """Whether all differences are below the limits; NaN is not."""
        return self.box < BOX_LIMIT and self.score < SCORE_LIMIT and not self.labels and self.gap < SCORE_LIMIT


class OnnxFile:
    """Runs a file with onnxruntime on the CPU. `orders`: ranked proposals of the last call, one tensor per ranking."""

    def __init__(self, path: Path) -> None:
        import onnx
        import onnxruntime

        model = onnx.load(str(path))
        refuse_foreign(onnx_operators(model), path)
        # The last TopK makes the detections. The others rank proposals; their indices become outputs here only.
        ranked = [node.output[1] for node in model.graph.node if node.op_type == "TopK"][:-1]
        for name in ranked:
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, None))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
        providers = ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)
        self.orders: list[Tensor] = []

    def __call__(self, images: Tensor, sizes: Tensor) -> Found:
        """Return the detections; see `models.exported` for the shapes."""
        outputs = self.session.run(None, {"images": images.numpy(), "sizes": sizes.numpy()})
        boxes, scores, labels, *self.orders = (torch.from_numpy(value) for value in outputs)
        return boxes, scores, labels


class TorchFile:
    """Runs a file of torch.export node by node; otherwise as `OnnxFile`."""

    def __init__(self, path: Path) -> None:
        program = torch.export.load(str(path))
        refuse_foreign([str(node.target) for node in program.graph.nodes if node.op == "call_function"], path)
        self.interpreter = _Recorder(program.module())
        self.orders: list[Tensor] = []

    def __call__(self, images: Tensor, sizes: Tensor) -> Found:
        """Return the detections; see `models.exported` for the shapes."""
        self.interpreter.ranked = []
        with torch.no_grad():
            found = self.interpreter.run(images, sizes)
        self.orders = self.interpreter.ranked[:-1]
        return tuple(found)


class _Recorder(torch.fx.Interpreter):
    ranked: list[Tensor]

    def run_node(self, n: torch.fx.Node):
        result = super().run_node(n)
        if n.target is torch.ops.aten.topk.default:
            self.ranked.append(result[1])
        return result


def onnx_operators(model) -> list[str]:
    """Return `domain::operator` of every node of an ONNX model, those of its functions too."""
    nodes = [node for part in (model.graph, *model.functions) for node in part.node]
    own = {(f.domain, f.name) for f in model.functions}
    return [f"{node.domain}::{node.op_type}" for node in nodes if (node.domain, node.op_type) not in own]


def refuse_foreign(operators: Sequence[str], path: Path) -> None:
    """Raise UserError if a graph holds an operator of ours or one that runtimes compile wrongly."""
    wrong = sorted({name for name in operators if "grid" in name.lower() or not name.startswith(("::", "aten", "<"))})
    wrong = [name for name in wrong if not name.startswith(("_operator", "math"))]
    if wrong:
        raise UserError(
            f"{path} holds {', '.join(wrong)}, which other runtimes do not know or compile wrongly: write the part of "
            "the model that makes it with plain operations where ops.gather.is_portable()"
        )


def check_file(
    path: Path, wrapper: nn.Module, cases: Sequence[tuple[int, int, int]], images: Sequence[str] = ()
) -> list[Comparison]:
    """Compare the file with the model on every case (B, H, W), print a table and return what was found.

    In every batch the first image fills the canvas and the others do not; a batch of one is tried both ways.

    Raises:
        UserError: a difference is above the limits.
    """
    runner = OnnxFile(path) if path.suffix == ".onnx" else TorchFile(path)
    rows = []
    for batch, height, width in cases:
        for full in (True, False) if batch == 1 else (True,):
            pixels, sizes = real(images, batch, height, width) if images else drawn(batch, height, width, full)
            name = f"{batch} x {height} x {width}" + ("" if full and batch == 1 else ", padded")
            rows.append(compare(name, runner, wrapper, pixels, sizes))
    dist.info(table(rows))
    if not all(row.passed for row in rows):
        raise UserError(
            f"{path} does not compute what the model computes: a box is {max(r.box for r in rows):.2g} pixels off "
            f"(limit {BOX_LIMIT}) or a score {max(r.score for r in rows):.1e} (limit {SCORE_LIMIT:g}), or labels differ"
        )
    return rows


def compare(name: str, runner: OnnxFile | TorchFile, wrapper: nn.Module, images: Tensor, sizes: Tensor) -> Comparison:
    """Return how far file and model are apart on one batch.

    Proposals whose scores differ in the last place may be ranked in another order, and the query of a rank then starts
    elsewhere. So the model is given the ranking of the file, and the scores of what changed places are compared.
    """
    row = Comparison(name)
    found = runner(images, sizes)
    with torch.no_grad(), _ranking(runner.orders, row):
        expected = wrapper(images, sizes)
    for ours, theirs in zip(zip(*found), zip(*expected), strict=True):
        _compare_image(row, ours, theirs)
    return row


def _compare_image(row: Comparison, found: Found, expected: Found) -> None:
    """Pair the detections of one image and note the differences in `row`."""
    (boxes, scores, labels), (true_boxes, true_scores, true_labels) = found, expected
    if scores.shape != true_scores.shape or not all(t.isfinite().all() for t in (boxes, scores)):
        row.box = row.score = float("nan")
        return
    box = (boxes[:, None] - true_boxes[None]).abs().amax(-1)
    score = (scores[:, None] - true_scores[None]).abs()
    other = labels[:, None] != true_labels[None]
    first, second = linear_sum_assignment((box / BOX_LIMIT + score / SCORE_LIMIT).double() + 1e6 * other)
    box, score, other = box[first, second], score[first, second], other[first, second]
    last = true_scores[-1] + TIE
    tied = (other | (box >= BOX_LIMIT)) & (scores[first] <= last) & (true_scores[second] <= last)
    kept = ~tied
    row.tied += int(tied.sum())
    row.labels += int((other & kept).sum())
    if kept.any():
        row.box = max(row.box, float(box[kept].max()))
        row.score = max(row.score, float(score[kept].max()))


@contextmanager
def _ranking(orders: Sequence[Tensor], row: Comparison) -> Iterator[None]:
    """Let the model take proposals in the given orders, one per ranking; note in `row` what differs from its own."""
    own, left = proposals.select_top, list(orders)

    def select(scores: Tensor, count: int) -> Tensor:
        index, given = own(scores, count), left.pop(0)
        row.moved += int((index != given).sum())
        both = (scores.gather(1, i).sigmoid() for i in (index, given))
        row.gap = max(row.gap, float(torch.sub(*both).abs().max()))
        return given

    proposals.select_top = select
    try:
        yield
    finally:
        proposals.select_top = own


def drawn(batch: int, height: int, width: int, full: bool) -> tuple[Tensor, Tensor]:
    """Return coloured clouds, (B, 3, H, W) uint8, and sizes; with `full` the first image fills the canvas."""
    generator = torch.Generator().manual_seed(height * width + batch)
    clouds = F.interpolate(torch.rand(batch, 3, 9, 11, generator=generator), (height, width), mode="bicubic")
    clouds = clouds + 0.1 * torch.randn(clouds.shape, generator=generator)
    share = torch.rand(batch, 2, generator=generator) * 0.4 + 0.5
    if full:
        share[0] = 1
    sizes = (share * torch.tensor([height, width])).round().long()
    return (clouds.clamp(0, 1) * 255).to(torch.uint8), sizes


def real(files: Sequence[str], batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the next images of `files`, again from the first when there are too few, fitted into the canvas."""
    pixels, sizes = torch.zeros(batch, 3, height, width, dtype=torch.uint8), []
    for i in range(batch):
        path = Path(files[i % len(files)])
        try:
            image = decode_rgb(path.read_bytes())
        except OSError as error:
            raise UserError(f"--export_images {path}: {error}") from error
        old = image.shape[-2:]
        h, w = resized_hw(*old, min(height, width), max(height, width))
        fit = min(1.0, height / h, width / w)
        h, w = max(1, int(h * fit)), max(1, int(w * fit))
        pixels[i, :, :h, :w] = pictures.resize(image, [h, w], antialias=True)
        sizes.append((h, w))
    return pixels, torch.tensor(sizes)


def table(rows: Sequence[Comparison]) -> str:
    """Return the comparisons as text."""
    lines = [f"{'images x canvas':<26} {'box (px)':>9} {'score':>9} {'labels':>7} {'tied':>5} {'ranks moved':>12}"]
    for row in rows:
        result = "PASS" if row.passed else "FAIL"
        numbers = f"{row.box:>9.2g} {row.score:>9.1e} {row.labels:>7} {row.tied:>5} {row.moved:>12}"
        lines.append(f"{row.case:<26} {numbers}  {result}")
    return "\n".join(lines)
