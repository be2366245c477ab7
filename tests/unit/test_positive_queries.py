"""Customised positive queries of Co-DETR: which boxes they are, how they are embedded and what they are taught."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import sigmoid_focal_loss

from models.aux_heads import sampling
from models.aux_heads.base import Samples
from models.criterion import Criterion
from models.groups.positives import PositiveQueries, choose, choose_all, pairs
from models.losses import box_regression, focal_classification
from models.position_encoding import sine_embed_boxes
from util.structures import DetectorOutput, Predictions, SupervisedSet, Supervision, Target

AB = ("a", "b")  # names of two heads
KINDS = {"p": (True, False), "n": (False, True), "-": (False, False)}  # of a box: positive, negative, neither
SIZES = [(100, 200), (100, 200)]


def head_samples(*images: str, width: int = 2) -> Samples:
    """Return samples with one letter per box; box r has the corners (r, r, r + 10, r + 20) and the feature r, r, ...

    The positives of an image have the objects 0, 1, 0, 1, ...
    """
    kinds = torch.tensor([[KINDS[kind] for kind in image] for image in images], dtype=torch.bool)
    positive, negative = kinds.reshape(len(images), -1, 2).unbind(-1)
    number = torch.arange(positive.shape[1], dtype=torch.float32).expand(len(images), -1)[..., None]
    boxes = number + torch.tensor([0.0, 0.0, 10.0, 20.0])
    target = (positive.cumsum(1) - 1) % 2 * positive
    return Samples(boxes, positive, negative, target, number.repeat(1, 1, width).requires_grad_())


def use_keys(monkeypatch: pytest.MonkeyPatch, *keys: float) -> None:
    monkeypatch.setattr(sampling, "random_keys", lambda shape, device: torch.tensor(keys).expand(shape))


def numbers(boxes: Tensor) -> list[list[int]]:
    """Return which boxes of `head_samples` these are."""
    return boxes[..., 0].int().tolist()


def test_positives_come_in_order_and_random_negatives_fill_up(monkeypatch: pytest.MonkeyPatch) -> None:
    use_keys(monkeypatch, 0.9, 0.8, 0.1, 0.3, 0.4, 0.2)
    chosen = choose(head_samples("pn-pnp", "nnnn-p"), least=1)
    assert numbers(chosen.boxes) == [[0, 3, 5], [5, 2, 3]]
    assert chosen.positive.tolist() == [[True, True, True], [True, False, False]]
    assert chosen.target.tolist() == [[0, 1, 0], [0, 0, 0]]
    assert chosen.features[..., 1].tolist() == [[0.0, 3.0, 5.0], [5.0, 2.0, 3.0]]
    assert (chosen.counts, chosen.padding, chosen.taught) == ([3, 1], None, True)


@pytest.mark.parametrize(
    ("images", "settings", "count"),
    [
        (("pp" + 10 * "n", "p" + 11 * "n"), {}, 9),
        ((12 * "n", 12 * "n"), {}, 9),
        ((11 * "p" + "n", 12 * "n"), {}, 11),
        ((11 * "p" + "n", 12 * "n"), {"limit": 10}, 10),
        ((11 * "p" + "n", 12 * "n"), {"limit": 4}, 9),
        ((11 * "p" + "n", 12 * "n"), {"limit": 4, "least": 2}, 4),
    ],
)
def test_the_number_of_queries_is_that_of_the_most_positives_within_bounds(images, settings, count) -> None:
    chosen = choose(head_samples(*images), **settings)
    assert len(chosen) == count and chosen.taught
    assert chosen.counts == [min(image.count("p"), count) for image in images]


def test_a_random_subset_of_the_positives_is_taken_where_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    use_keys(monkeypatch, 0.5, 0.9, 0.3, 0.1, 0.0)
    chosen = choose(head_samples("pppp-", "nppn-"), least=1, limit=2)
    assert numbers(chosen.boxes) == [[3, 2], [1, 2]]
    assert chosen.target.tolist() == [[1, 0], [0, 1]]
    assert chosen.counts == [2, 2]


def test_every_positive_can_be_in_the_subset() -> None:
    torch.manual_seed(0)
    drawn = {number for _ in range(60) for number in numbers(choose(head_samples("pppp"), least=1, limit=2).boxes)[0]}
    assert drawn == {0, 1, 2, 3}


def test_boxes_may_share_rows_of_the_features_and_the_gradient_reaches_them() -> None:
    samples = head_samples("npnp", width=3)
    samples.features = torch.tensor([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]], requires_grad=True)
    samples.feature_of = torch.tensor([0, 0, 1, 1])
    chosen = choose(samples, least=1)
    assert chosen.features.tolist() == [[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]
    (chosen.features * torch.tensor([1.0, 10.0])[:, None]).sum().backward()
    assert samples.features.grad.tolist() == [[[1.0] * 3, [10.0] * 3]]


class HostReads(TorchFunctionMode):
    """Notes the calls that would wait for a device."""

    WAITS = {"tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"}

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.WAITS:
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


class DataDependent(TorchDispatchMode):
    """Notes the operations whose result has a size that depends on the data, or that read a number."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "repeat_interleave.Tensor", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func is torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        if by_mask or any(name in str(func) for name in self.WAITS):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_host_asks_the_device_once_for_all_heads_of_a_step() -> None:
    heads = {"a": head_samples(6 * "p" + 9 * "n", 15 * "n", width=8), "b": head_samples("-", "-", width=8)}
    queries = PositiveQueries(8, heads=AB, layers=2)
    with HostReads() as reads, DataDependent() as dependent:
        queries(heads, SIZES)
    assert reads.found == ["tolist"]
    assert dependent.found == []


