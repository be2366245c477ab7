"""Presets and launchers: every preset gives flags the parser takes, published rows have the flags of their table."""

import json
import os
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from tests import published_rows
from tests.published_rows_co import CO_DETR
from tests.published_rows_co_dino import CO_DETR_ON_DINO
from tests.published_rows_dino import DAB_DINO
from tests.published_rows_soft import MATCH_FREE
from util.arg_rules import check_args
from util.args import get_args_parser

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
PRESETS = sorted(CONFIGS.rglob("*/*.sh"))
PUBLISHED = published_rows.PUBLISHED | CO_DETR | CO_DETR_ON_DINO | DAB_DINO | MATCH_FREE
SHELL_FILES = [*PRESETS, *sorted(CONFIGS.glob("*.sh")), ROOT / "tests" / "run.sh", ROOT / ".ci" / "run"]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT).with_suffix(""))


def row_of(preset: Path) -> str:
    """Return folder and name of a preset, as its row is called in `PUBLISHED`."""
    return str(preset.relative_to(CONFIGS).with_suffix(""))


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    ours = (
        "LAUNCH",
        "GPUS_",
        "SRUN_",
        "CPUS_",
        "OMP_",
        "DATA",
        "MASTER_",
        "NNODES",
        "NODE_RANK",
        "TRAIN_",
        "VAL_",
        "INIT",
    )
    kept = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=60)


def words_of(*command: str | Path, cwd: Path = ROOT, **environment: str) -> list[str]:
    """Return the words a shell file would start, one line each; `LAUNCH` prints them instead."""
    done = run(*command, cwd=cwd, **({"LAUNCH": r"printf %s\n"} | environment))
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def flags_of(preset: Path, *more: str, shell: str = "sh", **environment: str) -> list[str]:
    program, *flags = words_of(shell, preset, *more, **environment)
    assert program == "main.py"
    return flags


def parsed(flags: list[str]) -> Namespace:
    args = get_args_parser().parse_args(flags)
    check_args(args)
    return args


