"""What a run says about itself before it begins."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from util.args import get_args_parser
from util.environment import describe_run


class Images(list):
    """As much of a data set as is described."""

    class_names = ("cat", "N/A", "dog")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--eval_batch_size 4", True),
        ("", False),
        ("--eval_batch_size 4 --augment lsj", False),
        ("--eval_batch_size 4 --dataset_file synthetic", False),
    ],
)
def test_an_evaluation_that_pads_images_says_so(capsys, flags: str, told: bool) -> None:
    args = get_args_parser().parse_args(["--num_classes", "3", *flags.split()])
    describe_run(args, torch.device("cpu"), nn.Linear(1, 1), None, Images([1, 2]))
    text = capsys.readouterr().out
    assert "2 validation images; 2 classes in 3 outputs: cat, dog" in text
    assert ("note: --eval_batch_size 4 pads images to one size" in text) == told
