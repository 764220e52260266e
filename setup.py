"""Builds the compiled backends; everything else is in pyproject.toml.

FUSED_OPTIM_BUILD=auto  what this machine has compilers for; what fails is left out (default)
                  none  nothing: Triton and eager remain
                  cpu   the CPU backend, or fail
                  cuda  the CPU and CUDA backends, or fail
FUSED_OPTIM_CUDA_ARCHS  compute capabilities, by default "80,90"; PTX is added for the last.
CUDA_HOME               where nvcc is, if not on the PATH.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, ExecError, SetupError

MODES = ("auto", "none", "cpu", "cuda")
MODE = os.environ.get("FUSED_OPTIM_BUILD", "auto")
ARCHS = os.environ.get("FUSED_OPTIM_CUDA_ARCHS", "80,90").replace(";", ",").split(",")
HEADERS = sorted(str(p) for p in Path("csrc").glob("**/*.h"))

# Each operation is rounded once, and nothing may depend on errno or traps, which would keep
# sqrt and the selects from being vectorised.
EXACT = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
NVCC_EXACT = ["-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true"]


def nvcc_path() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidate = Path(home, "bin", "nvcc") if home else None
    return str(candidate) if candidate and candidate.exists() else shutil.which("nvcc")


def cuda_home(nvcc: str) -> Path:
    """The toolkit that nvcc belongs to, as nvcc itself says: the command may be a wrapper."""
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    for line in dry.stderr.splitlines():
        if line.startswith("#$ TOP="):
            return Path(line.removeprefix("#$ TOP=")).resolve()
    return Path(nvcc).resolve().parent.parent


class BuildExt(build_ext):
    def build_extension(self, ext: Extension) -> None:
        if ext.name.endswith("_cuda"):
            self._compile_cuda(ext)
        elif self._accepts("-fopenmp"):
            ext.extra_compile_args.append("-fopenmp")
            ext.extra_link_args.append("-fopenmp")
        super().build_extension(ext)

    def _accepts(self, flag: str) -> bool:
        """Whether the compiler takes a flag; Apple's clang knows no -fopenmp."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "empty.cpp")
            source.write_text("int main() { return 0; }\n")
            try:
                objects = self.compiler.compile([str(source)], folder, extra_postargs=[flag])
                self.compiler.link_executable(objects, "empty", folder, extra_postargs=[flag])
            except Exception as error:  # each compiler class of setuptools raises its own
                self.announce(f"{flag} is not available: {error}", 2)
                return False
        return True

    def _compile_cuda(self, ext: Extension) -> None:
        nvcc = nvcc_path()
        if nvcc is None:
            raise CompileError("FUSED_OPTIM_BUILD=cuda needs nvcc on the PATH or under CUDA_HOME")
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / "step_cuda.o"
        targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHS]
        targets.append(f"-gencode=arch=compute_{ARCHS[-1]},code=compute_{ARCHS[-1]}")
        command = [nvcc, "-c", "-O3", "-std=c++17", *NVCC_EXACT, *targets]
        command += ["-Xcompiler=-fPIC,-fvisibility=hidden", "csrc/step_cuda.cu", "-o", str(target)]
        try:
            self.spawn(command)
        except ExecError as error:
            raise CompileError(str(error)) from error
        home = cuda_home(nvcc)
        ext.extra_objects.append(str(target))
        ext.library_dirs += [str(p) for p in (home / "lib64", home / "lib", home / "targets/x86_64-linux/lib") if p.exists()]
        ext.libraries += ["cudart_static", "dl", "rt", "pthread"]


def extension(name: str, sources: list[str]) -> Extension:
    return Extension(
        f"fused_optim.{name}",
        sources,
        depends=[*HEADERS, "csrc/step_cuda.cu"],
        include_dirs=["csrc", pybind11.get_include()],
        language="c++",
        extra_compile_args=["-std=c++17", "-O3", "-fvisibility=hidden", *EXACT],
        optional=MODE == "auto",
    )


def extensions() -> list[Extension]:
    if MODE not in MODES:
        raise SetupError(f"FUSED_OPTIM_BUILD must be one of {MODES}, got {MODE!r}")
    found = []
    if MODE != "none" and sys.platform != "win32":
        sources = [f"csrc/step_cpu_{isa}.cpp" for isa in ("baseline", "avx2", "avx512")]
        found.append(extension("_cpu", ["csrc/bindings_cpu.cpp", *sources]))
    if MODE == "cuda" or (MODE == "auto" and nvcc_path() is not None):
        found.append(extension("_cuda", ["csrc/bindings_cuda.cpp"]))
    return found


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExt})
