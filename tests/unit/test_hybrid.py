"""H-DETR: hybrid matching by branch, epoch and layer, its isolated groups, own proposals and own parts."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models import build_detector, build_model
from models.assign.hungarian import match
from models.criterion import Criterion
from models.detector import Detector
from models.groups import build_groups
from models.groups.hybrid import HybridEpoch
from tests.cli import run
from tests.tiny import TWO_STAGE, make_target, tiny_args, tiny_images, tiny_targets
from util.errors import UserError
from util.structures import DetectorOutput, Predictions, SupervisedSet, Supervision, Target

BRANCH = "--num_queries_one2many 12 --k_one2many 3"
ORIGINS = {
    "learned": "",
    "learned_refined": "--with_box_refine",
    "proposals": TWO_STAGE,
    "mixed": f"{TWO_STAGE} --mixed_selection --look_forward_twice",
}
OWN = ("class", "heads", "decoder", "encoder")
BRANCHES = {
    "joint": "",
    "isolated": "--one2many_groups isolated",
    **{f"own_{part}": f"--one2many_own {part}" for part in OWN},
}
SCHEMES = {
    "branch": BRANCH,
    "isolated": f"{BRANCH} --one2many_groups isolated",
    "epoch": "--hybrid epoch --hybrid_k 3",
    "layer": "--hybrid layer --hybrid_k 3 --hybrid_layers 1",
    "epoch_and_branch": f"{BRANCH} --hybrid epoch --hybrid_k 2",
    "layer_and_branch": f"{BRANCH} --hybrid layer --hybrid_k 2 --hybrid_layers 1",
}


@pytest.fixture(params=ORIGINS, ids=list(ORIGINS))
def origin(request: pytest.FixtureRequest) -> str:
    return ORIGINS[request.param]


def spread(model: Detector) -> Detector:
    """Give `model` weights that make every query different: fresh box heads answer 0 everywhere."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def with_weights_of(model: Detector, flags: str) -> Detector:
    """Return the model of `flags` with the weights of `model`, as far as it has them; the query table is cut."""
    other = build_detector(tiny_args(flags))
    state = {n: v for n, v in model.state_dict().items() if n in other.state_dict()}
    if "query_embed.weight" in state:
        state["query_embed.weight"] = state["query_embed.weight"][: len(other.query_embed.weight)]
    other.load_state_dict(state)
    return other


def step(model: Detector, criterion: Criterion, targets: list[Target], epoch: int = 0):
    return criterion(model(tiny_images(), targets, epoch), targets)


@pytest.mark.parametrize("branch", BRANCHES.values(), ids=list(BRANCHES))
def test_one_to_one_queries_do_not_notice_the_branch(origin: str, branch: str) -> None:
    model = spread(build_detector(tiny_args(f"{origin} {BRANCH} {branch}")))
    alone = with_weights_of(model, origin)
    with torch.no_grad():
        ours, theirs = model.train()(tiny_images()), alone.train()(tiny_images())
        evaluated = model.eval()(tiny_images())
    assert "one2many" in ours.sets
    for output in (theirs, evaluated):
        assert "one2many" not in output.sets
        assert torch.allclose(ours.pred_logits, output.pred_logits, atol=1e-5)
        assert torch.allclose(ours.pred_boxes, output.pred_boxes, atol=1e-5)


def test_one_to_one_queries_do_not_depend_on_the_content_of_the_branch() -> None:
    for origin in (ORIGINS["learned"], ORIGINS["mixed"]):
        model = spread(build_detector(tiny_args(f"{origin} {BRANCH}"))).train()
        with torch.no_grad():
            before = model(tiny_images())
            model.query_embed.weight[8:] += 1.0
            after = model(tiny_images())
        assert not torch.allclose(before.sets["one2many"].predictions.boxes, after.sets["one2many"].predictions.boxes)
        assert torch.allclose(before.pred_boxes, after.pred_boxes, atol=1e-6)


@pytest.mark.parametrize("more", [*BRANCHES.values(), "--one2many_proposals own"], ids=[*BRANCHES, "own_proposals"])
def test_inference_costs_what_it_costs_without_the_branch(more: str) -> None:
    flops = []
    for flags in (TWO_STAGE, f"{TWO_STAGE} {BRANCH} {more}"):
        model = build_detector(tiny_args(flags)).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(tiny_images())
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0


