"""The layout as a test: who may import whom, what stays light, what every op must have.

The table RULES is the design; a file that no rule covers fails, so that a new room must be given one.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNEL_OPS = sorted(p.name for p in (ROOT / "kernels").iterdir() if p.is_dir() and p.name != "__pycache__")
WITH_A_PRIOR = ("ppo_kl_categorical", "ppo_kl_gaussian")

ANYTHING = ("*",)
NATIVE = ("lago_fast._C", "lago_fast._cuda")


@dataclass(frozen=True)
class Rule:
    """What the files of one room may import besides the standard library, their own room, `errors` and `cores`."""

    may: tuple[str, ...] = ()
    inside_functions: tuple[str, ...] = ()
    never: tuple[str, ...] = ()


ENVS = ("numpy", "gymnasium", "envpool", "mujoco", *NATIVE)
PRIORS = ("torch", "numpy", "safetensors", "lago_fast.ops", "lago_fast.capture", *NATIVE)
JOINS_ROOMS = Rule(may=ANYTHING, never=("lago_fast.cli",))
LANGUAGE_MODELS = ("transformers", "peft", "huggingface_hub", "accelerate", "bitsandbytes", "torchao")

# Path below the root -> rule. The longest path that fits a file decides.
RULES = {
    **{f"kernels/{op}": Rule(may=("torch", *NATIVE)) for op in KERNEL_OPS},
    # imported by `ops.resolve` when it is asked for, so that triton is needed by nobody else
    **{f"kernels/{op}/triton_fused.py": Rule(may=("torch", "triton")) for op in KERNEL_OPS},
    # PPO's losses with a prior stand on what all of PPO's losses share
    **{f"kernels/{op}": Rule(may=("torch", "lago_fast.kernels.ppo", *NATIVE)) for op in WITH_A_PRIOR},
    **{f"kernels/{op}/triton_fused.py": Rule(may=("torch", "triton", "lago_fast.kernels.ppo")) for op in WITH_A_PRIOR},
    "lago_fast/errors.py": Rule(),
    "lago_fast/cores.py": Rule(inside_functions=("torch",)),
    "lago_fast/capture.py": Rule(may=("torch",)),
    "lago_fast/ops.py": Rule(may=("torch", "lago_fast.kernels")),
    "lago_fast/buffers.py": Rule(may=("torch", "numpy", "lago_fast.ops")),
    "lago_fast/envs": Rule(may=ENVS),
    "lago_fast/envs/sb3_adapter.py": Rule(may=(*ENVS, "stable_baselines3")),
    "lago_fast/envs/experts.py": Rule(may=ENVS, inside_functions=("metaworld",)),
    "lago_fast/envs/official.py": Rule(may=ENVS, inside_functions=("metaworld",)),
    # their packages are played through, and needed by nobody else
    "lago_fast/envs/textworld_games.py": Rule(may=ENVS, inside_functions=("textworld",)),
    "lago_fast/envs/alfworld.py": Rule(may=ENVS, inside_functions=("alfworld", "textworld")),
    "lago_fast/envs/clevr_drawing.py": Rule(may=ENVS, inside_functions=("PIL", "imageio", "imageio_ffmpeg")),
    "lago_fast/priors": Rule(may=PRIORS, inside_functions=LANGUAGE_MODELS),
    "lago_fast/priors/cache_store.py": Rule(may=PRIORS, inside_functions=("lmdb",)),
    # a model trained here has a tokenizer made here
    "lago_fast/priors/small_lm.py": Rule(may=PRIORS, inside_functions=(*LANGUAGE_MODELS, "tokenizers")),
    "lago_fast/priors/base.py": Rule(may=("torch", "lago_fast.ops")),
    "lago_fast/priors/text_base.py": Rule(may=("torch",)),
    "lago_fast/algorithms": Rule(
        may=(
            "torch",
            "numpy",
            "gymnasium",
            "stable_baselines3",
            "safetensors",
            "lago_fast.ops",
            "lago_fast.buffers",
            "lago_fast.capture",
            "lago_fast.priors.base",
            "lago_fast.priors.text_base",
        )
    ),
    "lago_fast/demo_files.py": Rule(inside_functions=("minari", "h5py")),
    "lago_fast/demos.py": Rule(
        may=("numpy", "lago_fast.envs", "lago_fast.demo_files"), inside_functions=("minari", "h5py", "gymnasium")
    ),
    "lago_fast/text_demos.py": Rule(
        may=("numpy", "lago_fast.envs", "lago_fast.demos", "lago_fast.demo_files"),
        inside_functions=("minari", "gymnasium"),
    ),
    "lago_fast/presets.py": Rule(),
    "lago_fast/runs.py": Rule(may=("numpy",), inside_functions=("torch",)),
    "lago_fast/plots.py": Rule(may=("numpy", "matplotlib")),
    "lago_fast/film.py": Rule(may=("numpy", "lago_fast.envs", "lago_fast.evaluate", "lago_fast.presets")),
    "lago_fast/audit_page.py": Rule(may=("numpy", "matplotlib")),
    "lago_fast/evaluate.py": Rule(may=("numpy", "lago_fast.envs", "lago_fast.presets")),
    # Here the rooms are joined; none of the files above may name these.
    "lago_fast/__init__.py": Rule(inside_functions=ANYTHING),
    "lago_fast/stage_one.py": JOINS_ROOMS,
    "lago_fast/training.py": JOINS_ROOMS,
    "lago_fast/text_lane.py": JOINS_ROOMS,
    "lago_fast/text_training.py": JOINS_ROOMS,
    "lago_fast/throughput.py": JOINS_ROOMS,
    "lago_fast/report.py": JOINS_ROOMS,
    "lago_fast/audit.py": JOINS_ROOMS,
    "lago_fast/checks.py": JOINS_ROOMS,
    "lago_fast/experiment.py": JOINS_ROOMS,
    "lago_fast/cli": Rule(may=ANYTHING),
}

FORBIDDEN_ON_IMPORT = {
    "lago_fast": ("torch", "numpy", "gymnasium", "stable_baselines3", "transformers", "envpool", "minari"),
    "lago_fast.ops": ("gymnasium", "stable_baselines3", "transformers", "envpool", "minari", "triton"),
    "lago_fast.envs": ("torch", "stable_baselines3", "transformers", "metaworld", "mujoco", "envpool"),
    "lago_fast.envs.clevr_gym": ("torch", "stable_baselines3", "transformers", "mujoco", "PIL", "imageio"),
    "lago_fast.demos": ("torch", "stable_baselines3", "transformers", "metaworld"),
    "lago_fast.text_demos": ("torch", "stable_baselines3", "transformers", "textworld", "alfworld"),
    "lago_fast.envs.text_gym": ("torch", "stable_baselines3", "transformers", "textworld", "alfworld"),
    "lago_fast.priors": ("stable_baselines3", "transformers", "peft", "envpool", "minari"),
    "lago_fast.cli": ("torch", "numpy", "stable_baselines3", "transformers", "envpool", "matplotlib"),
    "lago_fast.algorithms": ("transformers", "peft", "envpool", "minari"),
}

LINE_BUDGET = 400
REFERENCE_LINE_BUDGET = 100


def sources() -> list[str]:
    """List every Python file of the package and the kernels, each once, relative to the root."""
    package = [p for p in (ROOT / "lago_fast").rglob("*.py") if "kernels" not in p.relative_to(ROOT).parts]
    found = [*package, *(ROOT / "kernels").rglob("*.py")]
    return sorted(p.relative_to(ROOT).as_posix() for p in found)


def rule_of(path: str) -> tuple[str, Rule]:
    """Return the room of a file and its rule."""
    rooms = [room for room in RULES if path == room or path.startswith(room + "/")]
    assert rooms, f"{path} is in no room: give it a rule in RULES, with its reason"
    room = max(rooms, key=len)
    return room, RULES[room]


def imports(tree: ast.AST, package: str, lazy: bool = False) -> Iterator[tuple[str, int, bool]]:
    """Yield (dotted name, line, whether it is inside a function or for the type checker only)."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((f"{base}.{alias.name}", node.lineno, lazy) for alias in node.names)
        else:
            postponed = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
                isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            )
            yield from imports(node, package, lazy or postponed)


