"""What pip makes of the source tree, on machines with and without compilers.

An interpreter that has pip, setuptools and pybind11 alone builds an sdist from a copy of the tree,
and everything else from that sdist. What was installed runs in an environment whose site-packages
comes before this one's, where the repository may be installed too.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers import built_once

pytest.importorskip("pip", reason="needs pip")

ROOT = Path(__file__).parents[1]
SUFFIX: str = sysconfig.get_config_var("EXT_SUFFIX")
COREUTILS = {"cat", "cp", "env", "ls", "mkdir", "mv", "rm", "sh", "true", "uname"}
MODES = ("auto", "none", "cpu", "cuda")


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None) or shutil.which("nvcc")


def python_compilers() -> list[str]:
    """The commands that this Python compiles and links extensions with."""
    values = [sysconfig.get_config_var(name) for name in ("CC", "CXX", "LDSHARED", "LDCXXSHARED")]
    return [value.split()[0] for value in values if value]


needs_compiler = pytest.mark.skipif(
    not all(map(shutil.which, [*python_compilers(), "g++"])), reason="needs a C++ compiler"
)
needs_nvcc = pytest.mark.skipif(nvcc() is None, reason="needs nvcc")


def source_files(*kinds: str) -> list[str]:
    """The tree's files of git's ``kinds``, or what looks like its sources where git does not know it."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "ls-files", "-z", "--exclude-standard", *kinds]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return sorted(name for name in listed.stdout.split("\0") if name and (ROOT / name).exists())
    ignored = re.compile(r"(^|/)(\.venv.*|build|dist|__pycache__|\..*_cache|[^/]*\.egg-info)/|\.(so|o|pyc)$")
    names = [p.relative_to(ROOT).as_posix() for p in ROOT.glob("**/*") if p.is_file()]
    return sorted(name for name in names if not ignored.search(name))