def test_one_to_many_queries_do_not_depend_on_the_one_to_one_queries() -> None:
    for origin in (ORIGINS["learned"], ORIGINS["mixed"]):
        model = spread(build_detector(tiny_args(f"{origin} {BRANCH}"))).train()
        with torch.no_grad():
            before = model(tiny_images())
            model.query_embed.weight[:8] += 1.0
            after = model(tiny_images())
        assert not torch.allclose(before.pred_boxes, after.pred_boxes)
        many = [output.sets["one2many"].predictions.boxes for output in (before, after)]
        assert torch.allclose(*many, atol=1e-6)


def test_lambda_multiplies_every_entry_of_the_branch_and_nothing_else() -> None:
    terms = []
    for weight in (1.0, 0.25):
        torch.manual_seed(0)
        flags = f"{TWO_STAGE} {BRANCH} --one2many_proposals own --lambda_one2many {weight}"
        model, criterion, _ = build_model(tiny_args(flags))
        terms.append(step(spread(model), criterion, tiny_targets()).terms)
    assert terms[0].keys() == terms[1].keys()
    for name, value in terms[0].items():
        factor = 0.25 if name.endswith("one2many") else 1.0
        assert terms[1][name].item() == pytest.approx(factor * value.item(), rel=1e-5), name


@pytest.mark.parametrize("more", ["", "--one2many_groups isolated", *(f"--one2many_own {p}" for p in OWN)])
@pytest.mark.parametrize("queries", [16, 40], ids=["some_left", "none_left"])
def test_fewer_proposals_than_queries_leave_a_smaller_or_empty_branch(queries: int, more: str) -> None:
    args = tiny_args(f"{TWO_STAGE} --num_feature_levels 3 --num_queries {queries} {BRANCH} {more}")
    model, criterion, _ = build_model(args)
    images = tiny_images([(64, 32), (40, 32)])  # 8 x 4 + 4 x 2 + 2 x 1 cells
    output = model(images, tiny_targets())
    report = criterion(output, tiny_targets())
    report.total.backward()
    assert torch.isfinite(report.total)
    if "encoder" not in more:
        tokens = output.sets["encoder"].predictions.logits.shape[2]
        assert output.sets["one2many"].predictions.logits.shape[2] == max(0, min(12, tokens - queries))


def test_an_own_encoder_gives_its_best_proposals_to_its_own_queries() -> None:
    model = build_detector(tiny_args(f"{TWO_STAGE} {BRANCH} --one2many_own encoder")).train()
    with torch.no_grad():
        output = spread(model)(tiny_images())
        scores = output.sets["encoder_one2many"].predictions.logits[0, ..., 0]
        best = scores.topk(12, dim=1).indices
        (source, _, seeds) = model._streams(tiny_images())[1]
        boxes = output.sets["encoder_one2many"].predictions.boxes[0]
        expected = boxes.gather(1, best[..., None].expand(-1, -1, 4))
    assert source.name == "one2many"
    assert torch.allclose(seeds.reference, expected, atol=1e-6)


def test_training_tells_the_scheme_its_epoch_also_after_a_resume(tmp_path, monkeypatch) -> None:
    seen: list[int] = []
    original = HybridEpoch.supervision

    def watch(self, epoch: int):
        if self.training:
            seen.append(epoch)
        return original(self, epoch)

    monkeypatch.setattr(HybridEpoch, "supervision", watch)
    flags = "--hybrid epoch --hybrid_k 2 --synthetic_train 4 --synthetic_val 2 --epochs"
    assert run(tmp_path, f"{flags} 2") == 0
    assert seen == [0, 0, 1, 1]
    assert run(tmp_path, f"{flags} 3 --resume auto") == 0
    assert seen == [0, 0, 1, 1, 2, 2]


def test_one_repeat_of_equal_queries_gives_the_one_to_one_losses_a_second_time() -> None:
    model, criterion, _ = build_model(tiny_args("--with_box_refine --num_queries_one2many 8 --k_one2many 1"))
    spread(model)
    with torch.no_grad():
        model.query_embed.weight[8:] = model.query_embed.weight[:8]
    terms = step(model, criterion, tiny_targets()).terms
    pairs = [(terms[f"{name}_one2many"], value) for name, value in terms.items() if not name.endswith("one2many")]
    assert len(pairs) == len(terms) / 2
    for many, one in pairs:
        assert many.item() == pytest.approx(one.item(), rel=1e-5)