def is_below(name: str, prefixes: tuple[str, ...]) -> bool:
    """Tell whether a dotted name is one of the prefixes or lies below one."""
    return prefixes == ANYTHING or any(name == p or name.startswith(p + ".") for p in prefixes)


def own_room(room: str) -> tuple[str, ...]:
    """Return the dotted name of a room, which its files may always import from."""
    folder = room if not room.endswith(".py") else room.rsplit("/", 1)[0]
    dotted = folder.replace("/", ".")
    if dotted == "lago_fast":
        return ()
    return (f"lago_fast.{dotted}",) if dotted.startswith("kernels.") else (dotted,)


def violations(path: str, source: str) -> list[str]:
    """Return a sentence for each import that the rule of `path` does not allow."""
    room, rule = rule_of(path)
    package = path.replace("/", ".").rsplit(".", 2)[0]
    package = f"lago_fast.{package}" if package.startswith("kernels") else package
    always = (
        ("lago_fast.errors", "lago_fast.cores", *own_room(room)) if not path.startswith("kernels/") else own_room(room)
    )
    found = []
    for name, line, lazy in imports(ast.parse(source), package):
        if name.split(".")[0] in sys.stdlib_module_names or is_below(name, always):
            continue
        if is_below(name, rule.may) and not is_below(name, rule.never):
            continue
        if is_below(name, rule.inside_functions):
            if not lazy:
                found.append(f"{path}:{line} imports {name} at module level; only inside functions here")
            continue
        found.append(f"{path}:{line} imports {name}, which {room} may not")
    return found


