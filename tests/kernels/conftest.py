"""What the kernels' tests share: the device that Triton's kernels run on, and the table of what was proved."""

import pytest
import torch

PROVED = pytest.StashKey[dict[tuple[str, str], dict[str, str]]]()


@pytest.fixture
def device() -> torch.device:
    """The GPU with the real compiler, else the CPU with Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def note(request):
    """A function that notes for the summary how (op, impl) was tried with a dtype, and what came of it."""

    def write(op: str, impl: str, dtype: str, outcome: str) -> None:
        request.config.stash.setdefault(PROVED, {}).setdefault((op, impl), {})[dtype] = outcome

    return write


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print which op x implementation x dtype was proved, and why others were not."""
    proved = config.stash.get(PROVED, {})
    if not proved:
        return
    terminalreporter.section("kernels: proved against float64 autograd of the definitions")
    for (op, impl), by_dtype in sorted(proved.items()):
        line = "   ".join(f"{dtype} {outcome}" for dtype, outcome in by_dtype.items())
        terminalreporter.line(f"{op:<20}{impl:<11}{line}")
