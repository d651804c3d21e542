"""Every Triton kernel compiles for GPUs that are not here, and its variables fit in their registers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("aot_compile.py")

pytestmark = pytest.mark.slow


def compiled_for(capability: int) -> list[dict]:
    """Compile in a process of its own: the tests' process has Triton's interpreter on."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, SCRIPT, str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, env={**environment, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles_without_spills(capability, capsys):
    rows = compiled_for(capability)
    by_kernel: dict[str, list[dict]] = {}
    for row in rows:
        by_kernel.setdefault(f"{row['op']}.{row['kernel']}", []).append(row)
        print(f"sm_{capability}", *row.values())
    with capsys.disabled():
        for name, made in by_kernel.items():
            registers = sorted(row["REG"] for row in made)
            print(f"\nsm_{capability} {name}: {len(made)} specialisations, registers {registers}", end="")
    written = {
        f"{path.parent.name}.{line.split('(')[0].removeprefix('def ')}"
        for path in ROOT.glob("kernels/*/triton_fused.py")
        for line in path.read_text().splitlines()
        if line.startswith("def ") and line.split("(")[0].endswith("_kernel")
    }
    assert set(by_kernel) == written
    # what does not fit in registers goes to the stack
    assert not [row for row in rows if row["STACK"] or row["LOCAL"]]