def objects(*counts: int) -> list[Target]:
    """Return images with so many objects: object i has the label i and its centre at 0.1 (i + 1)."""
    result = []
    for image, count in enumerate(counts):
        center = 0.1 * (torch.arange(count)[:, None] + 1.0)
        result.append(
            Target(torch.arange(count), torch.cat([center, center, 0.2 + 0 * center, center], 1), image, (9, 9))
        )
    return result


def test_every_positive_is_paired_with_its_object_on_every_layer() -> None:
    found = pairs(choose(head_samples("ppn", "npn", "nnn"), least=1), 2)
    assert found.layer.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.image.tolist() == [0, 0, 1, 0, 0, 1]
    assert found.slot.tolist() == [0, 1, 0, 0, 1, 0]
    assert found.target.tolist() == [0, 1, 0, 0, 1, 0]
    assert (found.count, found.weight, found.ignore) == (3.0, None, None)


def report(queries: PositiveQueries, samples: Samples, targets: list[Target], *, classes: int = 3, **criterion):
    """Return logits, boxes and losses of made-up predictions, and the group."""
    (group,) = queries({"head": samples}, [(100, 200)] * len(targets))
    torch.manual_seed(3)
    logits = torch.randn(queries.layers, len(targets), len(group), classes, requires_grad=True)
    boxes = (0.2 + 0.6 * torch.rand(queries.layers, len(targets), len(group), 4)).requires_grad_()
    one = torch.zeros(queries.layers, len(targets), 1, classes), torch.full((queries.layers, len(targets), 1, 4), 0.5)
    sets = {
        "one2one": SupervisedSet(Predictions(*one), ()),
        group.name: SupervisedSet(Predictions(logits, boxes, group.padding), group.supervision),
    }
    terms = {"labels": focal_classification, "boxes": box_regression}
    weights = {"loss_ce": 1.0, "loss_bbox": 1.0, "loss_giou": 1.0}
    found = Criterion(assigners={}, terms=terms, weights=weights, **criterion)(DetectorOutput(sets), targets)
    return logits, boxes, found, group


def test_positives_learn_their_objects_and_all_other_queries_background() -> None:
    queries = PositiveQueries(8, heads=["head"], layers=2, weight=3.0, least=3)
    logits, boxes, found, _ = report(queries, head_samples("pnpn", "nnnn", width=8), objects(2, 0))
    for layer, suffix in ((0, "_0_co_head"), (1, "_co_head")):
        target = torch.zeros_like(logits[layer])
        target[0, 0, 0] = target[0, 1, 1] = 1.0
        focal = sigmoid_focal_loss(logits[layer], target, alpha=0.25, gamma=2.0, reduction="sum")
        l1 = (boxes[layer, 0, :2] - objects(2)[0].boxes).abs().sum()
        torch.testing.assert_close(found.terms[f"loss_ce{suffix}"], (3 * focal / 2).detach())
        torch.testing.assert_close(found.terms[f"loss_bbox{suffix}"], (3 * l1 / 2).detach())


def test_only_the_last_layer_is_taught_without_auxiliary_losses() -> None:
    queries = PositiveQueries(8, heads=["head"], layers=2, least=3)
    logits, _, found, _ = report(queries, head_samples("pnpn", width=8), objects(2), aux_loss=False)
    found.total.backward()
    assert logits.grad[0].abs().max() == 0 < logits.grad[1].abs().min()


