"""From predictions to detections: clipping and soft-NMS. Plain NMS is tested with its study."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.postprocess import PostProcessor, soft_nms
from util.boxes import inverse_sigmoid

# Corners of 10 x 10 boxes in a row; IoU of neighbours: 9/11, of the first and the last: 8/12.
ROW = [[0.0, 0.0, 10.0, 10.0], [1.0, 0.0, 11.0, 10.0], [2.0, 0.0, 12.0, 10.0]]


def take(scores: list[float], labels: list[int], boxes: list[list[float]], iou: float, steps: int = 10):
    """Return the scores and the numbers of what soft-NMS takes of one image."""
    found, order = soft_nms(torch.tensor([scores]), torch.tensor([labels]), torch.tensor([boxes]), iou, steps)
    return found[0].tolist(), order[0].tolist()


def test_overlapping_scores_are_multiplied_by_one_minus_iou_for_each_better_detection() -> None:
    scores, order = take([0.9, 0.8, 0.6], [0, 0, 0], ROW, 0.5)
    # After the first: 0.8 * 2/11 = 0.1455 and 0.6 * 4/12 = 0.2, which is taken next; 0.1455 * 2/11 remains.
    assert order == [0, 2, 1]
    assert scores == pytest.approx([0.9, 0.2, 0.8 * (2 / 11) ** 2], rel=1e-4)


def test_boxes_below_the_iou_and_of_other_classes_keep_their_scores() -> None:
    # Between 8/12 and 9/11 the outer two do not meet: 0.9 and 0.6 stay, the middle one is softened twice.
    scores, order = take([0.9, 0.8, 0.6], [0, 0, 0], ROW, 0.7)
    assert (scores, order) == (pytest.approx([0.9, 0.6, 0.8 * (2 / 11) ** 2]), [0, 2, 1])
    scores, order = take([0.9, 0.8, 0.6], [0, 0, 0], ROW, 0.9)
    assert (scores, order) == (pytest.approx([0.9, 0.8, 0.6]), [0, 1, 2])
    scores, order = take([0.6, 0.8, 0.9], [0, 1, 2], ROW, 0.5)
    assert (scores, order) == (pytest.approx([0.9, 0.8, 0.6]), [2, 1, 0])


def test_an_iou_that_equals_the_threshold_counts_as_overlap() -> None:
    halves = [[0.0, 0.0, 2.0, 1.0], [0.0, 0.0, 1.0, 1.0]]
    assert take([0.9, 0.8], [0, 0], halves, 0.5)[0] == pytest.approx([0.9, 0.4])


def test_soft_nms_takes_as_many_as_asked_for() -> None:
    assert take([0.9, 0.8, 0.6], [0, 0, 0], ROW, 0.5, steps=2)[1] == [0, 2]


def test_a_box_without_area_is_taken_once() -> None:
    points = [[3.0, 3.0, 3.0, 3.0], [3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 9.0, 9.0]]
    assert take([0.9, 0.8, 0.6], [0, 0, 0], points, 0.5) == (pytest.approx([0.9, 0.8, 0.6]), [0, 1, 2])


def predictions(scores: list[list[float]], corners: list[list[float]]) -> tuple[Tensor, Tensor]:
    """Return logits (1, Q, C) and boxes (1, Q, 4) in an image of 100 x 100."""
    x0, y0, x1, y1 = (torch.tensor(corners) / 100).unbind(-1)
    return inverse_sigmoid(torch.tensor([scores])), torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], -1)[
        None
    ]


def test_images_of_a_batch_keep_different_numbers_of_detections() -> None:
    logits, boxes = predictions([[0.9], [0.8]], [ROW[0], ROW[0]])
    apart = predictions([[0.7], [0.6]], [ROW[0], [50.0, 50.0, 60.0, 60.0]])
    both = torch.cat([logits, apart[0]]), torch.cat([boxes, apart[1]])
    found = PostProcessor(soft_nms_iou=0.8).select(*both, [(100, 100), (200, 100)], [7, 8])
    assert [f.scores.tolist() for f in found] == [pytest.approx([0.9]), pytest.approx([0.7, 0.6])]
    assert [f.image_id for f in found] == [7, 8]
    torch.testing.assert_close(found[1].boxes_px, torch.tensor([[0.0, 0.0, 10.0, 20.0], [50.0, 100.0, 60.0, 120.0]]))


def test_as_many_pairs_as_queries_take_part_in_soft_nms() -> None:
    logits, boxes = predictions([[0.9, 0.8], [0.7, 0.6]], [ROW[0], [50.0, 50.0, 60.0, 60.0]])
    (found,) = PostProcessor(soft_nms_iou=0.8).select(logits, boxes, [(100, 100)], [0])
    assert found.scores.tolist() == pytest.approx([0.9, 0.8])  # four (query, class) pairs, two queries
    assert found.labels.tolist() == [0, 1]


def test_scores_below_one_thousandth_are_dropped_after_soft_nms_only() -> None:
    logits, boxes = predictions([[0.9], [0.0009]], [ROW[0], [50.0, 50.0, 60.0, 60.0]])
    (plain,) = PostProcessor().select(logits, boxes, [(100, 100)], [0])
    (soft,) = PostProcessor(soft_nms_iou=0.8).select(logits, boxes, [(100, 100)], [0])
    assert (len(plain.scores), len(soft.scores)) == (2, 1)


def test_soft_nms_returns_at_most_topk_and_the_best_after_softening() -> None:
    far = [50.0, 50.0, 60.0, 60.0]
    logits, boxes = predictions([[0.9], [0.8], [0.3]], [ROW[0], ROW[1], far])
    (found,) = PostProcessor(2, soft_nms_iou=0.8).select(logits, boxes, [(100, 100)], [0])
    assert found.scores.tolist() == pytest.approx([0.9, 0.3])
    torch.testing.assert_close(found.boxes_px[1], torch.tensor(far))


def test_boxes_are_clipped_on_request_only() -> None:
    logits, boxes = predictions([[0.9]], [[-5.0, 10.0, 105.0, 130.0]])
    sizes = [(200, 50)]  # height and width of the file
    (whole,) = PostProcessor().select(logits, boxes, sizes, [0])
    (clipped,) = PostProcessor(clip=True).select(logits, boxes, sizes, [0])
    torch.testing.assert_close(whole.boxes_px, torch.tensor([[-2.5, 20.0, 52.5, 260.0]]))
    torch.testing.assert_close(clipped.boxes_px, torch.tensor([[0.0, 20.0, 50.0, 200.0]]))


@pytest.mark.parametrize("setting", [{"nms_iou": 0.9}, {"soft_nms_iou": 0.9}])
def test_overlap_is_that_of_the_clipped_boxes(setting: dict[str, float]) -> None:
    # The same inside the image; outside of it one is twice as wide.
    logits, boxes = predictions([[0.9], [0.8]], [[0.0, 0.0, 10.0, 10.0], [-10.0, 0.0, 10.0, 10.0]])
    for clip, count in ((False, 2), (True, 1)):
        (found,) = PostProcessor(clip=clip, **setting).select(logits, boxes, [(100, 100)], [0])
        assert len(found.scores) == count


def test_both_kinds_of_nms_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match=r"not both: got nms_iou=0\.7 and soft_nms_iou=0\.8"):
        PostProcessor(nms_iou=0.7, soft_nms_iou=0.8)
