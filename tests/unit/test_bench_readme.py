"""The tables of README.md's section on speed are what the files of the benchmarks say, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.speed_cases import MACHINE, OPERATOR, figure, step, write, write_one_of_each
from util.bench_readme import BEGIN, END, FOLDERS, filled, main, read_folder, section, short
from util.benchmark import main as benchmark
from util.errors import UserError

EXPECTED = """\
**Some CPU, 4 cores**; torch 2.9, python 3.11; 2026-01-02, load 0.2 before the first, commit abcdef0; figures in
`{folder}`

| command | what | plain way | ours | times as fast (spread) |
|---|---|---|---|---|
| `python ops/benchmark.py` | deformable attention, encoder of 800 x 1333 pixels, forward | grid_sample: 1048 ms | \
26.2 ms (AVX2) | 40.0 (20.0 to 60.0) |
|  | the same, forward and backward | grid_sample: 1048 ms | 26.2 ms (AVX2) | 40.0 (20.0 to 60.0) |
|  | deformable attention, encoder of 800 x 1333 pixels, bfloat16, batch 2, sampling anywhere, forward | \
grid_sample: 90.0 ms | 60.0 ms (CUDA) | 1.50 (0.75 to 2.2) |
| `python ops/benchmark.py --what layer` | the whole layer, encoder of 800 x 1333 pixels, 2 threads, forward and \
backward (keeps 1 in place of 2 MiB) | not fused: 150 ms | fused: 120 ms | 1.25 (0.62 to 1.88) |
| `python util/benchmark.py matching` | matching, batch 16, 7 layers, 300 queries, 20 objects | all pairs, SciPy: \
115 ms | 10.0 ms | 11.5 (5.8 to 17.2) |
|  | the solver alone, 8 times 1500 x 60, K = 6 | SciPy: 30.0 ms | 0.05 ms | 600 (300 to 900) |
| `python util/benchmark.py loader` | 640 x 480 JPEG, training augmentation, one core | PIL: 80.0 images/s | \
250 images/s | 3.1 (1.56 to 4.7) |
| `python util/benchmark.py eval` | evaluation, 1000 images, 100,000 detections, processor time | pycocotools: 11.4 s \
| hotcoco: 0.11 s | 100 (50.0 to 150) |

Whole training steps, `python util/benchmark.py step --batch_size 2`: random images with 7 objects; medians of 3;
memory: kept for the backward pass, parameters and gradients

| preset | images/s | ms a step (spread) | against the first | forward | losses | of it matching | backward \
| optimiser | attention | memory, GiB |
|---|---|---|---|---|---|---|---|---|---|---|
| `h_detr/a.sh` | 4.00 | 500 (450 to 650) | 1.00 | 40% | 1% | 0.4% | 50% | 9% | 25% | 1.50 |
| `b/c.sh --compile` | 2.00 | 1000 (900 to 1100) | 2.00 | 20% | 0.5% | 0.2% | 25% | 4% | 0.4% | 1.50 |"""


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    """Return a text with an old table between the markers."""
    file = tmp_path / "README.md"
    file.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return an empty folder."""
    (tmp_path / "cpu").mkdir()
    return tmp_path / "cpu"


def test_the_tables_of_known_figures_are_these(folder: Path) -> None:
    write_one_of_each(folder)
    found, expected = section([folder]), EXPECTED.replace("{folder}", folder.as_posix())
    assert " ".join(found.split()) == " ".join(expected.split())  # where lines break depends on the folder's name
    assert [line for line in found.splitlines() if line[:1] == "|"] == [
        x for x in expected.splitlines() if x[:1] == "|"
    ]


def test_a_benchmark_without_a_file_has_no_rows(folder: Path) -> None:
    write_one_of_each(folder)
    for name in ("matching", "step"):
        (folder / f"{name}.json").unlink()
    found = section([folder])
    assert "matching" not in found and "training steps" not in found
    assert "`python util/benchmark.py loader`" in found
    for name in ("operator", "layer", "loader"):
        (folder / f"{name}.json").unlink()
    assert len([line for line in section([folder]).splitlines() if line.startswith("|")]) == 3


