"""Building, caching and choosing the kernels: each test that builds works on a copy of the package in a new process."""

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

import ops
from ops import build, selection

PACKAGE = Path(ops.__file__).resolve().parent
ATTEND = """
import torch, ops
value, locations, weights = torch.ones(1, 4, 1, 2), torch.full((1, 1, 1, 1, 1, 2), 0.5), torch.ones(1, 1, 1, 1, 1)
for _ in range(2):
    print(ops.ms_deform_attn(value, [(2, 2)], locations, weights).flatten().tolist())
print(ops.active_backend("cpu"))
"""
ATTENDED = "[1.0, 1.0]\n[1.0, 1.0]\n"
needs_compiler = pytest.mark.skipif(
    build.why_not_buildable("cpu") is not None, reason=f"no C++ build here: {build.why_not_buildable('cpu')}"
)


@pytest.fixture
def project(tmp_path):
    """A folder with a copy of the package's sources, without libraries, and an empty build cache."""
    shutil.copytree(PACKAGE, tmp_path / "ops", ignore=shutil.ignore_patterns("*.so", "build", "__pycache__"))
    return tmp_path


def python(project, *command, **variables):
    """Run Python in the project; return standard output and the lines of standard error that `ops` wrote."""
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(project / "cache"), "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(project)}
    for name in (selection.VARIABLE, build.BUILD_VARIABLE, "LOCAL_RANK", "FORCE_CUDA"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, *command], cwd=project, env=environment | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if line.strip()]


def libraries(project):
    return [path for path in project.rglob("*.so") if path.is_file()]


def test_importing_and_building_a_layer_compiles_nothing(project):
    text = "import ops, sys; ops.MSDeformAttn(16); print(ops.backends()[0], 'torch.utils.cpp_extension' in sys.modules)"
    output, errors = python(project, "-c", text)
    assert output.startswith("reference")
    assert errors == []
    assert not (project / "cache").exists()


@needs_compiler
def test_the_first_use_compiles_says_so_and_the_second_process_finds_the_library(project):
    output, errors = python(project, "-c", ATTEND)
    assert output == ATTENDED + "cpu\n"
    assert len(errors) == 2
    assert errors[0].startswith("ops: compiling the cpu kernel") and errors[1].startswith("ops: compiled in")
    assert len(libraries(project)) == 1
    # Neither compiler nor ninja are needed any more.
    assert python(project, "-c", ATTEND, CXX="no-such-compiler") == (ATTENDED + "cpu\n", [])
    # A change of the sources is a new library.
    with open(project / "ops" / "csrc" / "bilinear.h", "a") as file:
        file.write("// changed\n")
    assert python(project, "-c", "from ops import build; print(build.built_library('cpu'))")[0] == "None\n"


@needs_compiler
def test_of_several_processes_that_start_at_once_one_compiles(project):
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda _: python(project, "-c", ATTEND), range(3)))
    assert [output for output, _ in results] == [ATTENDED + "cpu\n"] * 3
    said = [line for _, errors in results for line in errors]
    assert len([line for line in said if "compiling" in line]) == 1
    assert len(libraries(project)) == 1


def test_without_a_compiler_one_line_says_so_and_the_reference_computes(project):
    output, errors = python(project, "-c", ATTEND, CXX="no-such-compiler")
    assert output == ATTENDED + "reference\n"
    assert len(errors) == 1
    for part in ("no cpu kernel", "reference", "no-such-compiler", "python ops/setup.py build_ext --inplace"):
        assert part in errors[0]


@needs_compiler
def test_a_failed_compilation_falls_back_with_the_compilers_own_error_on_one_line(project):
    with open(project / "ops" / "csrc" / "ms_deform_attn.cpp", "a") as file:
        file.write("#error broken on purpose\n")
    output, errors = python(project, "-c", ATTEND)
    assert output == ATTENDED + "reference\n"
    assert len(errors) == 2 and errors[0].startswith("ops: compiling")
    assert "broken on purpose" in errors[1] and "python ops/setup.py" in errors[1]
    logs = list((project / "cache").rglob("*.log"))
    assert len(logs) == 1 and str(logs[0]) in errors[1] and "broken on purpose" in logs[0].read_text()
    assert libraries(project) == []


