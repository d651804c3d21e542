"""The CUDA sources under nvcc, where there is one, for both GPU generations: registers are printed, spills fail."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "kernels").glob("*/*.cu"))
# as in CMakeLists.txt
FLAGS = ("-std=c++17", "-ftz=true", "-I", str(ROOT / "csrc"))

REPORT = re.compile(
    r"entry function '(?P<name>\S+)'"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def find_nvcc() -> str | None:
    """Look for nvcc in CUDA_HOME, then on the PATH."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def name_of(mangled: str) -> str:
    """Return a kernel's name out of its mangled one."""
    return re.search(r"[A-Z][A-Za-z]*Kernel", mangled)[0]


@pytest.mark.slow
@pytest.mark.skipif(find_nvcc() is None, reason="no nvcc in CUDA_HOME or on the PATH")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("source", SOURCES, ids=[s.stem for s in SOURCES])
def test_nothing_spills(source, arch, tmp_path, capsys):
    command = [find_nvcc(), *FLAGS, "-cubin", f"-arch={arch}", "-Xptxas", "-v", "-o", tmp_path / "out.cubin", source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    kernels = [match.groupdict() for match in REPORT.finditer(done.stderr)]
    assert len(kernels) == done.stderr.count("entry function")
    registers: dict[str, list[int]] = {}
    for kernel in kernels:
        registers.setdefault(name_of(kernel["name"]), []).append(int(kernel["registers"]))
    with capsys.disabled():
        for name, used in sorted(registers.items()):
            print(
                f"\n{source.stem:20}{arch:8}{name:20}{len(used):3} built, registers {min(used)} to {max(used)}", end=" "
            )
    assert not [k for k in kernels if int(k["stack"]) + int(k["stores"]) + int(k["loads"])]


def test_every_op_has_its_source():
    assert [s.parent.name for s in SOURCES] == [s.stem for s in SOURCES]
    listed = re.findall(r"kernels/\S+\.cu", (ROOT / "CMakeLists.txt").read_text())
    assert sorted(listed) == [s.relative_to(ROOT).as_posix() for s in SOURCES]
