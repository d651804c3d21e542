"""Types of the native CPU module (csrc/bindings/). Addresses are raw; the callers check the arrays."""

from collections.abc import Sequence

from torch import Tensor

def addresses(tensors: tuple[Tensor | int | None, ...], kinds: str, rows: int, width: int) -> list[int] | None: ...
def gae(
    rewards_ptr: int,
    values_ptr: int,
    next_values_ptr: int,
    terminated_ptr: int,
    truncated_ptr: int,
    valid_ptr: int,
    advantages_ptr: int,
    returns_ptr: int,
    n_steps: int,
    n_envs: int,
    gamma: float,
    gae_lambda: float,
) -> None: ...
def ppo_kl_gaussian(
    tensors: tuple[Tensor | int | None, ...],
    kinds: str,
    rows: int,
    dims: int,
    log_std_per_row: bool,
    prior_log_std_per_row: bool,
    prior_policy: bool,
    normalize_advantage: bool,
    lanes: int,
    threads: int,
) -> bool: ...
def ppo_kl_categorical(
    tensors: tuple[Tensor | int | None, ...],
    kinds: str,
    rows: int,
    actions: int,
    prior_policy: bool,
    normalize_advantage: bool,
    lanes: int,
    threads: int,
) -> bool: ...
def prior_kl_categorical(
    logits_ptr: int,
    prior_log_probs_ptr: int,
    action_mask_ptr: int,
    kl_ptr: int,
    logits_grad_ptr: int,
    rows: int,
    actions: int,
    prior_temperature_ptr: int,
    prior_policy: bool,
    lanes: int,
) -> None: ...
def prior_kl_gaussian(
    inputs: tuple[int, ...],
    kl_ptr: int,
    mean_grad_ptr: int,
    log_std_grad_ptr: int,
    rows: int,
    dims: int,
    log_std_per_row: bool,
    prior_log_std_per_row: bool,
    prior_temperature_ptr: int,
    prior_policy: bool,
    lanes: int,
) -> None: ...
def sample_categorical(
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    rows: int,
    actions: int,
    state_ptr: int,
    prior_temperature_ptr: int,
    prior_policy: bool,
) -> None: ...
def sample_gaussian(
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    rows: int,
    dims: int,
    log_std_per_row: bool,
    prior_log_std_per_row: bool,
    state_ptr: int,
    prior_temperature_ptr: int,
    prior_policy: bool,
) -> None: ...
def philox(row: int, block: int, seed: int, step: int) -> list[int]: ...
def adam(
    block: tuple[int, ...],
    n: int,
    lr: float,
    beta_1: float,
    beta_2: float,
    eps: float,
    max_norm: float,
    step: float,
    lanes: int,
) -> float: ...
def take_rows(columns: Sequence[tuple[int, int, int]], picked_ptr: int, rows: int, limit: int) -> None: ...

class Networks:
    def __init__(
        self, networks: Sequence[Sequence[tuple[int, int, int, int, int, int]]], relu: bool, lanes: int
    ) -> None: ...
    def workspace(self, rows: int) -> int: ...
    def forward(self, x_ptr: int, rows: int, workspace_ptr: int, output_ptrs: Sequence[int], threads: int) -> None: ...
    def act_categorical(self, at: list[int], rows: int, threads: int) -> int: ...
    def act_gaussian(self, at: list[int], rows: int, threads: int) -> None: ...
    def backward(self, rows: int, workspace_ptr: int, output_grad_ptrs: Sequence[int], threads: int) -> None: ...

def clevr_push(
    qpos_ptr: int,
    qvel_ptr: int,
    ctrl_ptr: int,
    substeps_ptr: int,
    diverged_ptr: int,
    rows: int,
    threads: int,
) -> None: ...
def hash_bytes(bytes: bytes, seed: tuple[int, int]) -> list[int]: ...
def hash_observations(
    states_ptr: int,
    ids_ptr: int,
    seeds_ptr: int,
    keys_ptr: int,
    rows: int,
    width: int,
    instructions: int,
    resolution: float,
    threads: int,
) -> int: ...
def distinct_keys(keys_ptr: int, first_ptr: int, inverse_ptr: int, rows: int) -> int: ...
def seal_rows(keys_ptr: int, encoded_ptr: int, seals_ptr: int, rows: int, row_bytes: int) -> None: ...

class RowFormat:
    float32: RowFormat
    float16: RowFormat
    int8: RowFormat

class LatentTable:
    def __init__(
        self, format: RowFormat, parts: Sequence[int], budget_bytes: int, shards: int, threads: int, portable: bool
    ) -> None: ...
    @property
    def capacity(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def row_bytes(self) -> int: ...
    def encode(self, rows_ptr: int, encoded_ptr: int, rows: int) -> tuple[int, bool]: ...
    def lookup(self, keys_ptr: int, rows_ptr: int, hit_ptr: int, rows: int) -> None: ...
    def insert(self, keys_ptr: int, encoded_ptr: int, stored_ptr: int, rows: int) -> None: ...
    def clear(self) -> None: ...
    def stats(self) -> dict[str, int]: ...
