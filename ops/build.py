"""Compile the C++ and CUDA kernels on first use, once per machine, and load them.

A kernel is looked for beside this file (`python ops/setup.py build_ext --inplace` puts it there), then in PyTorch's
extension cache (`TORCH_EXTENSIONS_DIR`, by default `~/.cache/torch_extensions`), and is compiled into that cache if it
is in neither. File names carry a key of the PyTorch version and the sources, so that a stale library is never loaded.

`ASSIGNDETR_OPS_BUILD` limits what may be compiled on first use: `all` (default), `none`, `cpu`, `cuda`. Libraries that
exist already are used in any case.
"""

import contextlib
import hashlib
import io
import logging
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

KERNELS = ("cpu", "cuda")  # of deformable attention, by device
SOURCES = {
    "cpu": ("ms_deform_attn.cpp",),
    "cuda": ("ms_deform_attn.cu", "cuda_assignment.cu", "cuda_costs.cu"),
    "assignment": ("assignment.cpp", "pair_cost.cpp"),  # of matching: costs and solver
}
BUILD_VARIABLE = "ASSIGNDETR_OPS_BUILD"
HOW_TO_BUILD = "python ops/setup.py build_ext --inplace"
# For a build without a GPU in sight and without TORCH_CUDA_ARCH_LIST; PTX covers later cards.
DEFAULT_ARCHITECTURES = "7.5;8.0;8.6;8.9;9.0+PTX"

_HERE = Path(__file__).resolve().parent
_CSRC = _HERE / "csrc"


class BuildError(RuntimeError):
    """A kernel cannot be compiled or loaded; the message is one line and says why."""


def library_name(kind: str) -> str:
    """Return the file name, without ending, of the library for the kernel `kind`, one of `SOURCES`."""
    key = hashlib.sha256(f"{torch.__version__} {sysconfig.get_platform()} {compile_flags(kind)}".encode())
    for source in sorted(_CSRC.iterdir()):
        owner = source.stem.partition("_")[0]  # cpu_kernels.h belongs to the cpu kernel alone, check.h to all
        if source.name in SOURCES[kind] or (source.suffix == ".h" and (owner == kind or owner not in SOURCES)):
            key.update(source.read_bytes())
    return f"assigndetr_{kind}_{key.hexdigest()[:12]}"


def compile_flags(kind: str) -> dict[str, list[str]]:
    """Return the compiler's extra flags, under "cxx" and, for "cuda", "nvcc"."""
    if sys.platform == "win32":
        flags = ["/O2"]
    else:
        # With OpenMP at compile time only: the symbols then come from the OpenMP library PyTorch has already loaded,
        # so that torch.set_num_threads holds for these kernels too.
        flags = ["-O3", *([] if sys.platform == "darwin" else ["-fopenmp"])]
        if kind == "assignment":
            flags.append("-fno-trapping-math")  # changes no number; GCC makes no vector code of comparisons without it
    return {"cxx": flags, "nvcc": ["-O3"]} if kind == "cuda" else {"cxx": flags}


def built_library(kind: str) -> Path | None:
    """Return the library for these sources and this PyTorch if it has been built already."""
    name = library_name(kind)
    candidates = sorted(_HERE.glob(f"{name}*.so")) + sorted(_HERE.glob(f"{name}*.pyd"))
    candidates.append(_cache_folder(kind) / f"{name}{_library_ending()}")
    return next((path for path in candidates if path.is_file()), None)


def why_not_buildable(kind: str) -> str | None:
    """Return in a few words why the kernel cannot be compiled here, None if it can. Compiles nothing."""
    if _find_ninja() is None:
        return "ninja was not found (pip install ninja)"
    compiler = os.environ.get("CXX", "cl" if sys.platform == "win32" else "c++").split()
    if not compiler or shutil.which(compiler[0]) is None:
        return f"no C++ compiler '{' '.join(compiler)}' was found (install g++ or set CXX)"
    return why_no_nvcc() if kind == "cuda" else None