@pytest.mark.parametrize("path", sources())
def test_imports_follow_the_table(path):
    assert violations(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/gae/reference.py", "from lago_fast import ops"),
        ("kernels/gae/reference.py", "from lago_fast.errors import LagoError"),
        ("kernels/gae/reference.py", "from lago_fast.kernels.prior_kl import reference"),
        ("kernels/gae/reference.py", "import triton"),
        ("lago_fast/ops.py", "def f():\n    from lago_fast.buffers import RolloutBuffer"),
        ("lago_fast/envs/vec_env.py", "import torch"),
        ("lago_fast/envs/vec_env.py", "from stable_baselines3.common.vec_env import VecEnv"),
        ("lago_fast/envs/experts.py", "import metaworld"),
        ("lago_fast/envs/clevr_drawing.py", "from PIL import Image"),
        ("lago_fast/priors/base.py", "def f():\n    import transformers"),
        ("lago_fast/priors/latent_action.py", "from transformers import AutoModel"),
        ("lago_fast/priors/latent_action.py", "from ..demos import load_demos"),
        (
            "lago_fast/algorithms/fast_kl_ppo.py",
            "from lago_fast.priors.latent_action import LatentActionPrior",
        ),
        ("lago_fast/algorithms/fast_kl_ppo.py", "from lago_fast import make_metaworld"),
        ("lago_fast/envs/textworld.py", "def f():\n    import textworld"),
        ("lago_fast/envs/textworld_games.py", "import textworld"),
        ("lago_fast/envs/alfworld.py", "import alfworld"),
        ("lago_fast/demos.py", "import torch"),
        ("lago_fast/demos.py", "from lago_fast.presets import DEMO"),
        ("lago_fast/training.py", "from lago_fast.cli import console"),
        ("lago_fast/__init__.py", "import lago_fast.demos"),
    ],
)
def test_the_table_refuses(path, source):
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize("module", FORBIDDEN_ON_IMPORT)
def test_import_stays_light(module, tmp_path):
    code = f"import {module}, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert loaded.isdisjoint(FORBIDDEN_ON_IMPORT[module])


def test_kernels_is_a_link_without_a_package_at_its_top():
    link = ROOT / "lago_fast" / "kernels"
    assert link.is_symlink()
    assert link.resolve() == ROOT / "kernels"
    # A top-level package of this name would hide Hugging Face's, which transformers probes on import.
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("op", KERNEL_OPS)
def test_every_op_has_its_definition(op):
    assert (ROOT / "kernels" / op / "reference.py").is_file()


def test_native_code_knows_neither_python_nor_its_neighbours():
    for path in sorted((ROOT / "csrc").rglob("*")):
        part = path.relative_to(ROOT / "csrc").parts[0]
        if path.suffix not in {".cc", ".h", ".inc"} or part == "bindings":
            continue
        for include in re.findall(r'#include\s+[<"]([^>"]+)[>"]', path.read_text()):
            assert "pybind11" not in include, f"{path.name}: only the bindings know Python"
            assert include != "Python.h", f"{path.name}: only the bindings know Python"
            assert "/" not in include or include.split("/")[0] in {"core", "sys", part}, f"{path.name}: {include}"


def test_print_files_over_budget(capsys):
    lengths = {path: len((ROOT / path).read_text().splitlines()) for path in sources()}
    over = {
        path: n
        for path, n in lengths.items()
        if n > (REFERENCE_LINE_BUDGET if path.endswith("reference.py") else LINE_BUDGET)
    }
    with capsys.disabled():
        for path, n in over.items():
            print(f"\nover its line budget: {path}, {n} lines", end="")
    assert lengths