def environment(**values: str) -> dict[str, str]:
    """This environment without what steers the build, Python, pip or the package, without GPUs,
    and without a way to the network."""
    steering = re.compile("(FUSED_OPTIM_|PYTHON|PIP_|TRITON_|SETUPTOOLS_)")
    kept = {k: v for k, v in os.environ.items() if not steering.match(k)}
    no_network = dict.fromkeys(
        ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9"
    )
    return {**kept, **no_network, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", **values}


def without_compilers(path: Path) -> dict[str, str]:
    """An environment with coreutils on the PATH and nothing else."""
    env = environment(PATH=str(mirror(path, COREUTILS.__contains__)))
    for name in ("CC", "CXX", "CPP", "LDSHARED", "LDCXXSHARED", "CUDA_HOME", "CUDA_PATH"):
        env.pop(name, None)
    if any("/" in command for command in python_compilers()):
        # The PATH does not hide these; what CC and CXX name is taken instead of them.
        env.update(CC="gcc", CXX="g++")
    compilers = ["c++", "cc", "clang", "clang++", "g++", "gcc", "nvcc"]
    compilers += [command for command in python_compilers() if "/" not in command]
    assert not [command for command in compilers if shutil.which(command, path=env["PATH"])]
    return env


def mirror(folder: Path, keep: Callable[[str], bool]) -> Path:
    """A folder with links to those commands on the PATH that ``keep`` accepts."""
    folder.mkdir()
    for place in map(Path, os.environ["PATH"].split(os.pathsep)):
        for command in place.iterdir() if place.is_dir() else ():
            if keep(command.name) and not (folder / command.name).is_symlink():
                (folder / command.name).symlink_to(command.absolute())
    return folder


class Ran(NamedTuple):
    code: int
    output: str


def run(*command: str | Path, cwd: Path, env: Mapping[str, str]) -> Ran:
    ran = subprocess.run(
        command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return Ran(ran.returncode, ran.stdout)


def succeed(*command: str | Path, cwd: Path, env: Mapping[str, str]) -> str:
    ran = run(*command, cwd=cwd, env=env)
    assert ran.code == 0, ran.output
    return ran.output


def new_environment(folder: Path) -> Path:
    """A virtual environment with nothing in it; its site-packages."""
    succeed(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent, env=environment())
    (site,) = folder.glob("lib/python*/site-packages")
    return site


class Builder(NamedTuple):
    """An interpreter with pip and the build dependencies alone, and the sdist that it made."""

    python: Path
    sdist: Path

    def pip(self, *arguments: str | Path, cwd: Path, env: Mapping[str, str]) -> Ran:
        options = ["--isolated", "--disable-pip-version-check", "-v"]
        offline = ["--no-index", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
        return run(self.python, "-m", "pip", *options, *arguments, *offline, cwd=cwd, env=env)

    def wheel(self, folder: Path, env: Mapping[str, str]) -> Ran:
        """Build a wheel from the sdist into the new ``folder``."""
        folder.mkdir()
        return self.pip("wheel", "-w", folder, self.sdist, cwd=folder, env=env)

    def hook(self, name: str, tree: Path, env: Mapping[str, str]) -> Ran:
        """What pip calls in a source tree, called without pip; the result is under ``tree``/out."""
        (tree / "out").mkdir(exist_ok=True)
        code = f"import setuptools.build_meta as b; b.{name}('out')"
        return run(self.python, "-c", code, cwd=tree, env=env)


@pytest.fixture(scope="session")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    def build(folder: Path) -> None:
        site = new_environment(folder / "venv")
        for package in ("pip", "setuptools", "pybind11"):
            found = metadata.distribution(package)
            if found.files is None:
                pytest.skip(f"{package}'s files are not recorded")
            for top in {file.parts[0] for file in found.files} - {"..", "__pycache__"}:
                (site / top).symlink_to(Path(str(found.locate_file(top))).absolute())
        for name in source_files("--cached", "--others"):
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / "tree" / name)
        made = Builder(folder / "venv" / "bin" / "python", folder).hook(
            "build_sdist", folder / "tree", environment()
        )
        assert made.code == 0, made.output
        (folder / "log").write_text(made.output)

    folder = built_once(tmp_path_factory, "install_sdist", build)
    (sdist,) = (folder / "tree" / "out").glob("fused_optim-*.tar.gz")
    return Builder(folder / "venv" / "bin" / "python", sdist)


class Installed(NamedTuple):
    """A wheel in an environment of its own."""

    folder: Path

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    @property
    def wheel(self) -> zipfile.ZipFile:
        (wheel,) = self.folder.glob("wheel/*.whl")
        return zipfile.ZipFile(wheel)

    def python(self, *arguments: str, env: Mapping[str, str]) -> str:
        return succeed(self.folder / "venv" / "bin" / "python", *arguments, cwd=self.folder, env=env)

    def self_check(self, env: Mapping[str, str]) -> dict[str, str]:
        """The lines of ``python -m fused_optim``, which must succeed, by their first word."""
        lines = [line.split(None, 1) for line in self.python("-m", "fused_optim", env=env).splitlines()]
        return {line[0]: line[1] for line in lines if len(line) == 2}

    def step(self, env: Mapping[str, str]) -> dict[str, Any]:
        """What :data:`STEP` reports."""
        report: dict[str, Any] = json.loads(self.python("-W", "error", "-c", STEP, env=env))
        # Not the repository's own installation, which this environment can see.
        assert Path(report.pop("file")).is_relative_to(self.folder), report
        return report


STEP = """
import json
import torch
import fused_optim
from fused_optim.backends import select

def stepped(optimizer_class, backend):
    start = torch.linspace(-1, 1, 1001)
    p = start.clone().requires_grad_()
    p.grad = torch.linspace(2, -3, 1001)
    optimizer_class([p], lr=0.01, weight_decay=0.1, backend=backend).step()
    assert not torch.equal(p, start)
    return p.detach()

def outcome(backend):
    try:
        for each in (fused_optim.AdaBelief, fused_optim.AdamaxW):
            if not torch.equal(stepped(each, backend), stepped(each, "eager")):
                return f"{each.__name__} differs"
        return "same bits"
    except RuntimeError as error:
        return f"RuntimeError: {error}"

print(json.dumps({
    "file": fused_optim.__file__,
    "chosen": select(None, torch.device("cpu")).name,
    "best": outcome(None),
    "cpu": outcome("cpu"),
}))
"""


def install(builder: Builder, folder: Path, source: Path, env: Mapping[str, str]) -> str:
    """Install into a new environment in ``folder``; what pip says."""
    site = new_environment(folder / "venv")
    # A .pth file's own .pth files are not read: an editable installation stays out.
    others = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    (site / "others.pth").write_text("\n".join(others))
    ran = builder.pip("install", "--no-compile", "--target", site, source, cwd=folder, env=env)
    assert ran.code == 0, ran.output
    return ran.output


def install_wheel(builder: Builder, folder: Path, env: Mapping[str, str]) -> Installed:
    """A wheel built from the sdist and installed."""
    built = builder.wheel(folder / "wheel", env)
    assert built.code == 0, built.output
    (folder / "log").write_text(built.output)
    (wheel,) = (folder / "wheel").iterdir()
    install(builder, folder, wheel, env)
    return Installed(folder)


def compiled(names: list[str]) -> list[str]:
    """The compiled modules among ``names``."""
    suffixes = tuple({SUFFIX, ".so", ".pyd", ".dylib", ".o", ".a"})
    return sorted(Path(name).name.removesuffix(SUFFIX) for name in names if name.endswith(suffixes))


def test_sdist_is_the_tree(builder: Builder) -> None:
    with tarfile.open(builder.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert [name for name in source_files("--cached") if name not in names and name[0] != "."] == []
    assert compiled(sorted(names)) == []
    assert "Deprecat" not in (builder.sdist.parents[2] / "log").read_text()


def test_build_dependencies(builder: Builder) -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert [re.split("[^\\w-]", name)[0] for name in needed] == ["setuptools", "pybind11"]
    code = "import importlib.metadata as m; print(*{d.name for d in m.distributions()})"
    names = succeed(builder.python, "-c", code, cwd=builder.sdist.parent, env=environment())
    assert set(names.split()) == {"pip", "setuptools", "pybind11"}


def check_wheel(installed: Installed, modules: list[str]) -> None:
    """The wheel has the package with these compiled modules, and nothing else."""
    names = installed.wheel.namelist()
    assert compiled(names) == modules, installed.log
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"fused_optim"}
    sources = [name for name in source_files("--cached", "--others") if name.endswith(".py")]
    wanted = {name for name in sources if name.startswith("fused_optim/")}
    wanted |= {f"fused_optim/{name}" for name in sources if name.startswith("kernels/")}
    assert "fused_optim/kernels/step.py" in wanted
    assert {name for name in names if name.endswith(".py")} == wanted
    assert "fused_optim/py.typed" in names
    licences = [name for name in names if name.endswith("/licenses/LICENSE")]
    assert [installed.wheel.read(name) for name in licences] == [(ROOT / "LICENSE").read_bytes()]
    assert "Deprecat" not in installed.log, installed.log


@needs_compiler
def test_everything_is_built(builder: Builder, tmp_path: Path) -> None:
    """By default everything is built that can be; here for one arch, for nvcc's time."""
    installed = install_wheel(builder, tmp_path, environment(FUSED_OPTIM_CUDA_ARCHS="90"))
    check_wheel(installed, ["_cpu", "_cuda"] if nvcc() else ["_cpu"])
    lines = installed.self_check(environment())
    assert lines["cpu"] == "ready on cpu, same bits as eager"
    assert lines["_cpu"].startswith("instruction set ")
    assert installed.step(environment()) == {"chosen": "cpu", "best": "same bits", "cpu": "same bits"}
    if nvcc():
        assert lines["_cuda"].startswith("sm_90 and PTX, built with nvcc")
        assert "was not built" not in lines["cuda"]


def check_without_cpu_module(installed: Installed, env: Mapping[str, str]) -> None:
    lines = installed.self_check({**env, "TRITON_INTERPRET": "1"})
    assert lines["cpu"].startswith("not ready: fused_optim._cpu was not built")
    assert lines["cuda"].startswith("not ready")
    assert lines["eager"] == "ready on cpu, same bits as eager"
    if find_spec("triton") is not None:
        assert lines["triton"] == "ready on cpu, same bits as eager"
    report = installed.step(env)
    assert "install with FUSED_OPTIM_BUILD=cpu to build it" in report["cpu"]
    assert report["cpu"].startswith("RuntimeError: ")
    assert (report["chosen"], report["best"]) == ("eager", "same bits")


def test_nothing_is_built(builder: Builder, tmp_path: Path) -> None:
    installed = install_wheel(builder, tmp_path, environment(FUSED_OPTIM_BUILD="none"))
    check_wheel(installed, [])
    (description,) = (name for name in installed.wheel.namelist() if name.endswith("/WHEEL"))
    assert "Tag: py3-none-any\n" in installed.wheel.read(description).decode()
    check_without_cpu_module(installed, environment())


def test_no_compiler(builder: Builder, tmp_path: Path) -> None:
    env = without_compilers(tmp_path / "bin")
    log = install(builder, tmp_path, builder.sdist, env)
    assert re.search(
        r'warning: .*"fused_optim._cpu" failed: .* needs a C\+\+17 compiler', log, re.IGNORECASE
    ), log
    installed = Installed(tmp_path)
    assert compiled([str(p) for p in tmp_path.glob("venv/lib/python*/site-packages/fused_optim/*")]) == []
    check_without_cpu_module(installed, env)


@pytest.mark.parametrize("named", [False, True], ids=["unset", "CXX"])
@pytest.mark.parametrize("mode", ["cpu", "cuda"])
def test_no_compiler_for_what_was_asked_for(builder: Builder, tmp_path: Path, mode: str, named: bool) -> None:
    env = {**without_compilers(tmp_path / "bin"), "FUSED_OPTIM_BUILD": mode}
    if named:
        env.update(CC="/nowhere/cc", CXX="/nowhere/c++")
    code, output = builder.wheel(tmp_path / "wheel", env)
    missing = env.get("CXX") or sysconfig.get_config_var("CXX").split()[0]
    assert code != 0
    assert re.search(rf"needs a C\+\+17 compiler .*'{re.escape(missing)}'", output), output


@needs_compiler
def test_no_nvcc_for_cuda(builder: Builder, tmp_path: Path) -> None:
    path = mirror(tmp_path / "bin", lambda name: name != "nvcc")
    env = environment(PATH=str(path), FUSED_OPTIM_BUILD="cuda", CUDA_HOME=str(tmp_path), CUDA_PATH="")
    code, output = builder.wheel(tmp_path / "wheel", env)
    assert code != 0
    assert "error: fused_optim._cuda needs nvcc, which is neither on the PATH nor under CUDA_HOME" in output
    # The minute of the CPU backend is not spent first.
    assert "step_cpu" not in output


def test_unknown_mode(builder: Builder, tmp_path: Path) -> None:
    code, output = builder.wheel(tmp_path / "wheel", environment(FUSED_OPTIM_BUILD="nonsense"))
    assert code != 0
    assert f"FUSED_OPTIM_BUILD must be one of {MODES}, got 'nonsense'" in output, output


def test_malformed_archs(builder: Builder, tmp_path: Path) -> None:
    code, output = builder.wheel(tmp_path / "wheel", environment(FUSED_OPTIM_CUDA_ARCHS="sm_90"))
    assert code != 0
    assert "FUSED_OPTIM_CUDA_ARCHS must be numbers such as 80,90, got 'sm_90'" in output, output


@needs_compiler
@needs_nvcc
def test_unknown_arch(builder: Builder, tmp_path: Path) -> None:
    env = environment(FUSED_OPTIM_BUILD="cuda", FUSED_OPTIM_CUDA_ARCHS="90,13")
    code, output = builder.wheel(tmp_path / "wheel", env)
    assert code != 0
    assert "nvcc does not compile for compute capabilities 90, 13" in output, output


# The tree with modules of one line, for what does not depend on what is compiled.

MODULE = """
#include <Python.h>
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "NAME", nullptr, 0, nullptr};
PyMODINIT_FUNC PyInit_NAME() { return PyModule_Create(&definition); }
"""
NVCC = """#!/bin/sh
echo "fake nvcc $*"
for last; do :; done
case "$*" in
  *compute_13*) exit 1 ;;
  *step_cuda*.cu*) echo | g++ -x c++ -c - -o "$last" ;;
esac
"""


@pytest.fixture
def tree(builder: Builder, tmp_path: Path) -> Path:
    whole = builder.sdist.parents[1]
    tree = Path(shutil.copytree(whole, tmp_path / "tree", ignore=shutil.ignore_patterns("out", "*.egg-info")))
    for source in (tree / "csrc").glob("*.cpp"):
        kind = source.stem.partition("_")[2]
        source.write_text(MODULE.replace("NAME", f"_{kind}") if source.stem.startswith("bindings") else "")
    return tree


@pytest.fixture
def cuda(tmp_path: Path) -> dict[str, str]:
    """An environment whose CUDA_HOME has an nvcc that shows its arguments and knows not 13."""
    if sys.platform != "linux":
        pytest.skip("CUDA is for Linux only")
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    (home / "lib64").mkdir()
    (home / "bin" / "nvcc").write_text(NVCC)
    (home / "bin" / "nvcc").chmod(0o755)
    (home / "lib64" / "libcudart_static.a").write_text("!<arch>\n")
    return environment(CUDA_HOME=str(home))


def modules_of_wheel(builder: Builder, tree: Path, env: Mapping[str, str]) -> tuple[list[str], str]:
    """The compiled modules of the wheel that is built in ``tree``, and the log."""
    shutil.rmtree(tree / "out", ignore_errors=True)
    ran = builder.hook("build_wheel", tree, env)
    assert ran.code == 0, ran.output
    (wheel,) = (tree / "out").iterdir()
    return compiled(zipfile.ZipFile(wheel).namelist()), ran.output


def modules_in(tree: Path) -> list[str]:
    return compiled([p.name for p in (tree / "fused_optim").iterdir()])


@needs_compiler
def test_modes_after_each_other(builder: Builder, tree: Path, cuda: dict[str, str]) -> None:
    """Nothing of an earlier build in the same tree is in a wheel."""
    both = ["_cpu", "_cuda"]
    for mode, modules in {"cuda": both, "cpu": ["_cpu"], "none": [], "": both}.items():
        assert modules_of_wheel(builder, tree, {**cuda, "FUSED_OPTIM_BUILD": mode})[0] == modules, mode
    bindings = tree / "csrc" / "bindings_cpu.cpp"
    bindings.write_text(bindings.read_text() + "#error broken\n")
    modules, log = modules_of_wheel(builder, tree, cuda)
    assert modules == ["_cuda"]
    assert re.search('warning: .*"fused_optim._cpu" failed', log, re.IGNORECASE), log


@needs_compiler
def test_modes_after_each_other_in_place(builder: Builder, tree: Path, cuda: dict[str, str]) -> None:
    """``pip install -e`` leaves no module in the tree that it did not build."""
    for mode, modules in {"cuda": ["_cpu", "_cuda"], "cpu": ["_cpu"], "none": []}.items():
        ran = builder.hook("build_editable", tree, {**cuda, "FUSED_OPTIM_BUILD": mode})
        assert ran.code == 0, ran.output
        assert modules_in(tree) == modules, mode
    assert builder.hook("build_editable", tree, cuda).code == 0
    modules_of_wheel(builder, tree, {**cuda, "FUSED_OPTIM_BUILD": "none"})
    assert modules_in(tree) == ["_cpu", "_cuda"], "a wheel is no reason to remove the tree's modules"


@needs_compiler
@pytest.mark.parametrize(
    "archs, code",
    [("", ["sm_80", "sm_90", "compute_90"]), ("80; 100a", ["sm_80", "sm_100a", "compute_100a"])],
)
def test_archs(builder: Builder, tree: Path, cuda: dict[str, str], archs: str, code: list[str]) -> None:
    env = {**cuda, "FUSED_OPTIM_CUDA_ARCHS": archs}
    modules, log = modules_of_wheel(builder, tree, env)
    assert modules == ["_cpu", "_cuda"]
    commands = [line for line in log.splitlines() if "fake nvcc" in line and "-gencode" in line]
    assert len(commands) == 5  # the launcher, and the step kernels in four parts
    assert all(re.findall(r",code=(\w+)", command) == code for command in commands)


@needs_compiler
def test_an_arch_that_nvcc_lacks_leaves_cuda_out(builder: Builder, tree: Path, cuda: dict[str, str]) -> None:
    modules, log = modules_of_wheel(builder, tree, {**cuda, "FUSED_OPTIM_CUDA_ARCHS": "13"})
    assert modules == ["_cpu"]
    assert re.search(
        'warning: .*"fused_optim._cuda" failed: .*compute capabilities 13', log, re.IGNORECASE
    ), log