@pytest.fixture
def fake_programs(tmp_path: Path) -> str:
    """A PATH whose `python` and `srun` print their own name and arguments, one per line."""
    for name in ("python", "srun"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@"\n')
        program.chmod(0o755)
    return f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize("path", SHELL_FILES, ids=name_of)
def test_shell_files_are_executable_and_free_of_syntax_errors(path: Path) -> None:
    assert os.access(path, os.X_OK)
    first = path.read_text().splitlines()[0]
    if "bash" not in first:
        assert first == "#!/bin/sh"
        assert run("sh", "-n", path).returncode == 0
    assert run("bash", "-n", path).returncode == 0


@pytest.mark.parametrize("preset", PRESETS, ids=name_of)
def test_every_preset_gives_flags_that_are_accepted(preset: Path) -> None:
    args = parsed(flags_of(preset))
    assert args.output_dir == f"exps/{row_of(preset)}", "one folder per preset"


@pytest.mark.parametrize("preset", PRESETS, ids=name_of)
def test_presets_work_from_any_folder_in_any_shell(preset: Path, tmp_path: Path) -> None:
    reference = flags_of(preset)
    assert words_of("bash", preset, cwd=tmp_path)[1:] == reference
    assert words_of(preset, cwd=tmp_path)[1:] == reference
    assert words_of("sh", preset.name, cwd=preset.parent)[1:] == reference
    assert words_of("sh", os.path.relpath(preset, tmp_path), cwd=tmp_path)[1:] == reference


@pytest.mark.parametrize("preset", PRESETS, ids=name_of)
def test_main_is_started_in_the_top_folder(preset: Path, tmp_path: Path) -> None:
    script = tmp_path / "where.sh"
    script.write_text("pwd -P\n")
    assert words_of(preset, cwd=tmp_path, LAUNCH=f"sh {script}") == [str(ROOT)]


@pytest.mark.parametrize("preset", PRESETS, ids=name_of)
def test_flags_given_after_a_preset_win_and_keep_their_spaces(preset: Path) -> None:
    more = ["--output_dir", "two words", "--epochs", "3", "--no-two_stage", "--no-mixed_selection"]
    args = get_args_parser().parse_args(flags_of(preset, *more))
    assert (args.output_dir, args.epochs, args.two_stage) == ("two words", 3, False)


def test_without_launch_a_preset_runs_python_unbuffered(fake_programs: str) -> None:
    words = words_of("sh", PRESETS[0], PATH=fake_programs, LAUNCH="")
    assert words[:3] == ["python", "-u", "main.py"]


@pytest.mark.parametrize("row", PUBLISHED)
def test_published_rows_have_the_flags_of_their_table(row: str) -> None:
    args = vars(parsed(flags_of(CONFIGS / f"{row}.sh")))
    expected = vars(get_args_parser().parse_args([])) | PUBLISHED[row].flags | {"output_dir": f"exps/{row}"}
    assert args == expected


@pytest.mark.parametrize("row", PUBLISHED)
def test_headers_give_the_published_number_and_the_total_batch(row: str) -> None:
    ap, flags = PUBLISHED[row]
    header = "".join(line for line in (CONFIGS / f"{row}.sh").read_text().splitlines() if line.startswith("#"))
    assert re.findall(r"Published AP ([\d.]+\d(?: and [\d.]+\d)?)", header) == ([ap] if ap else [])
    assert f"Total batch {flags.get('recipe_batch_size', 32)}:" in header


@pytest.mark.parametrize(
    ("row", "percent"),
    [("baseline", 100), ("baseline_1.3x", 130), ("1800q", 100), ("1800q_1.15x", 115)]
    + [(scheme, 100) for scheme in ("branch", "epoch", "layer")],
)
def test_longer_columns_of_table_6_are_in_the_headers(row: str, percent: int) -> None:
    def scaled(number: int) -> int:
        return (number * percent + 50) // 100  # rounded to the nearest

    preset = CONFIGS / "h_detr" / "table6" / f"{row}.sh"
    columns = [f"--epochs {scaled(e)} --lr_drop {scaled(d)}" for e, d in ((24, 20), (36, 30))]
    assert re.findall(r"--epochs \d+ --lr_drop \d+(?= \(AP)", preset.read_text()) == columns
    args = parsed(flags_of(preset))
    assert (args.epochs, args.lr_drop) == (scaled(12), scaled(11))


def test_the_three_schemes_of_table_6_teach_the_same_number_of_positives() -> None:
    """H-DETR compares them at an equal budget: positives per object, summed over layers and epochs (section 4.3)."""
    names = ("baseline", "branch", "epoch", "layer")
    base, branch, epoch, layer = (parsed(flags_of(CONFIGS / "h_detr" / "table6" / f"{n}.sh")) for n in names)
    budget = base.epochs * base.dec_layers
    assert branch.epochs * branch.dec_layers * (1 + branch.k_one2many) == 7 * budget
    many = round(epoch.hybrid_rho * epoch.epochs)
    assert (many * epoch.hybrid_k + epoch.epochs - many) * epoch.dec_layers == 7 * budget
    single = layer.dec_layers - layer.hybrid_layers
    assert (layer.hybrid_layers * layer.hybrid_k + single) * layer.epochs == 7 * budget


def test_defaults_are_those_of_the_published_tables() -> None:
    args = get_args_parser().parse_args([])
    assert (args.epochs, args.lr_drop, args.batch_size, args.recipe_batch_size) == (50, 40, 2, 32)
    assert (args.lr, args.lr_backbone, args.weight_decay, args.clip_max_norm) == (2e-4, 2e-5, 1e-4, 0.1)
    assert (args.num_queries_one2one, args.dim_feedforward, args.dropout, args.backbone) == (300, 1024, 0.1, "resnet50")


def test_every_row_of_a_paper_has_its_preset_and_every_preset_its_row() -> None:
    of_papers = {row_of(p) for p in PRESETS if p.parent.name not in ("synthetic", "bccd", "finetune")}
    assert of_papers == set(PUBLISHED)


def expanded(pattern: str) -> list[str]:
    """Expand the braces of a shell: `k{0,1}.sh` is `k0.sh`, `k1.sh`."""
    braces = re.search(r"\{([^}]*)\}", pattern)
    if not braces:
        return [pattern]
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    return [name for word in braces[1].split(",") for name in expanded(before + word + after)]


def test_the_readme_lists_every_preset_with_its_published_number() -> None:
    lines = [line.split("|") for line in (CONFIGS / "README.md").read_text().splitlines() if line.startswith("| `")]
    listed = []
    for _, pattern, _, ap, batch, *_ in lines:
        presets = [name.removesuffix(".sh") for name in expanded(pattern.strip(" `"))]
        listed += presets
        rows = [PUBLISHED[name] for name in presets if name in PUBLISHED]
        numbers = re.findall(r"\d+\.\d", " ".join(row.ap for row in rows))
        assert re.findall(r"\d+\.\d", ap) == numbers, f"{pattern}: published AP"
        for row in rows:
            assert int(batch) == row.flags.get("recipe_batch_size", 32), f"{pattern}: total batch"
    assert sorted(listed) == sorted(map(row_of, PRESETS))


def test_the_blood_cell_preset_takes_its_folder_from_data() -> None:
    args = parsed(flags_of(CONFIGS / "bccd" / "r18_cpu.sh", DATA="/data/blood cells"))
    assert args.train_images == args.val_images == "/data/blood cells/images"
    assert args.val_json == "/data/blood cells/annotations/instances_val.json"
    default = parsed(flags_of(CONFIGS / "bccd" / "r18_cpu.sh", DATA=""))
    assert default.train_json == "./data/bccd/annotations/instances_train.json"


def test_the_blood_cell_preset_fits_the_layout_of_the_data_set() -> None:
    folder = ROOT.parent / "shared" / "data" / "bccd"
    if not folder.is_dir():
        pytest.skip("no shared data beside this checkout")
    args = parsed(flags_of(CONFIGS / "bccd" / "r18_cpu.sh", DATA=str(folder)))
    for path in (args.train_images, args.train_json, args.val_images, args.val_json):
        assert Path(path).exists(), path


def test_the_fine_tuning_preset_takes_every_path_from_the_environment() -> None:
    preset, names = CONFIGS / "finetune" / "custom.sh", ("train_images", "train_json", "val_images", "val_json")
    given = {name.upper(): f"/my data/{name}" for name in names}
    args = vars(parsed(flags_of(preset, **given)))
    assert [args[name] for name in names] == list(given.values())
    args = vars(parsed(flags_of(preset, DATA="/my data")))
    assert args["train_images"] == args["val_images"] == "/my data/images"
    assert args["train_json"] == "/my data/annotations/instances_train.json"
    assert args["val_json"] == "/my data/annotations/instances_val.json"


def test_the_pair_of_blood_cell_presets_differs_in_the_weights_it_starts_from() -> None:
    scratch, tuned = (
        vars(parsed(flags_of(CONFIGS / "bccd" / f"{name}_cpu.sh", INIT="a b.pth"))) for name in ("short", "finetune")
    )
    different = {name for name in scratch if scratch[name] != tuned[name]}
    assert different == {"output_dir", "init_from", "init_class_rows"} and tuned["init_from"] == "a b.pth"


def test_launch_dist_puts_torchrun_in_front(fake_programs: str) -> None:
    preset = CONFIGS / "synthetic" / "two_stage.sh"
    words = words_of(CONFIGS / "launch_dist.sh", "2", preset, "--seed", "7", PATH=fake_programs)
    at = words.index("main.py")
    assert words[:at] == shlex.split("python -m torch.distributed.run --standalone --nproc_per_node 2")
    assert parsed(words[at + 1 :]).seed == 7


def test_launch_nodes_gives_torchrun_the_address_and_rank(fake_programs: str) -> None:
    where = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "GPUS_PER_NODE": "4", "PATH": fake_programs}
    words = words_of(CONFIGS / "launch_nodes.sh", PRESETS[0], "--seed", "7", **where)
    at = words.index("main.py")
    assert words[:at] == shlex.split(
        "python -m torch.distributed.run --nnodes 2 --node_rank 1 --nproc_per_node 4"
        " --master_addr 10.0.0.1 --master_port 29500"
    )
    assert parsed(words[at + 1 :]).seed == 7


