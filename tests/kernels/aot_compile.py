"""Compile what the Triton launchers launch, ahead of time for one architecture and without a GPU.

The launchers run on small CPU tensors with the launch replaced by a recorder, so that the specialisations compiled
here are the launchers' own. Prints one JSON object per kernel. A script, for test_triton_aot.py:

    python tests/kernels/aot_compile.py 90
"""

import importlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.bool: "*i1",
    torch.uint8: "*u8",
}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

launches: list[tuple[Any, dict[str, Any], dict[str, Any]]] = []


def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
    """Stand in for JITFunction.run: remember the kernel, its arguments by name, and its options."""
    del grid, warmup
    options = {name: keywords.pop(name) for name in list(keywords) if name not in kernel.arg_names}
    launches.append((kernel, dict(zip(kernel.arg_names, args, strict=False)) | keywords, options))


def source(kernel: Any, arguments: dict[str, Any]) -> ASTSource:
    """Specialise a kernel as a launch with these arguments does: by dtype, alignment, None and 1."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if isinstance(value, Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            aligned = value.data_ptr() % 16 == 0
        elif parameter.is_constexpr or value is None or (value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            aligned = not isinstance(value, float) and value % 16 == 0 and not parameter.do_not_specialize
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def resources(cubin: bytes) -> dict[str, int]:
    """Return registers, and bytes of stack (where spills go), shared and local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(n) for name, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def op(name: str) -> Any:
    """Import the Triton side of an op such that it lets CPU tensors through to the recorder."""
    module = importlib.import_module(f"lago_fast.kernels.{name}.triton_fused")
    module.INTERPRETED = True
    return module


def scalar() -> Tensor:
    return torch.ones(())


def direction(variant: str) -> str:
    return "prior_policy" if "prior_policy" in variant else "policy_prior"


def categorical_loss(rows: int, actions: int, dtype: torch.dtype, variant: str = "") -> None:
    module = op("ppo_kl_categorical")
    element = torch.zeros(rows, actions, dtype=dtype)
    row = element[:, 0].contiguous()
    mask = element.bool() if "masked" in variant else None
    kl_weight = row if "kl_weighted" in variant else None
    inputs = module.Inputs(element, row, row.long(), row, row, row, row, row, element, mask, kl_weight)
    coefficients = module.Coefficients(*(scalar() for _ in range(5)), scalar() if "clipped" in variant else None)
    module.loss_and_grads(inputs, coefficients, kl_direction=direction(variant))


def gaussian_loss(rows: int, dims: int, dtype: torch.dtype, variant: str = "") -> None:
    module = op("ppo_kl_gaussian")
    element, row, shared = torch.zeros(rows, dims, dtype=dtype), torch.zeros(rows), torch.zeros(dims, dtype=dtype)
    log_std = element if "std_per_row" in variant else shared
    prior_log_std = shared if "shared_prior" in variant else element
    kl_weight = row if "kl_weighted" in variant else None
    inputs = module.Inputs(element, log_std, row, element, row, row, row, row, row, element, prior_log_std, kl_weight)
    coefficients = module.Coefficients(*(scalar() for _ in range(5)), scalar() if "clipped" in variant else None)
    module.loss_and_grads(inputs, coefficients, kl_direction=direction(variant))


def categorical_kl(rows: int, actions: int, dtype: torch.dtype, variant: str = "") -> None:
    module = op("prior_kl")
    element = torch.zeros(rows, actions, dtype=dtype)
    inputs = module.CategoricalInputs(element, element, element.bool() if "masked" in variant else None)
    module.categorical(inputs, scalar(), direction=direction(variant), needs_grad="no_grad" not in variant)


def gaussian_kl(rows: int, dims: int, dtype: torch.dtype, variant: str = "") -> None:
    module = op("prior_kl")
    element, shared = torch.zeros(rows, dims, dtype=dtype), torch.zeros(dims, dtype=dtype)
    inputs = module.GaussianInputs(element, element if "std_per_row" in variant else shared, element, element)
    module.gaussian(inputs, scalar(), direction=direction(variant), needs_grad="no_grad" not in variant)


def categorical_sample(rows: int, actions: int, dtype: torch.dtype, variant: str = "") -> None:
    module = op("sample")
    element = torch.zeros(rows, actions, dtype=dtype)
    mask = element.bool() if "masked" in variant else None
    inputs = module.CategoricalInputs(element, None if "no_prior" in variant else element, mask)
    module.categorical(inputs, scalar(), torch.zeros(2, dtype=torch.int64), direction(variant))


def gaussian_sample(rows: int, dims: int, dtype: torch.dtype, variant: str = "") -> None:
    module = op("sample")
    element, shared = torch.zeros(rows, dims, dtype=dtype), torch.zeros(dims, dtype=dtype)
    prior = (None, None) if "no_prior" in variant else (element, element)
    module.gaussian(
        module.GaussianInputs(element, shared, *prior),
        scalar(),
        torch.zeros(2, dtype=torch.int64),
        direction(variant),
    )


