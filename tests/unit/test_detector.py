"""Detector, encoder, decoder, proposals: shapes, invariants of the specification, gradients."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import pytest
import torch

from models import build_detector, build_model
from models.backbones import resize_padding
from models.encoder import encoder_reference_points, valid_ratios
from models.heads import heads_of, shift_box
from models.proposals import proposal_logits, select_top
from models.visibility import visibility
from tests.tiny import TWO_STAGE, make_target, tiny_args, tiny_images, tiny_targets
from util.boxes import inverse_sigmoid
from util.errors import UserError
from util.structures import Claim, ImageBatch, QueryGroup, Supervision

VARIANTS = {
    "base": "",
    "refine": "--with_box_refine",
    "refine_look_forward_twice": "--with_box_refine --look_forward_twice",
    "two_stage": TWO_STAGE,
    "mixed_selection": f"{TWO_STAGE} --mixed_selection --look_forward_twice",
    "one_to_many": f"{TWO_STAGE} --mixed_selection --num_queries_one2many 12 --k_one2many 2",
    "one_to_many_one_stage": "--num_queries_one2many 12 --k_one2many 2",
    "single_scale": "--num_feature_levels 1",
    "three_levels": "--num_feature_levels 3",
    "five_levels": f"{TWO_STAGE} --num_feature_levels 5 --hidden_dim 64",
    "learned_positions": "--position_embedding learned",
    "no_aux_loss": "--no_aux_loss --with_box_refine",
    "checkpointing": f"{TWO_STAGE} --use_checkpoint",
    "more_queries_than_cells": f"{TWO_STAGE} --num_queries 500",
}


@pytest.fixture(params=VARIANTS, ids=list(VARIANTS))
def variant(request: pytest.FixtureRequest) -> str:
    return VARIANTS[request.param]


def group(name: str, size: int, **more) -> QueryGroup:
    zeros = torch.zeros(1, size, 4)
    return QueryGroup(name, zeros, zeros, zeros, (Supervision(),), **more)


def test_every_parameter_gets_a_finite_gradient_with_and_without_objects(variant: str) -> None:
    model, criterion, _ = build_model(tiny_args(variant))
    for targets in (tiny_targets(), [make_target(), make_target()]):
        model.zero_grad()
        criterion(model(tiny_images(), targets), targets).total.backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, f"{name} gets no gradient"
                assert torch.isfinite(parameter.grad).all(), f"{name} gets a non-finite gradient"


def test_shapes_of_outputs_and_detections_for_one_odd_image(variant: str) -> None:
    args = tiny_args(variant)
    model, _, postprocessor = build_model(args)
    with torch.no_grad():
        output = model.eval()(tiny_images([(45, 71)]))
    queries = output.pred_logits.shape[1]
    assert output.pred_boxes.shape == (1, queries, 4)
    assert output.pred_logits.shape == (1, queries, 4)
    assert queries <= args.num_queries_one2one
    assert set(output.sets) <= {"one2one", "encoder"}
    (detections,) = postprocessor(output, [(90, 142)], [5])
    assert len(detections.scores) == min(100, 4 * queries)
    assert (detections.scores.diff() <= 0).all()


def test_state_dict_loads_back_into_a_fresh_model(variant: str) -> None:
    args = tiny_args(variant)
    first, second = build_detector(args).eval(), build_detector(args).eval()
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        ours, theirs = first(tiny_images()), second(tiny_images())
    assert torch.equal(ours.pred_boxes, theirs.pred_boxes)
    assert torch.equal(ours.pred_logits, theirs.pred_logits)  # fresh boxes do not depend on the decoder


def test_transformer_does_not_depend_on_padding() -> None:
    """A canvas enlarged by a multiple of the largest stride, with any values in padded cells, changes nothing."""
    model = build_detector(tiny_args("--with_box_refine")).eval()
    small, large = tiny_images([(64, 64)]), tiny_images([(64, 64)], canvas=(128, 192))

    def outputs(images: ImageBatch, maps: list[torch.Tensor]):
        paddings = [resize_padding(images.padding, m.shape[-2:]) for m in maps]
        positions = [model.backbone[1](p) for p in paddings]
        memory = model.transformer.encode(maps, positions, paddings)
        (seeds,) = model.transformer.seeds(
            memory, model.heads, {"query_embed": model.query_embed.weight}, [Claim(0, 8)]
        )
        decoded = model.transformer.decoder(
            [QueryGroup("one2one", seeds.content, seeds.reference, seeds.pos, ())], memory, model.heads
        )
        return decoded["one2one"].predictions

    with torch.no_grad():
        maps = [torch.randn(1, 32, s, s) for s in (8, 4, 2, 1)]
        enlarged = []
        for m in maps:
            big = 100 * torch.randn(1, 32, 2 * m.shape[2], 3 * m.shape[3])
            big[:, :, : m.shape[2], : m.shape[3]] = m
            enlarged.append(big)
        ours, theirs = outputs(small, maps), outputs(large, enlarged)
    assert (ours.logits - theirs.logits).abs().max() < 2e-5
    assert (ours.boxes - theirs.boxes).abs().max() < 2e-5


def test_the_order_of_images_changes_nothing() -> None:
    model = build_detector(tiny_args(TWO_STAGE)).eval()
    images = tiny_images([(64, 64), (64, 64)])
    swapped = ImageBatch(images.pixels.flip(0), images.padding.flip(0), images.sizes[::-1])
    with torch.no_grad():
        ours, theirs = model(images), model(swapped)
    assert (ours.pred_logits - theirs.pred_logits.flip(0)).abs().max() < 1e-5


def test_permuting_learned_queries_permutes_the_outputs() -> None:
    model = build_detector(tiny_args()).eval()
    order = torch.randperm(8)
    permuted = copy.deepcopy(model)
    permuted.query_embed.weight.data = model.query_embed.weight.data[order]
    with torch.no_grad():
        ours, theirs = model(tiny_images()), permuted(tiny_images())
    assert (ours.pred_logits[:, order] - theirs.pred_logits).abs().max() < 1e-5


@pytest.mark.parametrize("flags", ["", f"{TWO_STAGE} --mixed_selection"], ids=["learned", "proposals"])
def test_one2many_queries_do_not_change_one2one_outputs(flags: str) -> None:
    model = build_detector(tiny_args(f"{flags} --num_queries_one2many 12 --k_one2many 3"))
    with torch.no_grad():
        train, infer = model.train()(tiny_images()), model.eval()(tiny_images())
    assert "one2many" in train.sets and "one2many" not in infer.sets
    assert (train.pred_logits - infer.pred_logits).abs().max() < 1e-5
    assert (train.pred_boxes - infer.pred_boxes).abs().max() < 1e-5


def test_one2one_losses_do_not_train_one2many_rows_and_vice_versa() -> None:
    model, criterion, _ = build_model(
        tiny_args(f"{TWO_STAGE} --mixed_selection --num_queries_one2many 12 --k_one2many 3")
    )
    for name, untouched in (("one2one", slice(8, None)), ("one2many", slice(0, 8))):
        output = model(tiny_images())
        output.sets = {n: s for n, s in output.sets.items() if n in (name, "one2one")}
        model.zero_grad()
        if name == "one2many":
            predictions = output.sets["one2many"].predictions
            (predictions.logits.sum() + predictions.boxes.sum()).backward()
        else:
            criterion(output, tiny_targets()).total.backward()
        gradient = model.query_embed.weight.grad
        assert (gradient[untouched] == 0).all()
        assert gradient.abs().sum() > 0


def test_look_forward_twice_changes_gradients_but_no_value() -> None:
    plain = build_detector(tiny_args(TWO_STAGE))
    twice = build_detector(tiny_args(f"{TWO_STAGE} --look_forward_twice"))
    twice.load_state_dict(plain.state_dict())
    gradients = []
    for model in (plain, twice):
        torch.nn.init.normal_(model.bbox_embed[0].layers[-1].weight, generator=torch.Generator().manual_seed(1))
        output = model(tiny_images())
        output.pred_boxes.sum().backward()
        gradients.append((output.pred_boxes.detach(), model.bbox_embed[0].layers[-1].weight.grad))
    assert torch.allclose(gradients[0][0], gradients[1][0], atol=1e-6)
    assert gradients[0][1] is None or (gradients[0][1] == 0).all()
    assert gradients[1][1].abs().sum() > 0


def test_reference_of_the_first_layer_is_the_box_of_the_proposal() -> None:
    model = build_detector(tiny_args(TWO_STAGE)).eval()
    with torch.no_grad():
        memory = model.encode(tiny_images())
        (seeds,) = model.transformer.seeds(memory, model.heads, {}, [Claim(0, 8)])
        encoder = seeds.encoder
        best = encoder.logits[0, ..., 0].topk(8, dim=1).indices
        boxes = encoder.boxes[0].gather(1, best[..., None].expand(-1, -1, 4))
    assert torch.allclose(seeds.reference, boxes)


def test_invalid_proposals_give_finite_gradients_when_they_are_selected() -> None:
    model, criterion, _ = build_model(tiny_args(f"{TWO_STAGE} --num_queries 80"))
    targets = tiny_targets()
    report = criterion(model(tiny_images([(64, 64), (20, 20)]), targets), targets)
    report.total.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


def test_proposals_double_their_size_with_every_level_and_are_infinite_at_padding() -> None:
    padding = torch.zeros(1, 4 * 4 + 2 * 2, dtype=torch.bool)
    padding[0, 3] = True
    logits, invalid = proposal_logits(padding, ((4, 4), (2, 2)))
    boxes = logits.sigmoid()
    # The first row has three valid columns of four.
    assert torch.allclose(boxes[0, 0], torch.tensor([0.5 / 3, 0.5 / 4, 0.05, 0.05]))
    assert torch.allclose(boxes[0, 16], torch.tensor([0.25, 0.25, 0.1, 0.1]))
    assert invalid[0, 3] and logits[0, 3].isinf().all()


def test_proposals_within_a_hundredth_of_the_border_are_invalid() -> None:
    padding = torch.zeros(1, 64 + 64, dtype=torch.bool)
    logits, invalid = proposal_logits(padding, ((1, 64), (64, 1)))
    # Centres are (i + 0.5) / 64: 0.0078 and 0.9922 at the ends, 0.0234 and 0.9766 beside them.
    assert invalid[0].nonzero().flatten().tolist() == [0, 63, 64, 127]
    assert torch.equal(logits.isinf().all(-1), invalid) and torch.equal(logits.isinf().any(-1), invalid)


def test_the_best_scores_come_first_and_fewer_cells_than_queries_are_enough() -> None:
    assert select_top(torch.tensor([[0.1, 0.9, 0.5]]), 2).tolist() == [[1, 2]]
    assert select_top(torch.tensor([[0.1, 0.9, 0.5]]), 10).tolist() == [[1, 2, 0]]


def test_valid_ratios_count_the_first_row_and_column() -> None:
    padding = torch.zeros(1, 4, 5, dtype=torch.bool)
    padding[0, 3:] = True
    padding[0, :, 2:] = True
    assert torch.allclose(valid_ratios([padding]), torch.tensor([[[2 / 5, 3 / 4]]]))


def test_valid_ratios_have_the_precision_that_pytorch_is_set_to() -> None:
    padding = torch.zeros(1, 4, 3, dtype=torch.bool)
    padding[0, :, 1:] = True
    torch.set_default_dtype(torch.float64)
    try:
        assert valid_ratios([padding])[0, 0, 0].item() == 1 / 3
    finally:
        torch.set_default_dtype(torch.float32)


def test_reference_points_of_an_unpadded_map_are_the_centres_of_its_cells() -> None:
    points = encoder_reference_points(((2, 2),), torch.ones(1, 1, 2))
    assert points[0, :, 0].tolist() == [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]


def test_a_zero_offset_leaves_the_reference_and_a_point_shifts_only_the_centre() -> None:
    box = torch.tensor([[0.2, 0.4, 0.1, 0.3]])
    assert torch.allclose(shift_box(torch.zeros(1, 4), box), box, atol=1e-6)
    shifted = shift_box(torch.zeros(1, 4), box[:, :2])
    assert torch.allclose(shifted, torch.tensor([[0.2, 0.4, 0.5, 0.5]]), atol=1e-6)


def test_inverse_sigmoid_is_finite_at_both_ends() -> None:
    assert torch.isfinite(inverse_sigmoid(torch.tensor([-1.0, 0.0, 1.0, 2.0]))).all()


def test_heads_are_shared_without_refinement_and_copies_with_it() -> None:
    shared = heads_of(width=8, num_classes=3, dec_layers=3, refine=False, two_stage=False)
    copies = heads_of(width=8, num_classes=3, dec_layers=3, refine=True, two_stage=True)
    assert all(h is shared.class_embed[0] for h in shared.class_embed)
    assert len(copies.class_embed) == 4 and len({id(h) for h in copies.bbox_embed}) == 4


@pytest.mark.parametrize(
    ("refine", "two_stage", "sizes"),
    [(False, False, [-2.0] * 3), (True, False, [-2.0, 0.0, 0.0]), (True, True, [0.0] * 4)],
    ids=["shared", "refine", "two_stage"],
)
def test_first_boxes_are_small_around_points_and_the_proposals_themselves_in_two_stage(
    refine: bool, two_stage: bool, sizes: list[float]
) -> None:
    heads = heads_of(width=8, num_classes=3, dec_layers=3, refine=refine, two_stage=two_stage)
    assert [h.layers[-1].bias.tolist() for h in heads.bbox_embed] == [[0.0, 0.0, size, size] for size in sizes]
    assert all((h.layers[-1].weight == 0).all() for h in heads.bbox_embed)
    assert torch.allclose(torch.stack([h.bias for h in heads.class_embed]).sigmoid(), torch.tensor(0.01))


def test_groups_see_themselves_and_whom_they_name_but_not_the_reverse() -> None:
    seen = visibility([group("one2one", 2), group("dn", 4, sees=("one2one",), block=2)], torch.device("cpu"))
    expected = torch.tensor(
        [
            [1, 1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 1, 0, 0],
            [1, 1, 1, 1, 0, 0],
            [1, 1, 0, 0, 1, 1],
            [1, 1, 0, 0, 1, 1],
        ],
        dtype=torch.bool,
    )
    assert torch.equal(seen, expected)


def test_predictions_are_cut_by_group_and_keep_its_empty_slots() -> None:
    model = build_detector(tiny_args("--with_box_refine"))
    memory = model.encode(tiny_images([(128, 128)]))
    queries, points, empty = torch.randn(3, 32), torch.rand(3, 2), torch.tensor([[False, False, True]])
    whole, last = slice(0, 3), slice(2, 3)
    groups = [
        QueryGroup("one2one", queries[None, whole], points[None, whole], queries[None, whole], (), padding=empty),
        QueryGroup("extra", queries[None, last], points[None, last], queries[None, last], ()),
    ]
    with torch.no_grad():
        decoded, alone = (
            {name: found.predictions for name, found in model.transformer.decoder(some, memory, model.heads).items()}
            for some in (groups, groups[1:])
        )
    assert decoded["one2one"].padding is empty and decoded["extra"].padding is None
    assert [len(decoded[name].logits[0, 0]) for name in ("one2one", "extra")] == [3, 1]
    assert torch.allclose(decoded["extra"].logits, alone["extra"].logits, atol=1e-5)


def test_a_single_group_needs_no_mask() -> None:
    assert visibility([group("one2one", 5)], torch.device("cpu")) is None


def test_bfloat16_autocast_trains_with_boxes_and_losses_in_float32() -> None:
    model, criterion, _ = build_model(tiny_args(f"{TWO_STAGE} --mixed_selection"))
    targets = tiny_targets()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(tiny_images(), targets)
        report = criterion(output, targets)
    assert output.pred_boxes.dtype == output.pred_logits.dtype == torch.float32
    report.total.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("flags", ["", "--with_box_refine --look_forward_twice", f"{TWO_STAGE} --mixed_selection"])
def test_a_float64_model_computes_and_trains_in_float64(flags: str) -> None:
    model, criterion, _ = build_model(tiny_args(flags))
    single = model(tiny_images())
    images = tiny_images()
    output = model.double()(replace(images, pixels=images.pixels.double()))
    assert output.pred_boxes.dtype == output.pred_logits.dtype == torch.float64
    assert (output.pred_logits - single.pred_logits).abs().max() < 1e-4
    total = criterion(output, tiny_targets()).total
    assert total.dtype == torch.float64
    total.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


def test_checkpointing_runs_every_layer_twice_and_gives_the_same_gradients() -> None:
    gradients, runs = [], []
    for flags in ("", "--use_checkpoint"):
        torch.manual_seed(3)
        model, criterion, _ = build_model(tiny_args(f"{TWO_STAGE} {flags}"))
        layers = [*model.transformer.encoder.layers, *model.transformer.decoder.layers]
        calls = []
        for layer in layers:
            layer.register_forward_pre_hook(lambda module, inputs, calls=calls: calls.append(module))
        criterion(model(tiny_images(), tiny_targets()), tiny_targets()).total.backward()
        gradients.append(layers[0].linear1.weight.grad)
        runs.append([calls.count(layer) for layer in layers])
    assert runs == [[1, 1, 1], [2, 2, 2]]
    assert torch.allclose(*gradients, atol=1e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--two_stage", "--two_stage needs --with_box_refine"),
        ("--mixed_selection", "--mixed_selection needs --two_stage"),
        ("--look_forward_twice", "--look_forward_twice needs --with_box_refine"),
        ("--num_feature_levels 2", "use 1 .last map only., 3, 4 or more"),
        ("--hidden_dim 48 --nheads 5", "is not a multiple of --nheads"),
        ("--num_queries 0", "--num_queries_one2one 0: must be at least 1"),
    ],
)
def test_impossible_flags_are_refused_with_the_way_out(flags: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_model(tiny_args(flags))


def test_building_twice_with_one_seed_gives_equal_weights() -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(11)
        models.append(build_detector(tiny_args(TWO_STAGE)))
    pairs = zip(models[0].state_dict().values(), models[1].state_dict().values())
    assert all(torch.equal(a, b) for a, b in pairs)


def test_no_warning_is_raised_by_a_step() -> None:
    model, criterion, _ = build_model(tiny_args(TWO_STAGE))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion(model(tiny_images(), tiny_targets()), tiny_targets()).total.backward()