def test_steps_of_one_preset_each_share_a_table_and_its_first_row_is_the_base(folder: Path) -> None:
    for name, ms, batch in (("step_b2_two_stage", 100, 2), ("step_b2_hybrid", 250, 2), ("step_b8_two_stage", 300, 8)):
        rows = [step(case={"preset": f"{name}.sh", "device": "cuda"}, step=[ms] * 3)]
        command = f"util/benchmark.py step --presets configs/{name}.sh --batch_size {batch}"
        write(folder, name, command, rows, device="cuda", machine=MACHINE | {"gpu": "H200"})
    found = section([folder])
    assert "`python util/benchmark.py step --presets PRESET --batch_size 2`" in found.replace("\n", " ")
    assert "--presets configs/step_b8_two_stage.sh --batch_size 8`" in found
    rows = [line.split(" | ")[:4] for line in found.splitlines() if line.startswith("| `")]
    assert [(row[0].strip("|` "), row[3]) for row in rows] == [
        ("step_b2_two_stage.sh", "1.00"),
        ("step_b2_hybrid.sh", "2.50"),
        ("step_b8_two_stage.sh", "1.00"),
    ]
    assert "**H200, CUDA unknown (host: Some CPU, 4 cores)**" in found and "what PyTorch allocates" in found


def test_figures_of_a_processor_do_not_name_the_gpu_beside_it(folder: Path) -> None:
    write(folder, "loader", "x.py", [], machine=MACHINE | {"gpu": "H200"}, versions={"torch": "2.9", "cuda": "13.0"})
    assert section([folder]).startswith("**Some CPU, 4 cores**;") and "H200" not in section([folder])


def test_only_the_text_between_the_markers_is_written_and_check_tells_a_difference(
    folder: Path, readme: Path, capsys: pytest.CaptureFixture
) -> None:
    write_one_of_each(folder)
    flags = ["readme", str(folder), "--file", str(readme)]
    assert benchmark([*flags, "--check"]) == 1 and readme.read_text().count("old") == 1
    assert "-old" in capsys.readouterr().out
    assert benchmark(flags) == 0
    assert readme.read_text() == f"before\n{BEGIN}\n{section([folder])}\n{END}\nafter\n"
    assert benchmark([*flags, "--check"]) == 0
    readme.write_text(readme.read_text().replace("40.0 (20.0", "41.0 (20.0"))
    assert benchmark([*flags, "--check"]) == 1
    assert "-| `python ops/benchmark.py` |" in capsys.readouterr().out


def test_memory_is_told_of_a_layer_that_keeps_less_than_the_other_and_only_with_a_backward_pass(folder: Path) -> None:
    cases = [("forward", [2**21, 2**20]), ("forward+backward", [2**20, 2**20]), ("forward+backward", [2**23, 2**22])]
    for mode, kept in cases:
        case = {**OPERATOR, "mode": mode}
        write(folder, "layer", "x.py", [figure("layer", case, 2, 1, kept=kept)])
        assert ("(keeps 4 in place of 8 MiB)" in section([folder])) == (kept[0] == 2**23)
        assert section([folder]).count("keeps") == (kept[0] == 2**23)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"quick": True}, r"b\.json was measured with --quick"),
        ({"machine": MACHINE | {"processor": "Another"}}, r"one folder for each machine"),
        ({"versions": {"torch": "2.6"}}, r"'2\.6'"),
        ({"device": "cuda"}, r"'cuda'"),
    ],
)
def test_figures_that_do_not_belong_into_the_readme_are_refused(folder: Path, more: dict, message: str) -> None:
    write(folder, "a", "x.py", [])
    write(folder, "b", "x.py", [], **more)
    with pytest.raises(UserError, match=message):
        read_folder(folder)


def test_other_files_no_files_and_missing_markers_are_named(folder: Path, readme: Path, capsys) -> None:
    with pytest.raises(UserError, match="holds no figures; measure them: python"):
        read_folder(folder)
    for content in ("{", "[]", "{}"):
        (folder / "a.json").write_text(content)
        assert main([str(folder), "--file", str(readme)]) == 2
        assert "a.json is no file of" in capsys.readouterr().err
    for text in ("", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}"):
        with pytest.raises(UserError, match="must each stand there once"):
            filled(text, "", "README.md")


@pytest.mark.parametrize(
    ("value", "text"),
    [(1048.4, "1048"), (25.84, "25.8"), (1.256, "1.26"), (0.123, "0.12"), (0.0512, "0.051"), (0, "0")],
)
def test_numbers_have_as_many_digits_as_a_reader_needs(value: float, text: str) -> None:
    assert short(value) == text


def test_the_readme_holds_what_the_committed_figures_say(capsys: pytest.CaptureFixture) -> None:
    if not any(FOLDERS.glob("*/*.json")):
        pytest.skip("no figures are committed in configs/speed")
    assert main(["--check"]) == 0, capsys.readouterr().out