def why_not_on_first_use(kind: str) -> str | None:
    """Return why the kernel may not or cannot be compiled when it is first used, None if it can."""
    allowed = os.environ.get(BUILD_VARIABLE, "all")
    if allowed not in ("all", "none", *KERNELS):
        return f"{BUILD_VARIABLE} must be all, none, cpu or cuda, found '{allowed}'"
    if allowed not in ("all", "cpu" if kind == "assignment" else kind):
        return f"it is not built, and {BUILD_VARIABLE}={allowed} forbids compiling on first use"
    return why_not_buildable(kind)


def why_no_nvcc() -> str | None:
    """Return why CUDA sources cannot be compiled for this PyTorch, None if they can. Needs no GPU."""
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} was built without CUDA"
    home = find_cuda_home()
    if home is None:
        return f"nvcc was not found (install the CUDA {torch.version.cuda} toolkit, or set CUDA_HOME)"
    try:
        text = subprocess.run([home / "bin" / "nvcc", "-V"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        return f"{home}/bin/nvcc does not run ({error})"
    release = re.search(r"release (\d+)\.(\d+)", text)
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        found = f"{release[1]}.{release[2]}" if release else "unknown"
        return f"{home}/bin/nvcc has CUDA {found}, PyTorch needs {torch.version.cuda} (set CUDA_HOME)"
    return None


def find_cuda_home() -> Path | None:
    """Return the CUDA toolkit's folder: CUDA_HOME, else where nvcc on PATH really lies, else /usr/local/cuda.

    PyTorch takes the folder above an nvcc on PATH as it is; for a link or script in /usr/local/bin it then looks for
    the headers in the wrong place. A toolkit counts if it has them.
    """
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):
        candidates.append(str(Path(nvcc).resolve().parents[1]))
    candidates.append("/usr/local/cuda")
    for home in (Path(candidate) for candidate in candidates if candidate):
        headers = [home / "include" / "cuda_runtime.h", *home.glob("targets/*/include/cuda_runtime.h")]
        if shutil.which("nvcc", path=str(home / "bin")) and any(header.is_file() for header in headers):
            return home
    return None


def load(kind: str) -> None:
    """Make `torch.ops.assigndetr_ext.{forward,backward}_{kind}` callable; compile them if that was not done before.

    Safe when several processes start at once: one compiles, the others wait for it.

    Raises:
        BuildError: if there is no library and it may not or cannot be compiled, or it does not load.
    """
    path = built_library(kind)
    if path is None:
        if reason := why_not_on_first_use(kind):
            raise BuildError(reason)
        path = _compile_once(kind)
        if path is None:
            return
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise BuildError(f"{path} does not load: {str(error).splitlines()[0]}") from error


@contextlib.contextmanager
def build_environment(kind: str) -> Iterator[None]:
    """Let PyTorch's extension builder find ninja and, for "cuda", the toolkit and the architectures to build for."""
    cpp_extension = _import_cpp_extension()
    saved = {name: os.environ.get(name) for name in ("PATH", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST")}
    saved_home = cpp_extension.CUDA_HOME
    try:
        if ninja := _find_ninja():
            os.environ["PATH"] = f"{ninja.parent}{os.pathsep}{os.environ.get('PATH', '')}"
        if kind == "cuda":
            cpp_extension.CUDA_HOME = os.environ["CUDA_HOME"] = str(find_cuda_home())
            if not _asked_architectures():  # PyTorch then takes those of the GPUs here
                os.environ.pop("TORCH_CUDA_ARCH_LIST", None)
                if not torch.cuda.is_available():
                    os.environ["TORCH_CUDA_ARCH_LIST"] = DEFAULT_ARCHITECTURES
        yield
    finally:
        cpp_extension.CUDA_HOME = saved_home
        for name, value in saved.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _compile_once(kind: str) -> Path | None:
    """Return the library if another process has compiled it meanwhile; None if this one has, and so has it loaded.

    Loading the same operators from two files would end the process.
    """
    folder, begin = _cache_folder(kind), time.time()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{kind}.lock"):
            path, log = built_library(kind), _log_of(kind, folder)
            if path is None:
                if log.is_file() and log.stat().st_mtime >= begin:  # another process failed while this one waited
                    raise BuildError(_in_one_line(log))
                _compile(kind, folder)
            return path
    except OSError as error:
        raise BuildError(f"the build folder {folder} cannot be used: {error} (set TORCH_EXTENSIONS_DIR)") from error


def _compile(kind: str, folder: Path) -> None:
    cpp_extension = _import_cpp_extension()
    name = library_name(kind)
    print(f"ops: compiling the {kind} kernel, once for this machine (about a minute) ...", file=sys.stderr, flush=True)
    started = time.perf_counter()
    flags = compile_flags(kind)
    with tempfile.TemporaryDirectory(prefix=f"{name}_", dir=folder, ignore_cleanup_errors=True) as scratch:
        try:
            with build_environment(kind):
                cpp_extension.load(
                    name,
                    [str(_CSRC / source) for source in SOURCES[kind]],
                    extra_cflags=flags["cxx"],
                    extra_cuda_cflags=flags.get("nvcc"),
                    build_directory=scratch,
                    with_cuda=kind == "cuda",
                    is_python_module=False,
                )
        except Exception as error:  # compilers fail in many ways; what matters is that training goes on
            log = _log_of(kind, folder)
            log.write_text(str(error))
            raise BuildError(_in_one_line(log)) from error
        # Complete libraries only, under the final name: a process killed while linking leaves nothing behind.
        built = next(path for path in Path(scratch).iterdir() if path.suffix in (".so", ".pyd"))
        path = folder / f"{name}{_library_ending()}"
        os.replace(built, path)
    print(f"ops: compiled in {time.perf_counter() - started:.0f} s: {path}", file=sys.stderr, flush=True)


def _log_of(kind: str, folder: Path) -> Path:
    return folder / f"{library_name(kind)}.log"


def _in_one_line(log: Path) -> str:
    return f"{_first_error(log.read_text())} (whole output: {log})"


def _cache_folder(kind: str) -> Path:
    """Return the folder for libraries built on first use; for "cuda" one per set of GPU architectures."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or _import_cpp_extension().get_default_build_root()
    folder = Path(root) / "assigndetr_ops"
    if kind != "cuda":
        return folder
    architectures = _asked_architectures()
    if not architectures and torch.cuda.is_available():
        found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        architectures = ";".join(f"{major}.{minor}" for major, minor in sorted(found))
    return folder / "sm_{}".format(re.sub(r"[^0-9A-Za-z]+", "_", architectures or DEFAULT_ARCHITECTURES))


def _asked_architectures() -> str:
    """Return the architectures that TORCH_CUDA_ARCH_LIST names; "native", those of the GPUs here, names none."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    return "" if asked == "native" else asked


def _import_cpp_extension() -> ModuleType:
    """Import PyTorch's extension builder late (it is slow) and without its warning about a toolkit without a GPU."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # PyTorch 2.6 prints it
            from torch.utils import cpp_extension
    finally:
        logger.setLevel(level)
    return cpp_extension


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that the system releases if this process dies. Does nothing where there are no such locks."""
    try:
        import fcntl
    except ImportError:  # Windows: PyTorch's own lock has to do
        yield
        return
    with open(path, "w") as file:
        # Some network file systems have no locks; then two processes may both compile, into folders of their own.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _find_ninja() -> Path | None:
    """Return the ninja program: on PATH, beside this Python, or inside the ninja package."""
    places = [None, str(Path(sys.executable).parent)]
    with contextlib.suppress(ImportError):
        import ninja

        places.append(str(ninja.BIN_DIR))
    found = next((program for place in places if (program := shutil.which("ninja", path=place))), None)
    return Path(found) if found else None


def _first_error(output: str) -> str:
    """Return the line of a build's output that names the error."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    named = [line for line in lines if re.search(r"\b(error|undefined reference|cannot find)\b", line, re.IGNORECASE)]
    # The first line is PyTorch's "Error building extension ..."; the compiler's own comes later.
    named = [line for line in named if not line.startswith("Error building")]
    return [*named, *lines, "no output"][0][:200]


def _library_ending() -> str:
    return ".pyd" if sys.platform == "win32" else ".so"
