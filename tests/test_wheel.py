"""The wheel as a user gets it: built, installed in a fresh environment, used from an empty folder."""

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow

USE_KERNELS = """
import importlib, importlib.resources, inspect, pathlib, pkgutil, sys
import lago_fast, lago_fast.kernels
assert pathlib.Path(lago_fast.__file__).is_relative_to(sys.prefix), lago_fast.__file__
def modules(path, prefix):
    for folder in sorted(pathlib.Path(p) for p in path):
        for file in sorted(folder.rglob("*.py")):
            dotted = prefix + "." + ".".join(file.relative_to(folder).with_suffix("").parts)
            yield dotted.removesuffix(".__init__")
names = list(modules(lago_fast.kernels.__path__, "lago_fast.kernels"))
for name in names:
    module = importlib.import_module(name)
    file = pathlib.Path(module.__file__)
    assert file.is_relative_to(sys.prefix), file
    # triton compiles a kernel from its source
    kernels = {key: value for key, value in vars(module).items() if key.endswith("_kernel")}
    assert all(f"def {key}(" in inspect.getsource(value.fn) for key, value in kernels.items()), name
    assert kernels or not name.endswith("triton_fused"), name
print(*names)
"""

USE_GAE = """
import torch
from lago_fast import ops
one = torch.ones(1, 1)
no = torch.zeros(1, 1, dtype=torch.bool)
out = ops.gae(one, one, 2 * one, no, no, ~no, gamma=0.5, gae_lambda=0.5, impl="cpp")
print(out.advantages.item(), out.returns.item())
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command; its output comes with the failure, should it fail."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build the wheel apart from the build folder of the editable install."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ["-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "dist"]
    run(sys.executable, *build, f"--config-setting=build-dir={folder / 'build'}", ROOT, cwd=folder)
    return next((folder / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def fresh_python(wheel, tmp_path_factory) -> Path:
    """Install the wheel into an environment of its own and return that environment's interpreter."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    run(
        sys.executable,
        *("-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps"),
        wheel,
        cwd=folder,
    )
    # The dependencies come from the environment of the tests, behind the installed wheel. A path named in a
    # .pth file does not run the .pth files that lie there, so that the editable install is not found.
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "dependencies.pth").write_text("\n".join(sorted(here)) + "\n")
    return python


def test_wheel_holds_what_is_used_and_no_more(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "lago_fast").rglob("*.py")}
    sources |= {f"lago_fast/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "kernels").rglob("*.py")}
    assets = {p.relative_to(ROOT).as_posix() for p in (ROOT / "lago_fast" / "envs").rglob("assets/*.json")}
    assert sources | assets <= set(names)
    assert any(name.startswith("lago_fast/_C.") and name.endswith(".so") for name in names)
    assert not [name for name in names if name.endswith((".pyc", ".cu")) or name.startswith("tests")]


def test_every_kernel_imports_from_an_empty_folder(fresh_python, tmp_path):
    imported = set(run(fresh_python, "-I", "-c", USE_KERNELS, cwd=tmp_path).split())
    assert {f"lago_fast.kernels.{p.parent.name}.reference" for p in ROOT.glob("kernels/*/reference.py")} <= imported


def test_native_op_runs_from_an_empty_folder(fresh_python, tmp_path):
    assert run(fresh_python, "-I", "-c", USE_GAE, cwd=tmp_path).split() == ["1.0", "2.0"]


def test_command_is_installed(fresh_python):
    assert (fresh_python.parent / "lago").is_file()
