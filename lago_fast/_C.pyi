"""Types of the native CPU module (csrc/bindings.cc). Addresses are raw; the callers check the arrays."""

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
    inputs: tuple[int, ...],
    coefficients: tuple[int, ...],
    outputs: tuple[int, ...],
    rows: int,
    dims: int,
    log_std_per_row: bool,
    prior_log_std_per_row: bool,
    prior_policy: bool,
    normalize_advantage: bool,
    portable: bool,
) -> None: ...
