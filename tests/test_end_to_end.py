"""The whole program learns: four images are memorised through the command line."""

from __future__ import annotations

import json
from pathlib import Path

from main import main

FLAGS = (
    "--device cpu --dataset_file synthetic --synthetic_train 4 --synthetic_val 4 --synthetic_size 96 96 "
    "--synthetic_classes 3 --synthetic_objects 1 3 --synthetic_overlap 0 --augment none --test_size 0 --num_workers 0 "
    "--backbone resnet18 --backbone_weights none --backbone_norm train --hidden_dim 64 --nheads 4 --enc_layers 1 "
    "--dec_layers 2 --dim_feedforward 128 --num_queries 10 --num_feature_levels 3 --with_box_refine --two_stage "
    "--dropout 0 --batch_size 2 --eval_batch_size 4 --recipe_batch_size 2 --lr 1e-3 --lr_backbone 1e-3 "
    "--clip_max_norm 1 --epochs 70 --lr_drop 55 --eval_every 70 --save_every 70 --no-eval_loss "
    "--no-tensorboard --draw 0"
)


def test_four_images_are_memorised_and_detected(tmp_path: Path) -> None:
    assert main([*FLAGS.split(), "--eval_in_training_set", "--output_dir", str(tmp_path)]) == 0
    log = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    ap, ap50 = log[-1]["test_coco_eval_bbox"][:2]
    assert log[-1]["train_loss"] < 0.25 * log[0]["train_loss"]
    assert ap50 > 0.9, f"AP50 {ap50:.3f} on four memorised images"
    assert ap > 0.5, f"AP {ap:.3f} on four memorised images"