@pytest.mark.parametrize("missing", ["NNODES", "NODE_RANK", "MASTER_ADDR"])
def test_launch_nodes_names_the_variable_that_is_missing(missing: str) -> None:
    where = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"} | {missing: ""}
    done = run(CONFIGS / "launch_nodes.sh", PRESETS[0], **where)
    assert done.returncode != 0
    assert missing in done.stderr


def test_launch_slurm_asks_for_one_task_per_gpu(fake_programs: str) -> None:
    more = {"PATH": fake_programs, "SRUN_ARGS": "--time 60", "CPUS_PER_TASK": "3"}
    words = words_of(CONFIGS / "launch_slurm.sh", "part", "job", "16", PRESETS[0], "--seed", "7", **more)
    assert words == shlex.split(
        "srun --partition part --job-name job --ntasks 16 --ntasks-per-node 8 --gres gpu:8 --cpus-per-task 3"
        f" --kill-on-bad-exit=1 --time 60 sh {PRESETS[0]} --seed 7"
    )
    few = words_of(CONFIGS / "launch_slurm.sh", "part", "job", "2", PRESETS[0], PATH=fake_programs)
    assert few[few.index("--gres") + 1] == "gpu:2"


def test_launch_slurm_refuses_gpus_that_do_not_fill_the_machines() -> None:
    done = run(CONFIGS / "launch_slurm.sh", "part", "job", "12", PRESETS[0])
    assert done.returncode == 2
    assert "GPUS_PER_NODE" in done.stderr