@pytest.mark.parametrize("flags", SCHEMES.values(), ids=list(SCHEMES))
def test_every_form_trains_all_parameters_with_and_without_objects(origin: str, flags: str) -> None:
    model, criterion, _ = build_model(tiny_args(f"{origin} {flags}"))
    for targets in (tiny_targets(), [make_target(), make_target()]):
        model.zero_grad()
        report = step(model, criterion, targets)
        report.total.backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, f"{name} gets no gradient"
                assert torch.isfinite(parameter.grad).all(), f"{name} gets a non-finite gradient"


@pytest.mark.parametrize("more", [*(f"--one2many_own {p}" for p in OWN), "--one2many_proposals own"])
def test_own_parts_and_proposals_leave_no_parameter_without_a_gradient(more: str) -> None:
    model, criterion, _ = build_model(tiny_args(f"{ORIGINS['mixed']} {BRANCH} {more}"))
    step(model, criterion, tiny_targets()).total.backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without


def matched_pairs(args: Namespace, *, epochs: int, layers: int) -> int:
    """Return how many pairs one target gets in a whole training: sum over epochs, groups and layers."""
    total = 0
    for source in build_groups(args):
        source.train()
        for epoch in range(epochs):
            queries = source.num_queries
            total += sum(s.copies(queries) * len(s.layers or range(layers)) for s in source.supervision(epoch))
    return total


def test_the_three_forms_of_the_paper_spend_the_same_number_of_positives() -> None:
    budgets = {
        form: matched_pairs(tiny_args(f"--epochs 12 --dec_layers 6 {flags}"), epochs=12, layers=6)
        for form, flags in {
            "baseline": "",
            "branch": "--num_queries_one2many 1500 --k_one2many 6",
            "epoch": "--num_queries 1800 --hybrid epoch --hybrid_k 10",
            "layer": "--num_queries 1800 --hybrid layer --hybrid_k 10 --hybrid_layers 4",
        }.items()
    }
    assert budgets == {"baseline": 72, "branch": 7 * 72, "epoch": 7 * 72, "layer": 7 * 72}


def test_hybrid_epoch_repeats_targets_in_the_first_epochs_only() -> None:
    args = tiny_args("--with_box_refine --hybrid epoch --hybrid_k 3 --hybrid_rho 0.5 --epochs 4")
    model, _, _ = build_model(args)

    def repeats(epoch: int) -> list[int]:
        (taught,) = model(tiny_images(), tiny_targets(), epoch).sets["one2one"].supervision
        return [taught.repeat, taught.layers]

    assert [repeats(epoch) for epoch in range(4)] == [[3, None], [3, None], [1, None], [1, None]]
    model.eval()
    assert repeats(0) == [1, None]  # validation losses of all epochs compare


def test_hybrid_layer_repeats_targets_on_the_first_layers_only() -> None:
    model, criterion, _ = build_model(tiny_args("--dec_layers 3 --hybrid layer --hybrid_k 3 --hybrid_layers 2"))
    pairs = matched(criterion, model(tiny_images(), tiny_targets()), tiny_targets())
    layers = torch.cat([assignment.layer for assignment in pairs])
    assert layers.bincount().tolist() == [2 * 3, 2 * 3, 2]


@pytest.mark.parametrize(("first", "repeats"), [(0, 1), (2, 4)])
def test_hybrid_layer_of_no_layer_or_all_is_one_of_the_plain_forms(first: int, repeats: int) -> None:
    layer = f"--hybrid layer --hybrid_k 4 --hybrid_layers {first}"
    plain = f"--hybrid epoch --hybrid_k {repeats} --hybrid_rho 1"
    totals = []
    for flags in (layer, plain):
        torch.manual_seed(0)
        model, criterion, _ = build_model(tiny_args(f"--with_box_refine {flags}"))
        totals.append(step(spread(model), criterion, tiny_targets()).total.item())
    assert totals[0] == pytest.approx(totals[1])


def matched(criterion: Criterion, output: DetectorOutput, targets: list[Target]) -> list:
    """Return the assignments of the sets that are not of the encoder."""
    found = []
    matcher = criterion.assigners["queries"]

    def watch(requests):
        assignments = matcher(requests)
        found.extend(a for r, a in zip(requests, assignments) if not r.name.startswith("encoder"))
        return assignments

    criterion.assigners["queries"] = watch
    criterion(output, targets)
    criterion.assigners["queries"] = matcher
    return found