def gae(steps: int, envs: int) -> None:
    array = torch.zeros(steps, envs)
    op("gae").gae(*[array] * 3, *[array.bool()] * 3, 0.99, 0.95)


F32, BF16 = torch.float32, torch.bfloat16
CASES: list[tuple[Callable[..., None], tuple[Any, ...]]] = [
    *((categorical_loss, (100_000, a, t)) for a, t in itertools.product((4, 40, 1024), (F32, BF16))),
    (categorical_loss, (2048, 40, F32)),
    (categorical_loss, (2048, 40, F32, "kl_weighted")),
    (categorical_loss, (64, 40, F32, "kl_weighted")),
    (categorical_loss, (100_000, 1024, F32, "prior_policy masked clipped kl_weighted")),
    (categorical_loss, (100, 32_000, BF16, "kl_weighted")),
    (categorical_loss, (300, 4096, F32)),
    (categorical_loss, (100, 32_000, F32)),
    (categorical_loss, (100, 32_000, BF16, "prior_policy")),
    (categorical_loss, (64, 40, F32)),
    (categorical_loss, (64, 64, BF16, "prior_policy masked clipped")),
    (categorical_loss, (256, 3, F32, "masked clipped")),
    (categorical_loss, (256, 16, F32, "masked clipped")),
    (categorical_loss, (100_000, 2, F32, "masked clipped")),
    (categorical_loss, (100_000, 3, F32, "prior_policy masked clipped")),
    (categorical_loss, (300, 4095, BF16, "prior_policy masked clipped")),
    (categorical_loss, (100_000, 40, F32, "prior_policy masked clipped")),
    *((gaussian_loss, (100_000, d, t)) for d, t in itertools.product((4, 17), (F32, BF16))),
    (gaussian_loss, (100_000, 4, F32, "std_per_row clipped")),
    (gaussian_loss, (100_000, 17, F32, "prior_policy shared_prior")),
    (gaussian_loss, (2048, 4, F32)),
    (gaussian_loss, (2048, 4, F32, "kl_weighted")),
    (gaussian_loss, (64, 4, F32, "kl_weighted")),
    (gaussian_loss, (100_000, 17, BF16, "prior_policy std_per_row clipped kl_weighted")),
    (gaussian_loss, (64, 4, F32)),
    (gaussian_loss, (64, 17, F32, "prior_policy std_per_row clipped")),
    (gaussian_loss, (256, 8, F32, "shared_prior clipped")),
    (gaussian_loss, (100, 200, BF16, "clipped")),
    (gaussian_loss, (100_000, 1, F32, "std_per_row")),
    *((categorical_kl, (100_000, 40, t)) for t in (F32, BF16)),
    (categorical_kl, (100, 1024, F32, "prior_policy masked")),
    (categorical_kl, (100, 4096, F32)),
    (categorical_kl, (100, 32_000, F32)),
    (categorical_kl, (64, 4, F32, "no_grad")),
    (gaussian_kl, (100_000, 4, F32)),
    (gaussian_kl, (100_000, 17, BF16, "prior_policy std_per_row")),
    (gaussian_kl, (64, 4, F32, "no_grad")),
    (categorical_sample, (64, 4, F32)),
    (categorical_sample, (4096, 40, F32, "prior_policy masked")),
    (categorical_sample, (64, 40, BF16, "no_prior")),
    (categorical_sample, (64, 32_000, F32)),
    (gaussian_sample, (64, 4, F32)),
    (gaussian_sample, (8192, 17, BF16, "prior_policy")),
    (gaussian_sample, (64, 17, F32, "no_prior")),
    (gae, (128, 64)),
    (gae, (128, 63)),
    (gae, (128, 1)),
]


def label(case: tuple[Any, ...]) -> str:
    return " ".join(str(part).removeprefix("torch.") for part in case)


def main(capability: int) -> Iterator[dict[str, Any]]:
    assert not triton.knobs.runtime.interpret, "TRITON_INTERPRET is set"
    triton.JITFunction.run = record
    target = GPUTarget("cuda", capability, 32)
    seen = set()
    for launch, arguments in CASES:
        launches.clear()
        launch(*arguments)
        for kernel, values, options in launches:
            made = source(kernel, values)
            key = made.hash(), str(options)
            if key in seen:
                continue
            seen.add(key)
            compiled = triton.compile(made, target=target, options=options)
            yield {
                "op": kernel.fn.__module__.split(".")[-2],
                "kernel": kernel.fn.__name__,
                "case": label(arguments),
                "warps": compiled.metadata.num_warps,
                **resources(compiled.asm["cubin"]),
            }


if __name__ == "__main__":
    for row in main(int(sys.argv[1])):
        print(json.dumps(row), flush=True)