@pytest.mark.parametrize("launcher", sorted(CONFIGS.glob("launch_*.sh")), ids=name_of)
def test_launchers_without_arguments_say_how_to_use_them(launcher: Path) -> None:
    done = run(launcher)
    assert done.returncode != 0
    assert "usage:" in done.stderr


def in_setup_env(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run("bash", "-c", f"set -euo pipefail; source configs/setup_env.sh; {script}", **environment)


def test_setup_uses_the_active_environment_and_installs_nothing_that_is_there(tmp_path: Path) -> None:
    if sys.prefix == sys.base_prefix:
        pytest.skip("the tests do not run in a virtual environment")
    script = f"setup_env {tmp_path / 'unused'} -r requirements.txt pytest; command -v python"
    done = in_setup_env(script, VIRTUAL_ENV=sys.prefix)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{sys.prefix}/bin/python"], "no line about an installation"
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize(
    ("requirement", "enough"), [("pytest>=1", True), ("pytest>=1000", False), ("no-such-package", False)]
)
def test_setup_sees_what_is_missing_or_too_old(tmp_path: Path, requirement: str, enough: bool) -> None:
    (tmp_path / "requirements.txt").write_text(f"# comment\n\n{requirement}  # why\n")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = in_setup_env(f"satisfied -r {tmp_path / 'requirements.txt'} pip", PATH=path)
    assert (done.returncode == 0) == enough, done.stderr


def test_setup_says_that_no_python_fits() -> None:
    done = in_setup_env('find_python "(9, 0)" "(9, 9)"')
    assert done.returncode == 1
    assert "no Python between (9, 0) and (9, 9)" in done.stderr


def test_condas_base_is_not_taken_for_an_environment_of_the_user() -> None:
    active = {"VIRTUAL_ENV": "", "CONDA_PREFIX": sys.prefix}
    assert in_setup_env("active_environment", CONDA_DEFAULT_ENV="base", **active).stdout == ""
    assert in_setup_env("active_environment", CONDA_DEFAULT_ENV="detr", **active).stdout.strip() == sys.prefix


@pytest.mark.parametrize("form", ["--output_dir {}", "--output_dir={}"])
def test_quickstart_ends_with_the_precision_of_its_run(tmp_path: Path, form: str) -> None:
    if sys.prefix == sys.base_prefix:
        pytest.skip("the tests do not run in a virtual environment")
    pytest.importorskip("matplotlib")
    entries = [{"epoch": 0, "train_loss": 2.0, "test_coco_eval_bbox": [0.1, 0.2] + [0.0] * 10}]
    entries += [{"epoch": 1, "train_loss": 1.0, "test_coco_eval_bbox": [0.6127, 0.9004] + [0.0] * 10}]
    training = tmp_path / "training.py"
    training.write_text(
        "import sys\nfrom pathlib import Path\nfrom util.args import get_args_parser\n"
        "args = get_args_parser().parse_args(sys.argv[2:])\nassert args.seed == 3 and args.two_stage\n"
        "folder = Path(args.output_dir)\nfolder.mkdir()\n"
        f"(folder / 'log.txt').write_text({chr(10).join(map(json.dumps, entries))!r})\n"
    )
    more = {"LAUNCH": f"{sys.executable} {training}", "VIRTUAL_ENV": sys.prefix, "PYTHONPATH": str(ROOT)}
    words = form.format(tmp_path / "run").split()
    done = run("bash", CONFIGS / "quickstart.sh", "--seed", "3", *words, cwd=tmp_path, **more)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "AP 0.613 AP50 0.900"
