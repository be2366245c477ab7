"""`--plot_correspondence` on the command line: it changes no training, goes on after a stop, works in processes."""

from pathlib import Path

import numpy as np
import pytest

from tests.cli import finish, flags, run, start
from tests.test_resume import assert_same_run
from util.checkpoint import read_checkpoint, write_atomically
from util.correspondence import read_snapshots

MORE = "--matcher soft --dropout 0.1 --use_ema --save_every 1 --amp --no-eval_loss"


def epochs_of(folder: Path) -> dict[str, list[int]]:
    """Return the stored epochs by image."""
    images = sorted(path for path in folder.iterdir() if path.is_dir())
    return {image.name: [s.epoch for s in read_snapshots(image)] for image in images}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """A finished run of two epochs, two images drawn."""
    folder = tmp_path_factory.mktemp("drawn")
    assert run(folder, f"{MORE} --plot_correspondence 2") == 0
    return folder


def test_a_run_stores_and_draws_both_epochs_and_is_the_same_run(drawn, tmp_path):
    stored = epochs_of(drawn / "correspondence")
    assert len(stored) == 2 and all(epochs == [0, 1] for epochs in stored.values())
    assert all((drawn / "correspondence" / f"{image}.png").stat().st_size > 10_000 for image in stored)
    assert (drawn / "health.png").is_file()
    assert run(tmp_path, MORE) == 0
    assert not (tmp_path / "correspondence").exists()
    assert_same_run(drawn, tmp_path)


def test_a_resumed_run_continues_the_picture_and_replaces_what_it_does_again(drawn):
    folder = drawn / "correspondence"
    image = sorted(path for path in folder.iterdir() if path.is_dir())[0]
    files = [image / f"epoch_{epoch:04}.npz" for epoch in range(3)]
    first, second = (file.stat().st_mtime_ns for file in files[:2])
    picture = (folder / f"{image.name}.png").read_bytes()
    more = f"{MORE} --plot_correspondence 2 --epochs 3 --resume {drawn}/checkpoint0000.pth"
    assert run(drawn, more) == 0
    assert epochs_of(folder)[image.name] == [0, 1, 2]
    assert files[0].stat().st_mtime_ns == first and files[1].stat().st_mtime_ns > second
    assert (folder / f"{image.name}.png").read_bytes() != picture


def test_two_processes_see_what_one_sees(drawn, tmp_path):
    more = f"--matcher soft --plot_correspondence 3 --eval --resume {drawn}/checkpoint0001.pth"
    assert run(tmp_path / "one", more) == 0
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "main.py"]
    text = finish(start([*two, *flags(tmp_path / "two", more)]), seconds=300)
    assert "outputs are in" in text, text
    folders = [tmp_path / name / "correspondence_eval" for name in ("one", "two")]
    assert epochs_of(folders[0]) == epochs_of(folders[1])
    assert list(epochs_of(folders[0]).values()) == [[1]] * 3
    for image in epochs_of(folders[0]):
        one, other = (read_snapshots(folder / image)[0] for folder in folders)
        np.testing.assert_allclose(one.c, other.c, atol=2e-3)
        assert (folders[1] / f"{image}.png").is_file()


def test_a_file_without_the_matcher_is_refused(drawn, tmp_path, capsys):
    write_atomically({"model": read_checkpoint(drawn / "checkpoint.pth")["model"]}, tmp_path / "weights.pth")
    more = f"--matcher soft --plot_correspondence 2 --eval --resume {tmp_path}/weights.pth"
    assert run(tmp_path / "out", more) == 2
    error = capsys.readouterr().err
    assert "--plot_correspondence:" in error and "holds no learned matcher" in error