def test_isolated_groups_match_every_target_once_in_each_block() -> None:
    cost = torch.rand(3, 12, generator=torch.Generator().manual_seed(1)).numpy()
    slots, targets = match(cost, block=4)
    for block in range(3):
        here = slots // 4 == block
        assert sorted(targets[here]) == [0, 1, 2]
        alone_slots, alone_targets = match(cost[:, 4 * block : 4 * block + 4])
        assert (slots[here] - 4 * block).tolist() == alone_slots.tolist()
        assert targets[here].tolist() == alone_targets.tolist()
    assert (slots[1:] > slots[:-1]).all()


def test_isolated_groups_are_blind_to_each_other_and_joint_ones_are_not() -> None:
    changed = {}
    for form in ("joint", "isolated"):
        model = spread(build_detector(tiny_args(f"{BRANCH} --one2many_groups {form}"))).train()
        with torch.no_grad():
            before = model(tiny_images()).sets["one2many"].predictions.boxes
            model.query_embed.weight[12:16] += 1.0  # rows of the second of three blocks of four
            after = model(tiny_images()).sets["one2many"].predictions.boxes
        moved = (before - after).abs().amax((0, 1, 3)) > 1e-6
        changed[form] = moved.view(3, 4).any(1).tolist()
    assert changed == {"joint": [True, True, True], "isolated": [False, True, False]}


