"""Who sees which image when, and that augmentation depends on (seed, epoch, index) alone."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from datasets import build_dataset, build_eval_loader, build_train_loader
from datasets.base import mixed_seed
from datasets.samplers import NodeCacheBatchSampler, TrainBatchSampler, eval_indices
from tests.unit.small_coco import content, read
from util.args import get_args_parser
from util.errors import UserError


def synthetic(length: int = 10, split: str = "train", seed: int = 42):
    flags = (
        f"--dataset_file synthetic --synthetic_size 32 32 --augment resize --max_size 64 --test_size 0 --seed {seed}"
    )
    scales = ["--train_scales", "24", "32", "40"]
    counts = ["--synthetic_train", str(length), "--synthetic_val", str(length)]
    return build_dataset(split, get_args_parser().parse_args([*flags.split(), *scales, *counts]))


def batches(length: int, epoch: int = 0, start: int = 0, kind=TrainBatchSampler, **options) -> list[list[int]]:
    sampler = kind(synthetic(length), **{"batch_size": 2, "seed": 1, **options})
    sampler.set_epoch(epoch, start)
    return list(sampler)


def flat(found: list[list[int]]) -> list[int]:
    return [i for batch in found for i in batch]


# ---- training order ----


def test_an_epoch_shows_every_image_once_in_a_new_order():
    first, again, second = batches(10), batches(10), batches(10, epoch=1)
    assert sorted(flat(first)) == list(range(10))
    assert first == again != second and sorted(flat(second)) == list(range(10))
    assert first != batches(10, seed=2)


def test_the_incomplete_last_batch_is_dropped():
    found = batches(11)
    assert [len(batch) for batch in found] == [2] * 5 and len(set(flat(found))) == 10


@pytest.mark.parametrize("length", [10, 11, 15])
@pytest.mark.parametrize("world_size", [2, 3])
def test_several_processes_see_together_what_one_sees_with_the_whole_batch(length, world_size):
    alone = batches(length, epoch=3, batch_size=2 * world_size)
    parts = [batches(length, epoch=3, rank=r, world_size=world_size) for r in range(world_size)]
    assert alone == [flat(step) for step in zip(*parts, strict=True)]


def test_a_set_smaller_than_one_batch_is_one_smaller_batch():
    found = batches(3, batch_size=8)
    assert len(found) == 1 and sorted(found[0]) == [0, 1, 2]


def test_a_tiny_set_on_several_processes_is_padded_by_its_head_to_equal_lengths():
    parts = [batches(3, batch_size=8, rank=r, world_size=2) for r in range(2)]
    assert [len(part) for part in parts] == [1, 1] and [len(part[0]) for part in parts] == [2, 2]
    order = flat(batches(3, batch_size=8))
    assert parts[0][0] + parts[1][0] == [*order, order[0]]


def test_a_resumed_epoch_starts_after_the_batches_that_are_done():
    assert batches(10, epoch=2, start=3) == batches(10, epoch=2)[3:]
    assert batches(10, epoch=2, start=5) == []


def test_len_is_that_of_the_whole_epoch_and_a_new_epoch_starts_at_its_beginning():
    sampler = TrainBatchSampler(synthetic(10), batch_size=2, seed=1)
    sampler.set_epoch(0, start_batch=3)
    assert len(sampler) == 5 and len(list(sampler)) == 2
    sampler.set_epoch(1)
    assert len(list(sampler)) == 5


# ---- cache mode ----


@pytest.mark.parametrize(("nodes", "local_size"), [(1, 2), (2, 2), (2, 1), (1, 3)])
@pytest.mark.parametrize("length", [12, 17, 23])
def test_cache_mode_serves_each_shard_from_its_local_rank_without_duplicates(nodes, local_size, length):
    world_size = nodes * local_size
    seen, steps = [], set()
    for rank in range(world_size):
        local_rank = rank % local_size
        part = batches(
            length,
            kind=NodeCacheBatchSampler,
            rank=rank,
            world_size=world_size,
            local_rank=local_rank,
            local_size=local_size,
        )
        assert {i % local_size for i in flat(part)} == {local_rank}
        assert {len(batch) for batch in part} == {2}
        seen += flat(part)
        steps.add(len(part))
    assert len(steps) == 1, "processes would wait for each other for ever"
    assert len(seen) == len(set(seen)) >= length - (2 * world_size + world_size)


def test_cache_mode_of_one_process_shows_every_image():
    assert sorted(flat(batches(10, kind=NodeCacheBatchSampler))) == list(range(10))


def test_cache_mode_with_a_small_set_makes_one_smaller_batch():
    parts = [
        batches(5, batch_size=8, kind=NodeCacheBatchSampler, rank=r, world_size=2, local_rank=r, local_size=2)
        for r in range(2)
    ]
    assert [len(flat(part)) for part in parts] == [2, 2] and len(set(flat(parts[0]) + flat(parts[1]))) == 4


def test_cache_mode_with_fewer_images_than_processes_is_refused():
    with pytest.raises(UserError, match="2 images for 3 processes; leave --cache_mode out"):
        batches(2, kind=NodeCacheBatchSampler, rank=0, world_size=3, local_size=3)


def test_cache_mode_keeps_only_the_own_share_of_the_files(tmp_path):
    dataset = read(tmp_path, content([], images=5))
    loader = build_train_loader(
        dataset, batch_size=1, num_workers=0, seed=0, world_size=2, rank=1, cache_mode=True, local_rank=1, local_size=2
    )
    assert sorted(dataset._encoded) == [1, 3]
    for image_id in (2, 4):
        (tmp_path / f"{image_id}.png").unlink()
    assert sorted(target.image_id for _, (target,) in loader) == [2, 4]


# ---- evaluation order ----


@pytest.mark.parametrize("world_size", [1, 2, 3, 12])
def test_evaluation_shows_every_image_exactly_once_over_all_processes(world_size):
    assert sorted(i for r in range(world_size) for i in eval_indices(10, r, world_size)) == list(range(10))


def test_the_evaluation_loader_keeps_the_incomplete_last_batch_and_the_order():
    loader = build_eval_loader(synthetic(7, "val"), batch_size=3, num_workers=0)
    assert [[t.image_id for t in targets] for _, targets in loader] == [[1, 2, 3], [4, 5, 6], [7]]


def test_a_process_without_images_has_no_batches():
    assert list(build_eval_loader(synthetic(2, "val"), batch_size=1, num_workers=0, rank=2, world_size=3)) == []


# ---- determinism of the augmentation ----


def pixels(loader, epoch: int = 0, start: int = 0) -> dict[int, torch.Tensor]:
    """Return the augmented pixels of an epoch by image id."""
    loader.batch_sampler.set_epoch(epoch, start)
    found = {}
    for batch, targets in loader:
        for image, target, (h, w) in zip(batch.pixels, targets, batch.sizes):
            found[target.image_id] = image[:, :h, :w]
    return found


def same(ours: dict[int, torch.Tensor], theirs: dict[int, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[i], theirs[i]) for i in ours)


def train_loader(batch_size: int = 2, num_workers: int = 0, seed: int = 42):
    return build_train_loader(synthetic(12, seed=seed), batch_size=batch_size, num_workers=num_workers, seed=seed)


def test_pixels_do_not_depend_on_workers_or_batch_size():
    assert same(pixels(train_loader()), pixels(train_loader(batch_size=3, num_workers=2)))


def test_persistent_workers_see_the_epoch_change():
    loader, alone = train_loader(num_workers=2), train_loader()
    epochs = [pixels(loader, epoch) for epoch in range(3)]
    assert all(same(found, pixels(alone, epoch)) for epoch, found in enumerate(epochs))
    assert not same(epochs[0], epochs[1])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_resumed_within_an_epoch_sees_the_same_pixels(num_workers):
    whole, rest = pixels(train_loader(), epoch=4), pixels(train_loader(num_workers=num_workers), epoch=4, start=2)
    assert len(rest) == 8 and all(torch.equal(rest[i], whole[i]) for i in rest)


def test_another_seed_augments_differently():
    first, second = synthetic(12, seed=1), synthetic(12, seed=2)
    assert any(first[i][0].shape != second[i][0].shape for i in range(12))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_draws_nothing_from_the_generator_of_the_main_process(num_workers):
    before = torch.get_rng_state()
    pixels(train_loader(num_workers=num_workers))
    list(build_eval_loader(synthetic(4, "val"), batch_size=1, num_workers=num_workers))
    assert torch.equal(torch.get_rng_state(), before)


def test_images_of_one_epoch_are_augmented_independently():
    sizes = Counter(synthetic(12)[i][0].shape[-1] for i in range(12))
    assert len(sizes) > 1


def test_mixed_seeds_differ_in_every_part_and_fit_the_generator():
    seeds = {mixed_seed(a, b, c) for a in range(4) for b in range(4) for c in range(4)}
    assert len(seeds) == 64 and all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_batches_are_pinned():
    loader = build_train_loader(synthetic(4), batch_size=2, num_workers=1, seed=0, pin_memory=True)
    batch, targets = next(iter(loader))
    assert batch.pixels.is_pinned() and batch.padding.is_pinned() and all(t.boxes.is_pinned() for t in targets)