@pytest.mark.parametrize("meanwhile", [True, False])
def test_who_waited_for_a_compilation_that_failed_does_not_repeat_it(tmp_path, monkeypatch, meanwhile):
    log = tmp_path / "assigndetr_ops" / f"{build.library_name('cpu')}.log"
    log.parent.mkdir()

    @contextmanager
    def wait(path):
        log.write_text("x.cpp:1: error: out of luck\n")
        os.utime(log, (time.time() + (1 if meanwhile else -1000),) * 2)
        yield

    tried = []
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(build, "built_library", lambda kind: None)
    monkeypatch.setattr(build, "_locked", wait)
    monkeypatch.setattr(build, "_compile", lambda kind, folder: tried.append(kind))
    with pytest.raises(build.BuildError, match=r"out of luck.*\.log") if meanwhile else nullcontext():
        build.load("cpu")
    assert tried == ([] if meanwhile else ["cpu"])


def test_only_the_first_process_of_a_machine_reports_the_fallback(project):
    output, errors = python(project, "-c", ATTEND, CXX="no-such-compiler", LOCAL_RANK="1")
    assert output == ATTENDED + "reference\n" and errors == []


def test_compiling_on_first_use_can_be_switched_off(project):
    text = ATTEND + "print(ops.backends())"
    output, errors = python(project, "-c", text, ASSIGNDETR_OPS_BUILD="none")
    assert output == ATTENDED + "reference\n('reference',)\n"
    assert len(errors) == 1 and "ASSIGNDETR_OPS_BUILD=none" in errors[0]
    assert libraries(project) == []


def test_the_environment_variable_forces_a_backend_without_a_word(project):
    assert python(project, "-c", ATTEND, ASSIGNDETR_OPS_BACKEND="reference") == (ATTENDED + "reference\n", [])


@needs_compiler
def test_the_kernel_built_ahead_of_time_is_used_without_a_compiler(project):
    python(project, "ops/setup.py", "build_ext", "--inplace", CUDA_VISIBLE_DEVICES="")
    built = list((project / "ops").glob("assigndetr_cpu_*.so"))
    assert len(built) == 1
    found = python(project, "-c", ATTEND, CXX="no-such-compiler", ASSIGNDETR_OPS_BUILD="none")
    assert found == (ATTENDED + "cpu\n", [])


@pytest.mark.skipif(build.why_no_nvcc() is not None, reason=f"no CUDA build here: {build.why_no_nvcc()}")
@needs_compiler
def test_the_cuda_sources_compile_link_and_load_without_a_gpu(monkeypatch):
    # In the user's own cache, so that it compiles once for each version of the sources. Where there is a GPU, other
    # tests of this process load the library for it, and a second one with the same operators would be an error.
    if not torch.cuda.is_available():
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    monkeypatch.delenv(build.BUILD_VARIABLE, raising=False)
    build.load("cuda")
    value = torch.ones(1, 1, 1, 1)
    for call in (
        lambda: torch.ops.assigndetr_ext.forward_cuda(value, [1, 1], value, value),
        lambda: torch.ops.assigndetr_ext.backward_cuda(value, value, [1, 1], value, value),
    ):
        with pytest.raises(ValueError, match="needs tensors on a GPU, found cpu"):
            call()
    with pytest.raises(ValueError, match="costs must be on a GPU, found cpu"):
        torch.ops.assigndetr_ext.assign_cuda(torch.zeros(1), torch.zeros(0, 5, dtype=torch.int64), 1e6)