def test_images_without_any_object_are_background() -> None:
    queries = PositiveQueries(8, heads=["head"], layers=1)
    logits, _, found, group = report(queries, head_samples(9 * "n", 9 * "n", width=8), objects(0, 0))
    focal = sigmoid_focal_loss(logits, torch.zeros_like(logits), alpha=0.25, gamma=2.0, reduction="sum")
    torch.testing.assert_close(found.terms["loss_ce_co_head"], focal.detach())
    assert found.terms["loss_giou_co_head"] == 0
    assert len(group) == 9


@pytest.mark.parametrize("shared_rows", [False, True])
@pytest.mark.parametrize("images", [("pppn---------", "nn" + 11 * "-"), ("pn", "np"), ("-", "-"), ("", "")])
def test_nothing_is_learned_where_an_image_has_too_few_negatives(images, shared_rows) -> None:
    samples = head_samples(*images, width=8)
    if shared_rows:
        samples.feature_of = torch.arange(len(images[0]))
    queries = PositiveQueries(8, heads=["head"], layers=2)
    logits, boxes, found, group = report(queries, samples, objects(2, 1))
    assert group.content.shape == (2, 9, 8)
    assert found.total == 0
    (found.total + 0 * group.content.sum() + 0 * group.pos.sum()).backward()
    assert logits.grad.abs().max() == boxes.grad.abs().max() == 0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in queries.parameters())  # there, and not NaN


def test_enough_negatives_are_just_enough() -> None:
    assert choose(head_samples("pp" + 7 * "n", 9 * "n")).taught
    assert not choose(head_samples("pp" + 6 * "n" + "-", 9 * "n")).taught


def test_masked_slots_are_empty_and_count_nothing() -> None:
    queries = PositiveQueries(8, heads=["head"], layers=1, least=3, fill="masked")
    samples = head_samples("npp-", "----", width=8)
    logits, _, found, group = report(queries, samples, objects(2, 0))
    assert group.padding.tolist() == [[False, False, True], [True, True, True]]
    assert group.reference[0, 2:].abs().sum() == group.reference[1].abs().sum() == 0
    assert all(torch.isfinite(x).all() for x in (group.content, group.pos))
    target = torch.zeros_like(logits[0, 0, :2])
    target[0, 0] = target[1, 1] = 1.0
    focal = sigmoid_focal_loss(logits[0, 0, :2], target, alpha=0.25, gamma=2.0, reduction="sum")
    torch.testing.assert_close(found.terms["loss_ce_co_head"], (focal / 2).detach())
    group.content[..., 0].sum().backward()
    assert samples.features.grad[0, 2].abs().max() > 0 == samples.features.grad[1].abs().max()


def test_content_and_position_follow_the_published_formula() -> None:
    torch.manual_seed(0)
    queries = PositiveQueries(8, heads=AB, layers=1)
    chosen = choose(head_samples("np", "pn", width=8), least=1)
    content, pos, reference = queries.embed("b", chosen, [(100, 200), (50, 40)])
    torch.testing.assert_close(reference[0, 0], torch.tensor([6 / 200, 11 / 100, 10 / 200, 20 / 100]))
    torch.testing.assert_close(reference[1, 0], torch.tensor([5 / 40, 10 / 50, 10 / 40, 20 / 50]))
    linear, feature_linear = queries.aux_pos_trans["b"], queries.pos_feats_trans["b"]
    embedded = functional.layer_norm(linear(sine_embed_boxes(reference, 4)), (16,))
    features = functional.layer_norm(feature_linear(chosen.features), (8,))
    torch.testing.assert_close(pos, embedded[..., :8] + queries.head_pos_embed["b"])
    torch.testing.assert_close(content, embedded[..., 8:] + features)


def test_the_embedding_sees_coordinates_just_inside_the_image_and_the_reference_does_not(monkeypatch) -> None:
    seen: list[Tensor] = []

    def spy(boxes: Tensor, num_feats: int) -> Tensor:
        seen.append(boxes)
        return sine_embed_boxes(boxes, num_feats)

    monkeypatch.setattr("models.groups.positives.sine_embed_boxes", spy)
    samples = head_samples("pp", width=8)
    samples.boxes = torch.tensor([[[-30.0, 0.0, 10.0, 100.0], [0.0, 0.0, 0.0, 0.0]]])
    _, _, reference = PositiveQueries(8, heads=["head"], layers=1).embed("head", choose(samples, least=1), [(100, 200)])
    torch.testing.assert_close(reference, torch.tensor([[[-0.05, 0.5, 0.2, 1.0], [0.0] * 4]]), atol=1e-7, rtol=0)
    inside = torch.tensor([[[1e-5, 0.5, 0.2, 1 - 1e-5], [1e-5] * 4]])
    torch.testing.assert_close(seen[0], inside, atol=1e-7, rtol=0)


