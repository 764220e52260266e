"""What pip makes of the source tree, on machines with and without compilers.

An interpreter that has pip, setuptools and pybind11 alone builds an sdist from a copy of the tree,
and everything else from that sdist. What was installed runs in an environment whose site-packages
comes before this one's, where the repository may be installed too.
"""

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
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import built_once

from fused_optim.backends import extension

pytest.importorskip("pip", reason="needs pip")

ROOT = Path(__file__).parents[1]
SUFFIX: str = sysconfig.get_config_var("EXT_SUFFIX")
COREUTILS = {"cat", "cp", "env", "ls", "mkdir", "mv", "rm", "sh", "true", "uname"}
needs_compiler = pytest.mark.skipif(not all(map(shutil.which, ("c++", "g++"))), reason="needs a C++ compiler")


def source_files(*kinds: str) -> list[str]:
    """The tree's files of git's ``kinds``."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("needs git, which knows the tree's files")
    command = ["git", "ls-files", "-z", "--exclude-standard", *kinds]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return sorted(name for name in listed.stdout.split("\0") if name and (ROOT / name).exists())


def environment(**values: str) -> dict[str, str]:
    """This environment without what steers the build, Python, pip or the package, without GPUs,
    and without a way to the network."""
    steering = re.compile("(FUSED_OPTIM_|PYTHON|PIP_|TRITON_|SETUPTOOLS_)")
    kept = {k: v for k, v in os.environ.items() if not steering.match(k)}
    proxies = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
    no_network = dict.fromkeys(proxies, "http://127.0.0.1:9")
    return {**kept, **no_network, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", **values}


def without_compilers(path: Path) -> dict[str, str]:
    """An environment with coreutils on the PATH and nothing else."""
    env = environment(PATH=str(mirror(path, COREUTILS.__contains__)), CC="gcc", CXX="g++")
    for name in ("CPP", "LDSHARED", "LDCXXSHARED", "CUDA_HOME", "CUDA_PATH"):
        env.pop(name, None)
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

    def succeeded(self) -> str:
        assert self.code == 0, self.output
        return self.output


def run(*command: str | Path, cwd: Path, env: Mapping[str, str]) -> Ran:
    ran = subprocess.run(
        command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return Ran(ran.returncode, ran.stdout)


def new_environment(folder: Path) -> Path:
    """A virtual environment with nothing in it; its site-packages."""
    command = (sys.executable, "-m", "venv", "--without-pip", folder)
    run(*command, cwd=folder.parent, env=environment()).succeeded()
    (site,) = folder.glob("lib/python*/site-packages")
    return site


class Builder(NamedTuple):
    """An interpreter with pip and the build dependencies alone, and the tree and the sdist that it made."""

    folder: Path

    @property
    def sdist(self) -> Path:
        (sdist,) = self.folder.glob("tree/out/fused_optim-*.tar.gz")
        return sdist

    def python(self, *arguments: str | Path, cwd: Path, env: Mapping[str, str]) -> Ran:
        return run(self.folder / "venv" / "bin" / "python", *arguments, cwd=cwd, env=env)

    def install(self, folder: Path, env: Mapping[str, str]) -> str:
        """Install the sdist into a new environment in ``folder``; what pip says."""
        site = new_environment(folder / "venv")
        # A .pth file's own .pth files are not read: an editable installation stays out.
        others = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
        (site / "others.pth").write_text("\n".join(others))
        options = ["--isolated", "-v", "install", "--no-compile", "--target", site, self.sdist]
        offline = ["--no-index", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
        return self.python("-m", "pip", *options, *offline, cwd=folder, env=env).succeeded()

    def hook(self, name: str, tree: Path, env: Mapping[str, str]) -> Ran:
        """What pip calls in a source tree, called without pip; the result is under ``tree``/out."""
        shutil.rmtree(tree / "out", ignore_errors=True)
        (tree / "out").mkdir()
        code = f"import setuptools.build_meta as b; b.{name}('out')"
        return self.python("-c", code, cwd=tree, env=env)


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
        log = Builder(folder).hook("build_sdist", folder / "tree", environment()).succeeded()
        assert "Deprecat" not in log

    return Builder(built_once(tmp_path_factory, "install_sdist", build))


def compiled(names: list[str]) -> list[str]:
    suffixes = (SUFFIX, ".so", ".pyd", ".dylib", ".o", ".a")
    return sorted(Path(name).name.removesuffix(SUFFIX) for name in names if name.endswith(suffixes))


def self_check(folder: Path, env: Mapping[str, str]) -> dict[str, str]:
    """The lines of ``python -W error -m fused_optim`` by their first word, of what was installed there."""
    code = "import fused_optim.__main__ as m; print('file', m.__file__); raise SystemExit(m.main())"
    python = folder / "venv" / "bin" / "python"
    output = run(python, "-W", "error", "-c", code, cwd=folder, env=env).succeeded()
    lines = dict(line.split(None, 1) for line in output.splitlines() if len(line.split()) > 1)
    # Not the repository's own installation, which this environment can see.
    assert Path(lines["file"]).is_relative_to(folder), lines
    return lines


def test_sdist_is_the_tree(builder: Builder) -> None:
    with tarfile.open(builder.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert [name for name in source_files("--cached") if name not in names and name[0] != "."] == []
    assert compiled(sorted(names)) == []


@needs_compiler
@pytest.mark.kernels
def test_the_cpu_backend_is_built(builder: Builder, tmp_path: Path) -> None:
    builder.install(tmp_path, environment(FUSED_OPTIM_BUILD="cpu"))
    lines = self_check(tmp_path, environment())
    assert lines["cpu"] == "ready on cpu, same bits as eager"
    assert lines["_cpu"].startswith("instruction set ")


def test_no_compiler(builder: Builder, tmp_path: Path) -> None:
    env = without_compilers(tmp_path / "bin")
    log = builder.install(tmp_path, env)
    assert re.search(
        r'warning: .*"fused_optim._cpu" failed: .* needs a C\+\+17 compiler', log, re.IGNORECASE
    ), log
    assert compiled([p.name for p in tmp_path.glob("venv/lib/python*/site-packages/fused_optim/*")]) == []
    lines = self_check(tmp_path, env)
    assert lines["cpu"].startswith("not ready: fused_optim._cpu was not built")
    assert "install with FUSED_OPTIM_BUILD=cpu to build it" in lines["cpu"]
    assert lines["cuda"].startswith("not ready")
    assert lines["eager"] == "ready on cpu, same bits as eager"


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
    ignored = shutil.ignore_patterns("out", "*.egg-info")
    tree = Path(shutil.copytree(builder.folder / "tree", tmp_path / "tree", ignore=ignored))
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


def check_wheel(builder: Builder, tree: Path, env: Mapping[str, str], modules: list[str]) -> str:
    """The wheel of the tree has the package with these compiled modules, and nothing else; the log."""
    log = builder.hook("build_wheel", tree, env).succeeded()
    (path,) = (tree / "out").iterdir()
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        licences = [wheel.read(name) for name in names if name.endswith("/licenses/LICENSE")]
    assert compiled(names) == modules, log
    assert path.name.endswith("-py3-none-any.whl") == (not modules)
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"fused_optim"}
    sources = [
        name.replace("kernels/", "fused_optim/kernels/") for name in source_files("--cached", "--others")
    ]
    wanted = {name for name in sources if name.startswith("fused_optim/") and name.endswith(".py")}
    assert "fused_optim/kernels/step.py" in wanted
    assert {name for name in names if name.endswith(".py")} == wanted
    assert "fused_optim/py.typed" in names
    assert licences == [(ROOT / "LICENSE").read_bytes()]
    assert "Deprecat" not in log, log
    return log


LACKS = "nvcc does not compile for compute capabilities 90, 13"


@needs_compiler
def test_wheels_after_each_other(builder: Builder, tree: Path, cuda: dict[str, str]) -> None:
    """Nothing of an earlier build in the same tree is in a wheel, nor what nvcc does not compile."""
    log = check_wheel(builder, tree, {**cuda, "FUSED_OPTIM_BUILD": "cuda"}, ["_cpu", "_cuda"])
    assert archs_in(log) == ["sm_80", "sm_90", "compute_90"]
    check_wheel(builder, tree, {**cuda, "FUSED_OPTIM_BUILD": "cpu"}, ["_cpu"])
    check_wheel(builder, tree, {**cuda, "FUSED_OPTIM_BUILD": "none"}, [])
    log = check_wheel(builder, tree, {**cuda, "FUSED_OPTIM_CUDA_ARCHS": "90,13"}, ["_cpu"])
    assert re.search(f'warning: .*"fused_optim._cuda" failed: {LACKS}', log, re.IGNORECASE), log
    bindings = tree / "csrc" / "bindings_cpu.cpp"
    bindings.write_text(bindings.read_text() + "#error broken\n")
    log = check_wheel(builder, tree, {**cuda, "FUSED_OPTIM_CUDA_ARCHS": "80; 100a"}, ["_cuda"])
    assert archs_in(log) == ["sm_80", "sm_100a", "compute_100a"]
    assert re.search('warning: .*"fused_optim._cpu" failed', log, re.IGNORECASE), log


def archs_in(log: str) -> list[str]:
    """What nvcc was told to make, of the launcher and the step kernels in four parts."""
    commands = [line for line in log.splitlines() if "fake nvcc" in line and "-gencode" in line]
    assert len(commands) == 5
    (archs,) = {tuple(re.findall(r",code=(\w+)", command)) for command in commands}
    return list(archs)


@needs_compiler
def test_builds_after_each_other_in_place(builder: Builder, tree: Path, cuda: dict[str, str]) -> None:
    """``pip install -e`` leaves no module in the tree that it did not build."""

    def modules() -> list[str]:
        return compiled([p.name for p in (tree / "fused_optim").iterdir()])

    for mode, built in {"cuda": ["_cpu", "_cuda"], "cpu": ["_cpu"]}.items():
        builder.hook("build_editable", tree, {**cuda, "FUSED_OPTIM_BUILD": mode}).succeeded()
        assert modules() == built, mode
    check_wheel(builder, tree, {**cuda, "FUSED_OPTIM_BUILD": "none"}, [])
    assert modules() == ["_cpu"], "a wheel is no reason to remove the tree's modules"


NO_NVCC = "error: fused_optim._cuda needs nvcc, which is neither on the PATH nor under CUDA_HOME"
REFUSED: dict[str, tuple[Callable[[Path, dict[str, str]], dict[str, str]], str]] = {
    "a mode misspelt": (lambda tree, cuda: environment(FUSED_OPTIM_BUILD="nonsense"),
        r"FUSED_OPTIM_BUILD must be one of \('auto', 'none', 'cpu', 'cuda'\), got 'nonsense'"),
    "archs misspelt": (lambda tree, cuda: environment(FUSED_OPTIM_CUDA_ARCHS="sm_90"),
        "FUSED_OPTIM_CUDA_ARCHS must be numbers such as 80,90, got 'sm_90'"),
    **{f"{mode} without a compiler": (
        lambda tree, cuda, mode=mode: {**without_compilers(tree / "bin"), "FUSED_OPTIM_BUILD": mode},
        r"needs a C\+\+17 compiler .*'g(cc|\+\+)'") for mode in ("cpu", "cuda")},
    "cuda with a compiler that lacks the arch": (
        lambda tree, cuda: {**cuda, "FUSED_OPTIM_CUDA_ARCHS": "90,13", "FUSED_OPTIM_BUILD": "cuda"}, LACKS),
    "cuda without nvcc": (
        lambda tree, cuda: environment(PATH=str(mirror(tree / "bin", lambda name: name != "nvcc")),
                                       CUDA_PATH="", CUDA_HOME=str(tree), FUSED_OPTIM_BUILD="cuda"), NO_NVCC),
}  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_built_as_asked(builder: Builder, tree: Path, cuda: dict[str, str], what: str) -> None:
    """Is an error at once: the minute of the CPU backend is not spent first."""
    steering, said = REFUSED[what]
    code, output = builder.hook("build_wheel", tree, steering(tree, cuda))
    assert code != 0 and re.search(said, output) and "step_cpu" not in output, output


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("readelf"), reason="needs readelf")
@pytest.mark.parametrize("name", ["_cpu", "_cuda"])
def test_symbols_of_an_extension(name: str) -> None:
    """It needs the compiler's libraries and CPython's C API, and no torch: one build serves every torch."""
    module, reason = extension(name)
    if module is None:
        pytest.skip(str(reason))
    command = ["readelf", "--wide", "--dynamic", "--dyn-syms", str(module.__file__)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(\w+[^.]*)\.so", said))
    usual = {"libstdc++", "libgomp", "libomp", "libgcc_s", "libc", "libm", "libpthread", "libdl", "librt"}
    sanitizers = {"libasan", "libubsan", "libtsan"}
    assert needed <= usual | sanitizers | {"ld-linux-x86-64", "ld-linux-aarch64"}, needed
    symbols = re.findall(r" UND (\S+)", said)
    assert "PyDict_Next" in symbols or name == "_cuda"
    assert not [s for s in symbols if re.search(r"c10|torch|caffe|2at[0-9N]|THP|aoti", s)]