def fake_toolkit(folder, release):
    """Write a CUDA toolkit that consists of a version and one empty header."""
    (folder / "bin").mkdir(parents=True)
    (folder / "include").mkdir()
    (folder / "include" / "cuda_runtime.h").touch()
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    nvcc.chmod(0o755)
    return folder


def test_a_toolkit_of_another_major_version_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.4")
    monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(tmp_path / "cuda", "11.8")))
    assert "has CUDA 11.8, PyTorch needs 12.4" in build.why_no_nvcc()
    monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(tmp_path / "newer", "12.1")))
    assert build.why_no_nvcc() is None


def test_a_list_of_architectures_that_says_native_has_a_folder_for_each_kind_of_gpu(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "native")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for capability in ((8, 0), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert build._cache_folder("cuda").name == "sm_{}_{}".format(*capability)


def test_pytorch_without_cuda_is_named(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in build.why_no_nvcc()


def test_the_toolkit_is_found_behind_a_link_to_nvcc(tmp_path, monkeypatch):
    toolkit = fake_toolkit(tmp_path / "toolkit", "12.4")
    (tmp_path / "usr" / "bin").mkdir(parents=True)
    (tmp_path / "usr" / "bin" / "nvcc").symlink_to(toolkit / "bin" / "nvcc")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "usr" / "bin"))
    assert build.find_cuda_home() == toolkit


def test_ninja_is_found_beside_python_when_it_is_not_on_the_path(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "ninja"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", sys.executable)  # any program
    monkeypatch.setitem(sys.modules, "ninja", None)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nowhere" / "python"))
    assert "ninja was not found" in build.why_not_buildable("cpu")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    assert build.why_not_buildable("cpu") is None


@pytest.fixture
def automatic(monkeypatch):
    monkeypatch.delenv(selection.VARIABLE, raising=False)
    ops.set_backend("auto")
    yield
    ops.set_backend("auto")


def test_the_reference_is_always_available_and_can_be_forced(automatic):
    assert "reference" in ops.backends()
    ops.set_backend("reference")
    assert ops.active_backend("cpu") == ops.active_backend("cuda") == "reference"


def test_devices_without_a_kernel_use_the_reference(automatic):
    assert ops.active_backend("mps") == "reference"


def test_an_unknown_backend_is_refused_with_the_allowed_names(automatic, monkeypatch):
    with pytest.raises(ValueError, match="unknown ops backend 'fast'; allowed: auto, reference, cpu, cuda"):
        ops.set_backend("fast")
    monkeypatch.setenv(selection.VARIABLE, "quick")
    with pytest.raises(ValueError, match="ASSIGNDETR_OPS_BACKEND is 'quick'; allowed: auto, reference, cpu, cuda"):
        ops.active_backend("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is visible")
def test_forcing_cuda_without_a_gpu_is_refused(automatic):
    with pytest.raises(ValueError, match=r"'cuda' is not available: PyTorch sees no GPU\. Available: reference"):
        ops.set_backend("cuda")


def test_a_forced_kernel_refuses_tensors_of_another_device(automatic, monkeypatch):
    monkeypatch.setenv(selection.VARIABLE, "cuda")
    with pytest.raises(ValueError, match="'cuda' is forced, but the tensors are on 'cpu'"):
        ops.MSDeformAttn(8, 1, 1, 1)(torch.ones(1, 1, 8), torch.ones(1, 1, 1, 2), torch.ones(1, 1, 8), [(1, 1)])


def test_a_forced_kernel_that_cannot_be_built_is_an_error_not_a_fallback(project):
    text = """
import ops
for act in (lambda: ops.set_backend("cpu"), lambda: ops.active_backend("cpu")):
    try:
        act()
    except ValueError as error:
        print(error)
"""
    output, errors = python(project, "-c", text, CXX="no-such-compiler", ASSIGNDETR_OPS_BACKEND="cpu")
    assert errors == []
    assert len(output.splitlines()) == 2
    assert all("not available" in line and "no-such-compiler" in line for line in output.splitlines())