def test_each_head_has_its_own_parameters_under_its_name() -> None:
    queries = PositiveQueries(8, heads=AB, layers=6)
    parts = ("aux_pos_trans", "aux_pos_trans_norm", "pos_feats_trans", "pos_feats_norm")
    names = {f"{part}.{head}.{kind}" for part in parts for head in AB for kind in ("weight", "bias")}
    state = queries.state_dict()
    assert state.keys() == {*names, "head_pos_embed.a", "head_pos_embed.b"}
    assert state["head_pos_embed.a"].shape == (1,)
    assert state["aux_pos_trans.b.weight"].shape == (16, 16)
    groups = queries({head: head_samples(9 * "n", width=8) for head in AB}, SIZES[:1])
    assert [g.name for g in groups] == ["co_a", "co_b"]
    groups[1].content.sum().backward()
    assert queries.aux_pos_trans["a"].weight.grad is None and queries.aux_pos_trans["b"].weight.grad is not None


def test_a_head_may_add_a_whole_vector_to_the_position() -> None:
    queries = PositiveQueries(8, heads=AB, layers=1, full_embed=True)
    chosen = choose(head_samples("p", width=8), least=1)
    _, before, _ = queries.embed("b", chosen, SIZES[:1])
    with torch.no_grad():
        queries.head_pos_embed["b"] += torch.arange(8.0)
    _, after, _ = queries.embed("b", chosen, SIZES[:1])
    torch.testing.assert_close(after - before, torch.arange(8.0).expand(1, 1, 8))


def test_where_the_decoder_makes_positions_content_is_the_embedding_of_the_box_alone() -> None:
    torch.manual_seed(0)
    queries = PositiveQueries(8, heads=AB, layers=1, boxes=True)
    assert queries.state_dict().keys() == {
        f"{part}.{head}.{kind}"
        for part in ("aux_pos_trans", "aux_pos_trans_norm")
        for head in AB
        for kind in ("weight", "bias")
    }
    chosen = choose(head_samples("np", "pn", width=8), least=1)
    content, pos, reference = queries.embed("b", chosen, [(100, 200), (50, 40)])
    embedded = sine_embed_boxes(reference, 4)
    torch.testing.assert_close(content, functional.layer_norm(queries.aux_pos_trans["b"](embedded), (8,)))
    torch.testing.assert_close(reference[0, 0], torch.tensor([6 / 200, 11 / 100, 10 / 200, 20 / 100]))
    assert pos is None
    first = PositiveQueries(256, heads=AB, layers=1, boxes=True).aux_pos_trans["a"]
    assert 0.95 * math.sqrt(6 / 768) < first.weight.abs().max() <= math.sqrt(6 / 768)  # 0.0884


def test_initial_values_are_the_published_ones() -> None:
    torch.manual_seed(0)
    queries = PositiveQueries(256, heads=AB, layers=6)
    bounds = {
        "aux_pos_trans.a.weight": math.sqrt(6 / 1024),  # 0.0765
        "pos_feats_trans.b.weight": math.sqrt(6 / 512),  # 0.1083
        "aux_pos_trans.b.bias": 1 / math.sqrt(512),
        "pos_feats_trans.a.bias": 1 / math.sqrt(256),
    }
    for name, bound in bounds.items():
        assert 0.95 * bound < queries.get_parameter(name).abs().max() <= bound, name
    for heads in (["head"], AB):  # a published table has two rows for one head too
        made = [PositiveQueries(8, heads=heads, layers=1).head_pos_embed for _ in range(100)]
        drawn = torch.stack([torch.cat(list(embeds.values())) for embeds in made]).abs()
        assert (drawn <= math.sqrt(2)).all() and (drawn.amax(0) > 1.3).all()


def test_no_heads_make_no_queries() -> None:
    assert choose_all([]) == []


def test_the_weight_of_the_scheme_is_part_of_the_supervision() -> None:
    (group,) = PositiveQueries(8, heads=["head"], layers=1, weight=0.5)(
        {"head": head_samples(9 * "n", width=8)}, SIZES[:1]
    )
    (supervision,) = group.supervision
    assert isinstance(supervision, Supervision) and supervision.weight == 0.5