def test_a_last_block_of_fewer_slots_is_matched_like_the_others() -> None:
    cost = torch.rand(2, 9, generator=torch.Generator().manual_seed(1)).numpy()
    slots, targets = match(cost, block=4)
    assert [(slots // 4 == block).sum() for block in range(3)] == [2, 2, 1]
    assert sorted(targets[slots // 4 == 1]) == [0, 1]


def test_losses_of_isolated_groups_are_those_of_one_criterion_call_for_each_added() -> None:
    model, criterion, _ = build_model(tiny_args(f"{BRANCH} --lambda_one2many 0.5 --one2many_groups isolated"))
    output = spread(model)(tiny_images(), tiny_targets())
    terms = criterion(output, tiny_targets()).terms
    many = output.sets["one2many"].predictions
    blocks = [slice(start, start + 4) for start in (0, 4, 8)]
    alone = [Predictions(many.logits[:, :, block], many.boxes[:, :, block]) for block in blocks]
    calls = [
        criterion(DetectorOutput({"one2one": SupervisedSet(part, (Supervision(),))}), tiny_targets()).terms
        for part in alone
    ]
    for name in ("loss_ce", "loss_bbox", "loss_giou", "loss_ce_0"):
        expected = 0.5 * sum(call[name].item() for call in calls)
        assert terms[f"{name}_one2many"].item() == pytest.approx(expected, rel=1e-5)


def test_groups_of_unequal_size_are_refused_with_the_way_out() -> None:
    flags = "--num_queries_one2many 13 --k_one2many 3 --one2many_groups isolated"
    with pytest.raises(UserError, match="12 can"):
        build_model(tiny_args(flags))


def test_own_proposals_are_the_best_of_the_rest_for_the_second_class_head() -> None:
    model = spread(build_detector(tiny_args(f"{TWO_STAGE} {BRANCH} --one2many_proposals own"))).train()
    with torch.no_grad():
        memory = model.encode(tiny_images())
        claims = model.claims()
        one, many = model.transformer.seeds(memory, model.heads, {}, list(claims.values()))
    boxes = one.encoder.boxes[0]

    def tokens(reference: torch.Tensor, image: int) -> list[int]:
        return [int((boxes[image] - box).abs().sum(-1).argmin()) for box in reference[image]]

    for image in range(2):
        first, second = tokens(one.reference, image), tokens(many.reference, image)
        ranking = many.encoder.logits[0, image, :, 0].argsort(descending=True).tolist()
        assert second == [token for token in ranking if token not in first][:12]
        assert one.encoder.logits[0, image, :, 0].argsort(descending=True).tolist() != ranking


def test_the_second_class_head_is_taught_with_one_copy_more_than_the_branch() -> None:
    model, criterion, _ = build_model(tiny_args(f"{TWO_STAGE} {BRANCH} --one2many_proposals own"))
    output = model(tiny_images(), tiny_targets())
    (taught,) = output.sets["encoder_one2many"].supervision
    assert (taught.repeat, taught.class_agnostic) == (4, True)
    terms = criterion(output, tiny_targets()).terms
    assert {"loss_ce_enc_one2many", "loss_bbox_enc_one2many", "loss_giou_enc_one2many"} <= set(terms)


@pytest.mark.parametrize("part", OWN)
def test_what_the_branch_does_not_share_is_trained_by_the_branch_alone(part: str) -> None:
    model, criterion, _ = build_model(tiny_args(f"{ORIGINS['mixed']} {BRANCH} --one2many_own {part}"))
    spread(model)
    output = model(tiny_images(), tiny_targets())
    output.sets = {name: found for name, found in output.sets.items() if "one2many" in name}
    output.sets["one2one"] = SupervisedSet(output.sets["one2many"].predictions, ())  # only the branch is left to teach
    criterion(output, tiny_targets()).total.backward()
    shared = {
        "class": model.class_embed[:2],
        "heads": model.bbox_embed[:2],
        "decoder": model.transformer.decoder.layers,
        "encoder": model.transformer.encoder,
    }
    depth = OWN.index(part)
    for i, (name, module) in enumerate(shared.items()):
        reached = any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
        assert reached == (i > depth), f"{name} shared: {i > depth}, gradient: {reached}"
    assert all(p.grad is not None for p in model.groups["one2many"].own.parameters())


def test_costs_and_losses_of_both_branches_are_evaluated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, criterion, _ = build_model(tiny_args(f"{TWO_STAGE} {BRANCH}"))
    matcher = criterion.assigners["queries"]
    shapes, evaluated = [], []
    costs = matcher.costs
    monkeypatch.setattr(matcher, "costs", lambda p, targets: shapes.append(p.logits.shape[:3]) or costs(p, targets))
    for name, term in criterion.terms.items():
        criterion.terms[name] = lambda p, pairs, a, n=name, f=term: evaluated.append(n) or f(p, pairs, a)
    step(model, criterion, tiny_targets())
    tokens = 85  # 8 x 8 + 4 x 4 + 2 x 2 + 1: the encoder's proposals
    assert shapes == [(2, 2, 8 + 12), (1, 2, tokens)]
    assert sorted(evaluated) == ["boxes", "boxes", "labels", "labels"]


def test_any_group_can_be_evaluated_by_its_name() -> None:
    flags = f"{TWO_STAGE} {BRANCH}"
    many, _, postprocessor = build_model(tiny_args(f"{flags} --eval_group one2many"))
    spread(many)
    with torch.no_grad():
        output = many.eval()(tiny_images())
        trained = many.train()(tiny_images())
    found = output.sets["one2many"].predictions
    assert torch.allclose(found.logits, trained.sets["one2many"].predictions.logits, atol=1e-5)
    (first, _) = postprocessor(output, [(64, 64), (48, 57)], [0, 1])
    assert first.scores[0] == found.logits[-1, 0].sigmoid().max()
    assert len(first.scores) == 12 * 4
    with pytest.raises(UserError, match="--eval_group one2many: these flags make the groups one2one"):
        build_model(tiny_args(f"{TWO_STAGE} --eval_group one2many"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--one2many_own decoder", "no one-to-many branch"),
        ("--one2many_groups isolated --num_queries_one2many 4 --k_one2many 0", "no one-to-many branch"),
        (f"{BRANCH} --one2many_proposals own", "--two_stage"),
        (f"{TWO_STAGE} {BRANCH} --one2many_proposals own --one2many_own encoder", "leave out --one2many_proposals"),
        ("--hybrid layer --hybrid_layers 3", "0 to --dec_layers 2"),
        ("--hybrid epoch --hybrid_rho 1.5", "0 to 1"),
        ("--hybrid epoch --hybrid_k 0", "at least 1"),
        ("--hybrid layer --hybrid_layers 1 --no_aux_loss", "leave out --no_aux_loss"),
        ("--nms_iou 2", "an IoU"),
    ],
)
def test_impossible_flags_are_refused_with_the_way_out(flags: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_model(tiny_args(flags))


def test_averaged_weights_of_a_hybrid_run_are_evaluated_without_the_branch(tmp_path, capsys) -> None:
    data = "--synthetic_train 4 --synthetic_val 2 --use_ema"
    assert run(tmp_path / "run", f"{data} --epochs 1 {BRANCH} --with_box_refine --one2many_own heads") == 0
    file = tmp_path / "run" / "checkpoint.pth"
    assert run(tmp_path / "eval", f"{data} --with_box_refine --eval --resume {file}") == 0
    assert "groups.one2many.*" in capsys.readouterr().out
    assert (tmp_path / "eval" / "eval_ema" / "results.json").is_file()
