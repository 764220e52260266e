"""Builds the compiled backends; everything else is in pyproject.toml.

FUSED_OPTIM_BUILD=auto  what this machine has compilers for; what fails is left out (default)
                  none  nothing: Triton and eager remain
                  cpu   the CPU backend, or fail
                  cuda  the CPU and CUDA backends, or fail
FUSED_OPTIM_CUDA_ARCHS  compute capabilities, by default "80,90"; PTX is added for the last.
CUDA_HOME               where nvcc is, if not on the PATH.
CXX                     the C++ compiler, if not Python's own; NVCC_CCBIN is nvcc's.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, ExecError, LinkError, SetupError

MODES = ("auto", "none", "cpu", "cuda")
MODE = os.environ.get("FUSED_OPTIM_BUILD") or "auto"
ARCHS = re.split("[,; ]+", (os.environ.get("FUSED_OPTIM_CUDA_ARCHS") or "80,90").strip(",; "))

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
    command = [nvcc, "--dryrun", "-x", "cu", os.devnull]
    dry = subprocess.run(command, capture_output=True, text=True, check=False)
    for line in dry.stderr.splitlines():
        if line.startswith("#$ TOP="):
            return Path(line.removeprefix("#$ TOP=")).resolve()
    return Path(nvcc).resolve().parent.parent


class BuildPy(build_py):
    def run(self) -> None:
        # What an earlier build left would be packed, or imported, as if it were of this one.
        folder = "fused_optim" if self.editable_mode else os.path.join(self.build_lib, "fused_optim")
        for name in ("_cpu", "_cuda"):
            Path(folder, name + sysconfig.get_config_var("EXT_SUFFIX")).unlink(missing_ok=True)
        super().run()


class BuildExt(build_ext):
    def build_extension(self, ext: Extension) -> None:
        # An earlier build may have been by other compilers, for other GPUs, from other headers.
        self.force = True
        problem = self._problem_with("-std=c++17")
        if problem is not None:
            raise CompileError(f"{ext.name} needs a C++17 compiler (CXX names one), but {problem}")
        if ext.name.endswith("_cuda"):
            self._compile_cuda(ext)
        elif (problem := self._problem_with("-fopenmp")) is None:
            ext.extra_compile_args.append("-fopenmp")
            ext.extra_link_args.append("-fopenmp")
        else:
            self.warn(f"{ext.name} will use one thread: the compiler has no OpenMP ({problem})")
        super().build_extension(ext)

    def _problem_with(self, flag: str) -> str | None:
        """Why the compiler does not take a flag; Apple's clang, say, knows no -fopenmp."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "empty.cpp")
            source.write_text("int main() { return 0; }\n")
            try:
                objects = self.compiler.compile([str(source)], folder, extra_postargs=[flag])
                self.compiler.link_executable(
                    objects, "empty", folder, extra_postargs=[flag], target_lang="c++"
                )
            except (CompileError, LinkError) as error:
                return str(error)
        return None

    def _compile_cuda(self, ext: Extension) -> None:
        nvcc = nvcc_path()
        if nvcc is None:
            raise CompileError(f"{ext.name} needs nvcc, which is neither on the PATH nor under CUDA_HOME")
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHS]
        targets.append(f"-gencode=arch=compute_{ARCHS[-1]},code=compute_{ARCHS[-1]}")
        command = [nvcc, "-c", "-O3", "-std=c++17", *NVCC_EXACT, *targets]
        # Compressed, the kernels take 4 MB in place of 16.
        command += ["-Xfatbin=-compress-all", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        units = [["csrc/step_cuda.cu"]]
        units += [["csrc/step_cuda_kernels.cu", f"-DFUSED_OPTIM_PART={part}"] for part in (1, 2, 4, 8)]
        objects = [str(folder / f"step_cuda_{i}.o") for i in range(len(units))]

        # Side by side, for together they are a minute of work.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = [pool.submit(self.spawn, [*command, *u, "-o", o]) for u, o in zip(units, objects)]
        try:
            for job in jobs:
                job.result()
        except ExecError as error:
            raise CompileError(
                f"nvcc does not compile for compute capabilities {', '.join(ARCHS)}: {error}"
            ) from error
        home = cuda_home(nvcc)
        libraries = (home / "lib64", home / "lib", home / "targets/x86_64-linux/lib")
        ext.extra_objects += objects
        ext.library_dirs += [str(p) for p in libraries if p.exists()]
        ext.libraries += ["cudart_static", "dl", "rt", "pthread"]


def extension(name: str, sources: list[str]) -> Extension:
    return Extension(
        f"fused_optim.{name}",
        sources,
        include_dirs=["csrc", pybind11.get_include()],
        language="c++",
        # Vectors are arguments of inlined functions alone: how they would be passed is no matter.
        extra_compile_args=[
            "-std=c++17",
            "-O3",
            "-g0",  # of functions that are all inlined it would take half of the compiler's time
            "-fvisibility=hidden",
            "-fopenmp-simd",
            "-Wno-psabi",
            *EXACT,
        ],
        # Addresses of functions are read-only from the start on.
        extra_link_args=["-Wl,-z,relro,-z,now"] if sys.platform == "linux" else [],
        optional=MODE == "auto",
    )


def extensions() -> list[Extension]:
    if MODE not in MODES:
        raise SetupError(f"FUSED_OPTIM_BUILD must be one of {MODES}, got {MODE!r}")
    if not all(re.fullmatch(r"\d{2,3}[af]?", arch) for arch in ARCHS):
        raise SetupError(f"FUSED_OPTIM_CUDA_ARCHS must be numbers such as 80,90, got {','.join(ARCHS)!r}")
    if sys.platform == "win32" and MODE in ("cpu", "cuda"):
        raise SetupError(f"FUSED_OPTIM_BUILD={MODE}: the compiled backends are not for Windows")
    if sys.platform == "win32" or MODE == "none":
        return []
    sources = [f"csrc/step_cpu_{isa}.cpp" for isa in ("baseline", "avx2", "avx512")]
    found = [extension("_cpu", ["csrc/bindings_cpu.cpp", *sources])]
    if MODE == "cuda" or (MODE == "auto" and nvcc_path() is not None):
        # First, for it is the likelier to fail.
        found.insert(0, extension("_cuda", ["csrc/bindings_cuda.cpp"]))
    return found


setup(ext_modules=extensions(), cmdclass={"build_py": BuildPy, "build_ext": BuildExt})
