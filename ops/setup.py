"""Build the kernels ahead of time: `python ops/setup.py build_ext --inplace`.

Builds the CPU kernel, and the CUDA kernel where nvcc is found and a GPU is visible. Without a GPU (a container build, a
login node) set FORCE_CUDA=1 and, better, TORCH_CUDA_ARCH_LIST, for example "8.0;9.0".
"""

import os
import sys
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402

from ops import build  # noqa: E402


def wanted_kernels() -> list[str]:
    """Return the kernels to build.

    Raises:
        SystemExit: if FORCE_CUDA=1 asks for the CUDA kernel and it cannot be compiled.
    """
    host = ["cpu", "assignment"]
    forced = os.environ.get("FORCE_CUDA", "0") == "1"
    if not forced and not torch.cuda.is_available():
        print("ops: no GPU is visible, building for the CPU only (FORCE_CUDA=1 builds the cuda kernel too)")
        return host
    if reason := build.why_not_buildable("cuda"):
        if forced:
            sys.exit(f"ops: FORCE_CUDA=1, but the cuda kernel cannot be built: {reason}")
        print(f"ops: building for the CPU only: {reason}")
        return host
    return [*host, "cuda"]


def main() -> None:
    kernels = wanted_kernels()
    os.chdir(HERE)  # --inplace then puts the libraries beside build.py, which looks for them there
    with build.build_environment(kernels[-1]):
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

        extensions = [
            (CUDAExtension if kind == "cuda" else CppExtension)(
                build.library_name(kind),
                [f"csrc/{source}" for source in build.SOURCES[kind]],
                extra_compile_args=build.compile_flags(kind),
            )
            for kind in kernels
        ]
        setup(
            name="assigndetr-ops",
            version="0.1.0",
            py_modules=[],
            ext_modules=extensions,
            cmdclass={"build_ext": BuildExtension},
        )


if __name__ == "__main__":
    main()
