"""The latent-action prior: instruction and state token -> pretrained transformer -> action distribution.

LaGO (arXiv 2606.24669) projects states into the language model's latent space and reads actions off it
without text; projector, transformer and head are laid out as in KALM (arXiv 2404.09248). The sequence:

    "pooled"  [instruction latent, state]   the text is encoded once; fast, the default of encoders
    "prompt"  [instruction tokens, state]   the full text in every query

The hidden state at the state token is the latent. Test: pytest tests/priors/test_latent_action.py
"""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lago_fast.errors import HashMismatch, PriorMismatch, UnsupportedArgument
from lago_fast.priors import backbone as backbones
from lago_fast.priors import folder as folders
from lago_fast.priors.backbone import Backbone
from lago_fast.priors.base import Kind, PriorOutput, check_query
from lago_fast.priors.chunks import answer_in_chunks

Form = Literal["pooled", "prompt"]
Finetune = Literal["frozen", "lora", "full"]
Std = Literal["state_independent", "state_dependent", "fixed"]


@dataclass(frozen=True)
class PriorConfig:
    """What a latent-action prior is, apart from its weights and its instructions."""

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
    lora_rank: int = 8
    lora_alpha: int = 16

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        folders.check_choice("kind", self.kind, ("gaussian", "categorical"))
        folders.check_choice("form", self.form, ("pooled", "prompt"))
        folders.check_choice("finetune", self.finetune, ("frozen", "lora", "full"))
        folders.check_choice("std", self.std, ("state_independent", "state_dependent", "fixed"))
        if self.kind == "gaussian" and not len(self.action_low) == len(self.action_high) == self.action_dim:
            raise PriorMismatch(
                f"action_low, action_high: {len(self.action_low)} and {len(self.action_high)} values "
                f"for {self.action_dim} action dimensions; give the bounds of the action box"
            )
        if self.std_init <= 0 or self.std_floor < 0 or self.state_clip <= 0:
            raise UnsupportedArgument("std_init, std_floor, state_clip: must be positive (std_floor may be 0)")


