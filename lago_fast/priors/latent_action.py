"""The latent-action prior: instruction and state token -> pretrained transformer -> action distribution.

LaGO (arXiv 2606.24669) projects states into the language model's latent space and reads actions off it
without text; projector, transformer and head are laid out as in KALM (arXiv 2404.09248). The sequence:

    "pooled"  [instruction latent, state]   the text is encoded once; fast, the default of encoders
    "prompt"  [instruction tokens, state]   the full text; a decoder reads it once, for all queries

The hidden state at the state token is the latent. Where the text does not read the state (a causal decoder, or
`attention="prefix"`), its keys and values are kept and a query reads one token per state.
Test: pytest tests/priors/test_latent_action.py
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lago_fast.errors import PriorMismatch, UnsupportedArgument
from lago_fast.priors import backbone as backbones
from lago_fast.priors import latent_folder, parts, quantize, tuning
from lago_fast.priors import prefix as prefixes
from lago_fast.priors.backbone import Backbone
from lago_fast.priors.base import PriorOutput, check_query
from lago_fast.priors.buckets import Buckets
from lago_fast.priors.chunks import answer_in_chunks
from lago_fast.priors.config import PriorConfig
from lago_fast.priors.prefix import PrefixKV
from lago_fast.priors.quantize import Quantization
from lago_fast.priors.trust import Demonstrated

QUERY_ROWS = 1024  # of a forward pass of a query


class LatentActionPrior(nn.Module):
    """A distribution over actions read off a transformer's hidden state at the state token.

    Args:
        config: what to build.
        backbone: a loaded transformer; shared where it stays as it is, copied where it is cut or tuned.
        instructions: M texts, each at most once.
        query_batch_size: rows per forward pass of a query; halved, for good, when the GPU's memory does not suffice.
        table: [M, Z] latents of the instructions where they are known; else they are computed here.
        prefix_kv: keep the keys and values of the instructions, so that a query reads one token per state; None:
            where the text does not read the state. UnsupportedArgument where True cannot be, or False must not.
            They are made anew when a weight changes, which torch does not tell of one written through `.data`.

    Attributes:
        demonstrated: what the answers' trust is reckoned by; None: they have none.
        buckets: answer in few static shapes, on a CUDA device each captured once as a graph.

    Built trainable where `config.finetune` says so; `freeze()` (called by fit_prior and load) ends that.
    """

    mean_state: Tensor
    std_state: Tensor
    table: Tensor
    action_low: Tensor
    action_high: Tensor
    token_rms: Tensor
    mean_text: Tensor
    std_text: Tensor
    tokens: Tensor
    lengths: Tensor
    transformer: Any

    def __init__(
        self,
        config: PriorConfig,
        backbone: Backbone,
        instructions: Sequence[str],
        *,
        query_batch_size: int = QUERY_ROWS,
        table: Tensor | None = None,
        prefix_kv: bool | None = None,
    ) -> None:
        super().__init__()
        if isinstance(instructions, str) or len(set(instructions)) != len(instructions):
            raise PriorMismatch("instructions: one text alone, or one that occurs twice; give a list, each text once")
        if type(query_batch_size) is not int or query_batch_size < 1:
            raise UnsupportedArgument(f"query_batch_size: {query_batch_size!r}; give a number of rows, at least 1")
        self.config, self.reference = config, backbone.reference()
        self.kind, self.state_dim, self.action_dim = config.kind, config.state_dim, config.action_dim
        self.instructions = list(instructions)
        self.query_batch_size = query_batch_size
        self.metrics: dict[str, Any] = {}
        self.quantization: Quantization = "none"
        self.max_quantization_kl = quantize.MAX_KL_NATS
        self.prefix_kv = prefixes.is_wanted(prefix_kv, config, backbone)
        self.demonstrated: Demonstrated | None = None
        self.buckets = False
        self._kept: tuple[Any, PrefixKV] | None = None
        self._ready: tuple[Any, Callable[[Tensor, Tensor], Tensor], Buckets] | None = None
        self._backbone = replace(backbone, model=None)  # which may be cut or quantized below, and is not kept whole
        width = backbone.hidden_size
        table = backbones.encode_instructions(instructions, backbone) if table is None else table
        self.register_buffer("table", table)
        self._tokenise()
        self.transformer = tuning.tunable(backbone.model, config)

        # soft tokens enter at the scale of the words, whatever the family
        self.register_buffer("token_rms", parts.token_rms(backbone.model.get_input_embeddings()))
        self.register_buffer("mean_state", torch.zeros(config.state_dim))
        self.register_buffer("std_state", torch.ones(config.state_dim))
        self.register_buffer("action_low", torch.tensor(config.action_low))
        self.register_buffer("action_high", torch.tensor(config.action_high))
        self.projector = parts.projector(config, width)
        self.adapter = nn.Linear(width, width) if config.form == "pooled" and config.instruction_adapter else None
        if self.adapter is not None:
            nn.init.eye_(self.adapter.weight)
            nn.init.zeros_(self.adapter.bias)
            if config.state_path == "token_and_head":
                self.register_buffer("mean_text", torch.zeros(width))
                self.register_buffer("std_text", torch.full((width,), width**-0.5))
        outputs = config.action_dim * (2 if config.kind == "gaussian" and config.std == "state_dependent" else 1)
        self.head = parts.head(config, width, outputs)
        self.log_std: nn.Parameter | None = None
        if config.kind == "gaussian" and config.std != "state_dependent":
            start = torch.full((config.action_dim,), config.std_init).log()
            self.log_std = nn.Parameter(start, requires_grad=config.std == "state_independent")
        if config.attention == "prefix":  # refused now rather than at the first query, which comes after the fit
            ends = torch.stack([self.lengths.argmin(), self.lengths.argmax()])
            prefixes.build(self.transformer, *self._words(ends), 2, one_way=True)

    # what the contract names

    @property
    def digest(self) -> str:
        """Return the SHA-256 over backbone, configuration, weights, instructions and quantization."""
        return self.digest_as(self.quantization)

    def digest_as(self, quantization: Quantization) -> str:
        """Return what the digest would be with so many bits."""
        return latent_folder.digest_of(self, quantization)

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
        latent_of = self._ready_now() if self.prefix_kv or self.buckets else self._latent

        def ask(states: Tensor, ids: Tensor) -> PriorOutput:
            latent = latent_of(self.normalise(states), ids)
            answer = self.bounded(self._distribution(latent))
            return answer if self.demonstrated is None else answer._replace(trust=self.demonstrated(latent))

        return answer_in_chunks(ask, state, instruction_id, self)

    # the network

    def forward(
        self,
        state: Tensor,
        instruction_id: Tensor,
        noise: float = 0.0,
        wording_noise: float = 0.0,
        *,
        kept: bool = False,
    ) -> PriorOutput:
        """Return the unclamped, unfloored distribution with gradients, as the loss wants it.

        Args:
            state: [B, S] float32, raw.
            instruction_id: [B] int64.
            noise: std of Gaussian noise added to the normalised state.
            wording_noise: likewise, added to the instruction latent as the adapter reads it; pooled form only.
            kept: read the kept keys and values of the instructions, which have no gradients: the same answer.
                UnsupportedArgument unless `is_text_fixed`, and with `wording_noise`, which they could not take.
        """
        if kept and (wording_noise or not self.is_text_fixed):
            raise UnsupportedArgument("kept: a fit changes these instructions, or adds noise to them; leave kept=False")
        normal = self.normalise(state, noise)
        prefix = self._prefix_now() if kept else None
        return self._distribution(self._latent(normal, instruction_id, prefix, wording_noise=wording_noise))

    @property
    def is_text_fixed(self) -> bool:
        """Return whether a fit leaves the instructions' keys and values as they are, and they are kept."""
        return prefixes.stay(self.config) and self.prefix_kv

    def _distribution(self, latent: Tensor) -> PriorOutput:
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

    def fit_normaliser(self, states: Tensor, instruction_id: Tensor) -> None:
        """Take mean and std [S] from states [n, S]; a constant column keeps std 1.

        Where instruction latents are standardised, theirs [Z] are those of the instructions named, [m] int64.
        """
        parts.take_moments(states, self.mean_state, self.std_state, least=1e-3)
        if self.adapter is not None and self.config.state_path == "token_and_head":
            parts.take_moments(self.table[instruction_id.unique()], self.mean_text, self.std_text)

    def _latent(
        self,
        normal: Tensor,
        instruction_id: Tensor,
        prefix: PrefixKV | None = None,
        static: bool = False,
        wording_noise: float = 0.0,
    ) -> Tensor:
        """Return what the head reads: the hidden state at the state token, and the state where it reads that too."""
        hidden = self._hidden(normal, instruction_id, prefix, static, wording_noise)
        return hidden if self.config.state_path == "token" else torch.cat([hidden, normal], dim=1)

    def _instruction(self, instruction_id: Tensor) -> Tensor:
        """Return instruction latents [B, Z] as the adapter reads them, of a mean square of about 1."""
        latent = self.table[instruction_id]
        if self.adapter is not None and self.config.state_path == "token_and_head":
            return (latent - self.mean_text) / self.std_text
        return latent * latent.shape[1] ** 0.5

    def _hidden(
        self, normal: Tensor, instruction_id: Tensor, prefix: PrefixKV | None, static: bool, wording_noise: float
    ) -> Tensor:
        state_token = self.projector(normal) * self.token_rms  # [B, Z]
        if prefix is not None:
            return prefixes.read_state(self.transformer, prefix, state_token, instruction_id, static=static).float()
        words, lengths = self._words(instruction_id, wording_noise)
        one_way = self.config.attention == "prefix"
        return prefixes.read_whole(self.transformer, words, lengths, state_token, one_way=one_way).float()

    def _words(self, instruction_id: Tensor, wording_noise: float = 0.0) -> tuple[Tensor, Tensor]:
        """Return what the transformer reads of instructions [B, L, Z], padded on the right, and lengths [B] int64."""
        if self.config.form == "prompt":
            lengths = self.lengths[instruction_id]
            return self.transformer.get_input_embeddings()(self.tokens[instruction_id, : int(lengths.max())]), lengths
        text = self._instruction(instruction_id)
        if wording_noise:
            text = text + wording_noise * torch.randn_like(text)
        text = (text if self.adapter is None else self.adapter(text)) * self.token_rms
        return text[:, None].to(quantize.compute_dtype(self.quantization)), torch.ones_like(instruction_id)

    def _ready_now(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Return how latents are read, with keys, values and graphs made anew when a weight or a text changed."""
        if self.config.form == "prompt" and not self.prefix_kv:
            raise UnsupportedArgument("buckets: the full prompt has no static shape; take prefix_kv, or buckets=False")
        version = prefixes.version(*self.parameters(), *self.buffers())
        if self._ready is None or self._ready[0] != version:
            prefix = self._prefix_now() if self.prefix_kv else None
            static = Buckets(partial(self._latent, prefix=prefix, static=True), self.query_batch_size)
            self._ready = version, partial(self._latent, prefix=prefix), static
        _, as_it_comes, static = self._ready
        return static if self.buckets else as_it_comes

    def _prefix_now(self) -> PrefixKV:
        """Return the keys and values of the instructions, made anew when what they are made of changed."""
        made_of = [self.tokens, self.table, *self.transformer.parameters(), *self.transformer.buffers()]
        if self.adapter is not None:
            made_of += [*self.adapter.parameters(), *(t for n, t in self.named_buffers() if n.endswith("_text"))]
        version = prefixes.version(*made_of)
        if self._kept is None or self._kept[0] != version:
            # a query may come under inference_mode, whose tensors later queries could not use
            with torch.inference_mode(False), torch.no_grad():
                words, lengths = self._words(torch.arange(len(self.table), device=self.table.device))
                one_way = self.config.attention == "prefix"
                prefix = prefixes.build(self.transformer, words, lengths, self.query_batch_size, one_way=one_way)
            self._kept = version, prefix
        return self._kept[1]

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
        untuned = backbones.find_reference(self.reference, name=self._backbone.name)
        latents = backbones.encode_instructions(fresh, untuned).to(self.table.device)
        self.register_buffer("table", torch.cat([self.table, latents]))
        self.instructions = [*self.instructions, *fresh]
        self._tokenise()

    # quantization

    @property
    def quantization_kl_nats(self) -> float:
        """Return the mean KL of the exact prior from this one on held-out states; NaN where it was not measured."""
        return quantize.kl_of(self.metrics)

    def become_quantized(
        self, quantization: Quantization, max_quantization_kl: float, device: torch.device | None = None
    ) -> None:
        """Quantize the transformer in place, on `device`, and end trust; `quantize_prior` makes and measures a copy."""
        quantize.check_quantizable(self)
        quantize.checked_bound(max_quantization_kl)
        quantize.quantize_transformer(self.transformer, quantization, device)
        self.demonstrated = None  # its latents were the exact transformer's
        self.quantization, self.max_quantization_kl = quantization, max_quantization_kl

    # keeping

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy is made of: graphs and keys and values are not, it makes its own."""
        return {**self.__dict__, "_kept": None, "_ready": None}

    def own_tensors(self) -> dict[str, Tensor]:
        """Return every tensor of the prior outside of the transformer, by name."""
        return {name: t for name, t in self.state_dict().items() if not name.startswith("transformer.")}

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
        return latent_folder.write(self, folder, overwrite=overwrite)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: str | torch.device = "cpu",
        *,
        backbone: str = "",
        prefix_kv: bool | None = None,
        quantization: Quantization | None = None,
        max_quantization_kl: float | None = None,
    ) -> "LatentActionPrior":
        """Read a saved prior, frozen.

        Args:
            folder: what `save` wrote.
            device: where it is to answer.
            backbone: where the backbone is now, when it has moved; its hash must be the recorded one.
            prefix_kv: as for the class; None: as recorded.
            quantization: quantize an exact prior, unmeasured, so that trainers refuse it unless
                `max_quantization_kl` is infinite, and without trust; `quantize_prior` has both. None: as recorded.
            max_quantization_kl: nats; what trainers are to take. None: as recorded.

        Raises:
            PriorMismatch: no such prior there.
            HashMismatch: a file or the backbone's weights are not the recorded ones.
            BackboneUnavailable: the backbone cannot be found.
            UnsupportedArgument, MissingExtra, DeviceUnavailable: what is asked for cannot be had of this prior.
        """
        return latent_folder.read(
            cls,
            folder,
            device,
            backbone=backbone,
            prefix_kv=prefix_kv,
            quantization=quantization,
            max_quantization_kl=max_quantization_kl,
        )
