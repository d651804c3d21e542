# The CUDA kernels of a build with -DLAGO_CUDA=ON. Addresses are device pointers as ints, 0 for none; `type` is 0 for
# float32, 1 for bfloat16, 2 for float16; `place` is (device index, stream); the bindings are in csrc/bindings/cuda.cc.
from collections.abc import Sequence

MAX_DIMS: int

def categorical_workspace(rows: int) -> int: ...
def gaussian_workspace(rows: int, dims: int, log_std_per_row: bool) -> int: ...
def ppo_kl_categorical(
    arrays: Sequence[int],
    type: int,
    columns: Sequence[tuple[int, int]],
    coefficients: Sequence[int],
    statistics: int,
    workspace: int,
    workspace_floats: int,
    rows: int,
    n_actions: int,
    prior_policy: bool,
    normalize_advantage: bool,
    place: tuple[int, int],
) -> None: ...
def ppo_kl_gaussian(
    arrays: Sequence[int],
    type: int,
    columns: Sequence[tuple[int, int]],
    coefficients: Sequence[int],
    statistics: int,
    workspace: int,
    workspace_floats: int,
    rows: int,
    dims: int,
    log_std_per_row: bool,
    prior_log_std_per_row: bool,
    prior_policy: bool,
    normalize_advantage: bool,
    place: tuple[int, int],
) -> None: ...
def prior_kl_categorical(
    arrays: Sequence[int], type: int, rows: int, n_actions: int, prior_policy: bool, place: tuple[int, int]
) -> None: ...
def prior_kl_gaussian(
    arrays: Sequence[int],
    type: int,
    rows: int,
    dims: int,
    log_std_per_row: bool,
    prior_log_std_per_row: bool,
    prior_policy: bool,
    place: tuple[int, int],
) -> None: ...
def sample_categorical(
    arrays: Sequence[int], type: int, rows: int, n_actions: int, prior_policy: bool, place: tuple[int, int]
) -> None: ...
def sample_gaussian(
    arrays: Sequence[int],
    type: int,
    rows: int,
    dims: int,
    log_std_per_row: bool,
    prior_log_std_per_row: bool,
    prior_policy: bool,
    place: tuple[int, int],
) -> None: ...
def gae(
    arrays: Sequence[int], n_steps: int, n_envs: int, gamma: float, decay: float, place: tuple[int, int]
) -> None: ...