class LatentActionPrior(nn.Module):
    """A distribution over actions read off a transformer's hidden state at the state token.

    Args:
        config: what to build.
        backbone: a loaded transformer; shared where it stays as it is, copied where it is cut or tuned.
        instructions: M texts, each at most once.
        query_batch_size: rows per forward pass of a query.
        table: [M, Z] latents of the instructions where they are known; else they are computed here.

    Built trainable where `config.finetune` says so; `freeze()` (called by fit_prior and load) ends that.
    """

    mean_state: Tensor
    std_state: Tensor
    table: Tensor
    action_low: Tensor
    action_high: Tensor
    token_rms: Tensor
    tokens: Tensor
    lengths: Tensor
    transformer: Any

    def __init__(
        self,
        config: PriorConfig,
        backbone: Backbone,
        instructions: Sequence[str],
        *,
        query_batch_size: int = 1024,
        table: Tensor | None = None,
    ) -> None:
        super().__init__()
        if len(set(instructions)) != len(instructions):
            raise PriorMismatch("instructions: a text occurs twice; give each text one id")
        self.config, self.reference = config, backbone.reference()
        self.kind, self.state_dim, self.action_dim = config.kind, config.state_dim, config.action_dim
        self.instructions = list(instructions)
        self.query_batch_size = query_batch_size
        self.metrics: dict[str, Any] = {}
        self._backbone = backbone
        width = backbone.hidden_size
        table = backbones.encode_instructions(instructions, backbone) if table is None else table
        self.register_buffer("table", table)
        self._tokenise()
        self.transformer = _tunable(backbone.model, config)

        # soft tokens enter at the scale of the word embeddings, whatever the family
        embedding = backbone.model.get_input_embeddings().weight
        self.register_buffer("token_rms", embedding.detach().float().square().mean().sqrt())
        self.register_buffer("mean_state", torch.zeros(config.state_dim))
        self.register_buffer("std_state", torch.ones(config.state_dim))
        self.register_buffer("action_low", torch.tensor(config.action_low))
        self.register_buffer("action_high", torch.tensor(config.action_high))
        self.projector = nn.Sequential(nn.Linear(config.state_dim, width), nn.GELU(), nn.Linear(width, width))
        self.adapter = nn.Linear(width, width) if config.form == "pooled" and config.instruction_adapter else None
        if self.adapter is not None:
            nn.init.eye_(self.adapter.weight)
            nn.init.zeros_(self.adapter.bias)
        outputs = config.action_dim * (2 if config.kind == "gaussian" and config.std == "state_dependent" else 1)
        self.head = _head(width, config.head_hidden, outputs)
        self.log_std: nn.Parameter | None = None
        if config.kind == "gaussian" and config.std != "state_dependent":
            start = torch.full((config.action_dim,), config.std_init).log()
            self.log_std = nn.Parameter(start, requires_grad=config.std == "state_independent")

    # what the contract names

    @property
    def digest(self) -> str:
        """Return the SHA-256 over backbone, configuration, weights and instructions."""
        about = {
            "backbone": self.reference["sha256"],
            "config": asdict(self.config),
            "texts": self.instructions,
        }
        tensors = {**self.own_tensors(), **self._tuned_tensors()}
        tensors["about"] = torch.tensor(list(json.dumps(about, sort_keys=True).encode()), dtype=torch.uint8)
        return backbones.hash_tensors(tensors)

    def instruction_table(self) -> Tensor:
        """Return the instruction latents [M, Z] float32, each of length 1, from the untuned backbone."""
        return self.table.clone()

    def telemetry(self) -> dict[str, float]:
        """Return no figures: an exact query has nothing to report."""
        return {}

    @torch.no_grad()
    def query(self, state: Tensor, instruction_id: Tensor) -> PriorOutput:
        """Answer for raw states [B, S] float32 and instruction ids [B] int64.

        Mean clamped to the action box, std floored at `std_floor`; the answer is on the prior's device.
        Raises PriorMismatch (shape, id) and NonFiniteError.
        """
        state, instruction_id = state.to(self.table.device), instruction_id.to(self.table.device)
        check_query(self, state, instruction_id)
        return answer_in_chunks(lambda s, i: self.bounded(self(s, i)), state, instruction_id, self.query_batch_size)

    # the network

    def forward(self, state: Tensor, instruction_id: Tensor, noise: float = 0.0) -> PriorOutput:
        """Return the unclamped, unfloored distribution with gradients, as the loss wants it.

        Args:
            state: [B, S] float32, raw.
            instruction_id: [B] int64.
            noise: std of Gaussian noise added to the normalised state.
        """
        latent = self._latent(self.normalise(state, noise), instruction_id)
        out = self.head(latent)
        if self.kind == "categorical":
            return PriorOutput(log_probs=out.log_softmax(dim=-1), latent=latent)
        if self.log_std is None:
            mean, log_std = out.chunk(2, dim=-1)
            return PriorOutput(mean=mean, log_std=log_std.clamp(-5, 2), latent=latent)
        return PriorOutput(mean=out, log_std=self.log_std.expand_as(out), latent=latent)

    def bounded(self, raw: PriorOutput) -> PriorOutput:
        """Return the distribution with its mean in the action box and its std above the floor."""
        if raw.mean is None or raw.log_std is None:
            return raw
        floor = max(self.config.std_floor, 1e-6)
        return raw._replace(
            mean=raw.mean.clamp(self.action_low, self.action_high),
            log_std=raw.log_std.clamp(min=torch.tensor(floor).log().item()),
        )

    def normalise(self, state: Tensor, noise: float = 0.0) -> Tensor:
        """Return states in standard deviations of the demonstrations, clipped."""
        normal = ((state - self.mean_state) / self.std_state).clamp(-self.config.state_clip, self.config.state_clip)
        return normal + noise * torch.randn_like(normal) if noise else normal

    def fit_normaliser(self, states: Tensor) -> None:
        """Take mean and std [S] from states [n, S]; a constant column keeps std 1."""
        std, mean = torch.std_mean(states, dim=0, correction=0)
        self.mean_state.copy_(mean)
        self.std_state.copy_(torch.where(std < 1e-6, torch.ones_like(std), std.clamp(min=1e-3)))

    def _latent(self, normal: Tensor, instruction_id: Tensor) -> Tensor:
        state_token = self.projector(normal) * self.token_rms  # [B, Z]
        if self.config.form == "pooled":
            text = self.table[instruction_id] * self.table.shape[1] ** 0.5
            text = (text if self.adapter is None else self.adapter(text)) * self.token_rms
            return self._run(torch.stack([text, state_token], dim=1), None)[:, 1]
        lengths = self.lengths[instruction_id]
        longest = int(lengths.max())
        rows = torch.arange(len(normal), device=normal.device)
        tokens = self.transformer.get_input_embeddings()(self.tokens[instruction_id, :longest])  # [B, L, Z]
        sequence = torch.cat([tokens, tokens.new_zeros(len(tokens), 1, tokens.shape[2])], dim=1)
        # the state follows its own text, and the padding follows the state: positions are as without padding
        sequence = sequence.index_put((rows, lengths), state_token)
        mask = torch.arange(longest + 1, device=normal.device) <= lengths[:, None]
        return self._run(sequence, mask.long())[rows, lengths]

    def _run(self, sequence: Tensor, mask: Tensor | None) -> Tensor:
        return self.transformer(inputs_embeds=sequence, attention_mask=mask).last_hidden_state

    # instructions

    def _tokenise(self) -> None:
        tokens, lengths = backbones.tokenise(self._backbone, self.instructions)
        self.register_buffer("tokens", tokens.to(self.table.device), persistent=False)
        self.register_buffer("lengths", lengths.to(self.table.device), persistent=False)

    def extend_instructions(self, texts: Sequence[str]) -> None:
        """Add the texts that are new; their ids follow the present ones, and the digest changes."""
        fresh = [text for text in dict.fromkeys(texts) if text not in self.instructions]
        if not fresh:
            return
        # latents come from the whole, untuned backbone
        untuned = find_reference(self.reference, name=self._backbone.name)
        latents = backbones.encode_instructions(fresh, untuned).to(self.table.device)
        self.register_buffer("table", torch.cat([self.table, latents]))
        self.instructions = [*self.instructions, *fresh]
        self._tokenise()

    # keeping

    def own_tensors(self) -> dict[str, Tensor]:
        """Return every tensor of the prior outside of the transformer, by name."""
        return {name: t for name, t in self.state_dict().items() if not name.startswith("transformer.")}

    def _tuned_tensors(self) -> dict[str, Tensor]:
        if self.config.finetune == "frozen":
            return {}
        state = {f"transformer.{name}": t for name, t in self.transformer.state_dict().items()}
        return {n: t for n, t in state.items() if self.config.finetune == "full" or "lora_" in n}

    def freeze(self) -> "LatentActionPrior":
        """End training: evaluation mode, and no parameter requires a gradient."""
        return self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "LatentActionPrior":
        """Switch dropout on or off; a frozen transformer never drops anything."""
        super().train(mode)
        if self.config.finetune == "frozen":
            self.transformer.eval()
        return self

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write the prior folder; of the backbone a reference and a hash, and what was tuned.

        Raises RunExists when the folder is taken and `overwrite` is False.
        """

        def fill(place: Path) -> None:
            folders.write_tensors(place / "prior.safetensors", self.own_tensors())
            if self.config.finetune == "full":
                folders.write_tensors(place / "backbone.safetensors", dict(self.transformer.state_dict()))
            if self.config.finetune == "lora":
                self.transformer.save_pretrained(place / "adapter", save_embedding_layers=False)

        about = {
            "class": "LatentActionPrior",
            "digest": self.digest,
            "backbone": self.reference,
            "prior": asdict(self.config),
            "query_batch_size": self.query_batch_size,
            "instructions": self.instructions,
        }
        return folders.write_folder(folder, about, self.metrics, fill, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu", *, backbone: str = "") -> "LatentActionPrior":
        """Read a saved prior, frozen.

        Args:
            folder: what `save` wrote.
            device: where it is to answer.
            backbone: where the backbone is now, when it has moved; its hash must be the recorded one.

        Raises:
            PriorMismatch: no such prior there.
            HashMismatch: a file or the backbone's weights are not the recorded ones.
            BackboneUnavailable: the backbone cannot be found.
        """
        folder, saved, metrics = folders.read_folder(folder, "LatentActionPrior")
        entries: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in saved["prior"].items()}
        config = PriorConfig(**entries)
        tensors = folders.read_tensors(folder / "prior.safetensors")
        found = find_reference(saved["backbone"], name=backbone)
        frozen = replace(config, finetune="frozen")
        prior = cls(
            frozen,
            found,
            saved["instructions"],
            query_batch_size=saved["query_batch_size"],
            table=tensors["table"],
        )
        prior.config, prior.reference, prior.metrics = config, saved["backbone"], metrics
        own = {name: tensors[name] for name in prior.own_tensors()}
        prior.load_state_dict(own, strict=False)
        if config.finetune == "full":
            prior.transformer.load_state_dict(folders.read_tensors(folder / "backbone.safetensors"))
        if config.finetune == "lora":
            from peft import PeftModel

            prior.transformer = PeftModel.from_pretrained(prior.transformer, folder / "adapter")
        if prior.digest != saved["digest"]:
            raise HashMismatch(f"folder: {folder} does not have the digest in its config.json; fit it again")
        return prior.freeze().to(device)


def find_reference(reference: Mapping[str, Any], name: str = "") -> Backbone:
    """Load the recorded backbone, from `name` when it has moved; HashMismatch when it is another."""
    return backbones.find_backbone(
        name or reference["name"],
        revision=reference["revision"] if reference["source"] == "hub" else "",
        random_init=reference["random_init"],
        seed=reference["seed"],
        expected_sha256=reference["sha256"],
    )


def _head(width: int, hidden: int | None, outputs: int) -> nn.Module:
    if hidden is None:
        return nn.Linear(width, outputs)
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, outputs))


def _tunable(model: Any, config: PriorConfig) -> Any:
    """Return the transformer, cut to its layers, with gradients where `finetune` wants them."""
    if config.layers is not None or config.finetune != "frozen":
        model = copy.deepcopy(model)
    if config.layers is not None:
        backbones.keep_layers(model, config.layers)
    if config.finetune == "full":
        return model.requires_grad_(True)
    if config.finetune == "frozen":
        return model.requires_grad_(False)
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules="all-linear")
    return get_peft_model(model, lora)
