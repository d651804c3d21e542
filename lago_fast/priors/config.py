"""What a latent-action prior is, apart from its weights and its instructions.

Test: pytest tests/priors/test_latent_action.py
"""

import math
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

from lago_fast.errors import PriorMismatch, UnsupportedArgument
from lago_fast.priors.base import Kind
from lago_fast.priors.folder import check_choice

MAX_WIDTH = 2**16  # a file that asks for more asks for the machine's memory
Form = Literal["pooled", "prompt"]
Finetune = Literal["frozen", "lora", "qlora", "full"]
Std = Literal["state_independent", "state_dependent", "fixed"]
StatePath = Literal["token", "token_and_head"]
Attention = Literal["own", "prefix"]


@dataclass(frozen=True)
class PriorConfig:
    """The settings of a prior; all of them are in its digest."""

    kind: Kind
    state_dim: int
    action_dim: int  # D of a Gaussian, A of a categorical
    action_low: tuple[float, ...] = ()  # [D]; empty for a categorical
    action_high: tuple[float, ...] = ()
    form: Form = "pooled"
    finetune: Finetune = "frozen"
    layers: int | None = None  # first layers of the transformer that read the sequence; None: all
    std: Std = "state_independent"
    std_init: float = 0.5  # and the value of a fixed std
    std_floor: float = 0.2  # at query
    state_clip: float = 5.0  # of the normalised state, in standard deviations
    head_hidden: int | None = None  # width of the head's hidden layer; None: linear
    instruction_adapter: bool = True  # learned linear map on the instruction latent, "pooled" only
    # With "token" the state is a token of a two-layer projector, and no more. With "token_and_head" the projector is
    # linear and starts small, the head has two hidden layers and reads the state too, and instruction latents are
    # standardised: so the words are learnt before the demonstrated states are learnt by heart
    state_path: StatePath = "token"
    # With "own" tokens attend as the transformer was pretrained to. With "prefix" (a prefix language model's attention,
    # arXiv 1910.10683) the text's tokens see each other and not the state, which sees all: an encoder's keys and values
    # of a text are then the same for every state, as a causal decoder's are
    attention: Attention = "own"
    lora_rank: int = 8
    lora_alpha: int = 16

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        check_choice("kind", self.kind, ("gaussian", "categorical"))
        check_choice("form", self.form, ("pooled", "prompt"))
        check_choice("finetune", self.finetune, ("frozen", "lora", "qlora", "full"))
        check_choice("std", self.std, ("state_independent", "state_dependent", "fixed"))
        check_choice("state_path", self.state_path, ("token", "token_and_head"))
        check_choice("attention", self.attention, ("own", "prefix"))
        if self.state_path == "token_and_head" and self.head_hidden is None:
            raise UnsupportedArgument('state_path: "token_and_head" needs a hidden layer; give head_hidden, or "token"')
        for name in ("state_dim", "action_dim", "layers", "head_hidden", "lora_rank", "lora_alpha"):
            value = getattr(self, name)
            # True counts as 1 in Python, and not in what builds a transformer
            if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
                raise UnsupportedArgument(f"{name}: {value!r}; give a whole number")
        hidden = 1 if self.head_hidden is None else self.head_hidden
        widths = (self.state_dim, self.action_dim, hidden, self.lora_rank)
        if not 1 <= min(widths) <= max(widths) <= MAX_WIDTH:
            raise UnsupportedArgument(
                f"state_dim, action_dim, head_hidden, lora_rank: {widths}; each must lie in 1..{MAX_WIDTH:,}"
            )
        if self.kind == "gaussian" and not len(self.action_low) == len(self.action_high) == self.action_dim:
            raise PriorMismatch(
                f"action_low, action_high: {len(self.action_low)} and {len(self.action_high)} values "
                f"for {self.action_dim} action dimensions; give the bounds of the action box"
            )
        if not (0 < self.std_init < math.inf and 0 <= self.std_floor < math.inf and self.state_clip > 0):
            raise UnsupportedArgument(
                "std_init, std_floor, state_clip: must be positive (std_floor may be 0), and finite stds"
            )
