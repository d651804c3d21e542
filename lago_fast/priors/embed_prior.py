"""The prior by likeness: how near an action's vector is to those of the instruction and of the observation.

Zero-shot: softmax of the cosine between the action and the sum of both, over a temperature; the default one belongs to
the scale of 20 that sentence-transformers' contrastive loss has by default. Fitted: a small head beside the cosine,
see `embed_fit`. Test: pytest tests/priors/test_embed_prior.py
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lago_fast.errors import HashMismatch, PriorMismatch, UnsupportedArgument
from lago_fast.priors import backbone as backbones
from lago_fast.priors import folder as folders
from lago_fast.priors.config import MAX_WIDTH
from lago_fast.priors.hashes import hash_tensors
from lago_fast.priors.score_prior import check_temperature
from lago_fast.priors.text_base import check_texts, padding_mask
from lago_fast.priors.text_embedder import TextEmbedder

ZERO_SHOT_TEMPERATURE = 0.05


class Head(nn.Module):
    """What is learnt beside the cosine: a two-layer map of the state met with a linear one of the action.

    Args:
        width: Z, of the vectors.
        hidden: of both layers.
    """

    middle: Tensor  # [3, Z] of instructions, observations and actions
    spread: Tensor  # [3] likewise: the mean distance from the middle

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.register_buffer("middle", torch.zeros(3, width))
        self.register_buffer("spread", torch.ones(3))
        last = nn.Linear(hidden, hidden)
        self.state = nn.Sequential(nn.Linear(2 * width, hidden), nn.GELU(), last)
        self.action = nn.Linear(width, hidden, bias=False)
        self.alone = nn.Linear(width, 1, bias=False)  # an action's score in any state
        self.cosine_weight = nn.Parameter(torch.tensor(1.0))
        # at the start the head adds nothing to the cosine
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        nn.init.zeros_(self.alone.weight)

    def fit_normaliser(self, columns: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Take middle and spread from vectors [u, Z] of instructions, observations and actions, and how often [u] each
        occurs."""
        for i, (column, counts) in enumerate(columns):
            share = counts / counts.sum()
            self.middle[i] = share @ column
            distance = share @ (column - self.middle[i]).norm(dim=1)
            self.spread[i] = distance if float(distance) > 1e-3 else 1.0

    def forward(self, instruction: Tensor, observation: Tensor, actions: Tensor) -> Tensor:
        """Return scores [B, A] of vectors [B, Z], [B, Z] and [B, A, Z]."""
        parts = (instruction, observation, actions)
        i, o, a = ((part - self.middle[n]) / self.spread[n] for n, part in enumerate(parts))
        state = self.state(torch.cat([i, o], dim=1))
        return torch.einsum("bh,bah->ba", state, self.action(a)) + self.alone(a).squeeze(2)


class EmbedPrior:
    """softmax over the admissible actions of (cosine, with a head: weighed, and the head's score) / temperature.

    Args:
        embedder: texts as vectors; trainers may share it.
        temperature: above 0.
        head: None: zero-shot.
        uniform_share: in [0, 1): this share of every answer is spread evenly, so that no admissible action is excluded
            by a head that is sure of itself where it was never fitted.

    Attributes:
        metrics: what was fitted to how many walkthroughs and steps, and how well; empty of a zero-shot prior.

    Raises UnsupportedArgument for another temperature or share.
    """

    def __init__(
        self,
        embedder: TextEmbedder,
        *,
        temperature: float = ZERO_SHOT_TEMPERATURE,
        head: Head | None = None,
        uniform_share: float = 0.0,
    ) -> None:
        check_temperature(temperature)
        if not 0 <= uniform_share < 1:
            raise UnsupportedArgument(f"uniform_share: {uniform_share}; give 0 or more, and less than 1")
        if head is not None and head.middle.shape[1] != embedder.width:
            raise PriorMismatch(f"head: for vectors of {head.middle.shape[1]}, the embedder's have {embedder.width}")
        self.embedder, self.temperature, self.uniform_share = embedder, temperature, uniform_share
        self.head = None if head is None else head.eval().requires_grad_(False)
        self.metrics: dict[str, Any] = {"fitted": "nothing", "walkthroughs": 0, "steps": 0}
        self._log = dict.fromkeys(("lm_queries", "texts_read"), 0)

    @property
    def digest(self) -> str:
        """Return the SHA-256 over encoder, temperature and head."""
        return self._digest_with(self.embedder.digest)

    def _digest_with(self, embedder: str) -> str:
        about = {"embedder": embedder, "temperature": self.temperature, "uniform": self.uniform_share}
        tensors = {} if self.head is None else dict(self.head.state_dict())
        return hashlib.sha256(json.dumps(["EmbedPrior", about, hash_tensors(tensors)]).encode()).hexdigest()

    @torch.no_grad()
    def query(
        self, instruction: Sequence[str], observation: Sequence[str], admissible: Sequence[Sequence[str]]
    ) -> Tensor:
        """Return log-probabilities [B, A] float32 over each row's admissible actions, -inf where a row is padded.

        Raises UnsupportedArgument: see `check_texts` and `TextEmbedder.ids`.
        """
        before = len(self.embedder.texts)
        *vectors, mask = self.vectors(instruction, observation, admissible)
        self._log["lm_queries"] += len(admissible)
        self._log["texts_read"] += len(self.embedder.texts) - before
        scores = scores_of(self.head, *vectors) / self.temperature
        answer = scores.masked_fill(~mask, -torch.inf).log_softmax(dim=1)
        if self.uniform_share:
            even = mask / mask.sum(dim=1, keepdim=True)
            answer = ((1 - self.uniform_share) * answer.exp() + self.uniform_share * even).log()
        return answer

    def vectors(
        self, instruction: Sequence[str], observation: Sequence[str], admissible: Sequence[Sequence[str]]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the vectors of instructions [B, Z], observations [B, Z] and actions [B, A, Z], and which are none's
        padding [B, A] bool."""
        *ids, mask = ids_of(self.embedder, instruction, observation, admissible)
        instructions, observations, actions = map(self.embedder.rows, ids)
        return instructions, observations, actions, mask

    def telemetry(self) -> dict[str, float]:
        """Return counts since the last call: states that were answered, and texts that the encoder read for them."""
        log, self._log = self._log, dict.fromkeys(self._log, 0)
        return {f"prior/{name}": float(count) for name, count in log.items()}

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters of encoder and head, all of them frozen."""
        return chain(self.embedder.parameters(), () if self.head is None else self.head.parameters())

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write the prior folder; of the encoder a reference and a hash.

        Raises RunExists when the folder is taken and `overwrite` is False.
        """

        def fill(place: Path) -> None:
            if self.head is not None:
                folders.write_tensors(place / "head.safetensors", self.head.state_dict())

        about = {
            "class": "EmbedPrior",
            "digest": self.digest,
            "backbone": self.embedder.backbone.reference(),
            "long_texts": self.embedder.long_texts,
            "temperature": self.temperature,
            "uniform_share": self.uniform_share,
            "hidden": None if self.head is None else self.head.action.out_features,
        }
        return folders.write_folder(folder, about, self.metrics, fill, overwrite=overwrite)

    @classmethod
    @folders.typed_errors
    def load(cls, folder: str | Path, embedder: TextEmbedder | None = None) -> "EmbedPrior":
        """Read a saved prior, frozen; with an embedder that is shared, or one of its own.

        Raises:
            PriorMismatch: no such prior there.
            HashMismatch: a file is not the one that was written, or the encoder is another.
            BackboneUnavailable: the encoder cannot be found.
        """
        folder, saved, metrics = folders.read_folder(folder, "EmbedPrior")
        if embedder is None:
            embedder = TextEmbedder(backbones.find_reference(saved["backbone"]), long_texts=saved["long_texts"])
        head = None
        if saved["hidden"] is not None:
            if not 1 <= saved["hidden"] <= MAX_WIDTH:
                raise UnsupportedArgument(f"hidden: {saved['hidden']} in {folder}; it must lie in 1..{MAX_WIDTH:,}")
            head = Head(embedder.width, saved["hidden"])
            head.load_state_dict(folders.read_tensors(folder / "head.safetensors"))
        prior = cls(embedder, temperature=saved["temperature"], head=head, uniform_share=saved["uniform_share"])
        prior.metrics = metrics
        if saved["digest"] not in map(prior._digest_with, (embedder.digest, *embedder.earlier_digests())):
            raise HashMismatch(
                f"folder: {folder} was saved with another encoder, or was altered; give the same embedder, or fit again"
            )
        backbones.check_beside_weights(embedder.backbone, saved["backbone"])
        return prior


def ids_of(
    embedder: TextEmbedder,
    instruction: Sequence[str],
    observation: Sequence[str],
    admissible: Sequence[Sequence[str]],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the embedder's ids of instructions [B], observations [B] and actions [B, A], and which are none's padding
    [B, A] bool."""
    check_texts(instruction, observation, admissible)
    mask = padding_mask(admissible)
    actions = torch.zeros(mask.shape, dtype=torch.int64)
    instructions, observations = embedder.ids(instruction), embedder.ids(observation)
    actions[mask] = embedder.ids(list(chain.from_iterable(admissible)))
    return instructions, observations, actions, mask


def scores_of(head: Head | None, instruction: Tensor, observation: Tensor, actions: Tensor) -> Tensor:
    """Return scores [B, A] before the temperature of vectors [B, Z], [B, Z] and [B, A, Z]."""
    asked = nn.functional.normalize(instruction + observation, dim=1)
    cosine = torch.einsum("bz,baz->ba", asked, actions)
    if head is None:
        return cosine
    # at the scale at which a head that knows nothing is the zero-shot prior
    return head.cosine_weight * cosine + ZERO_SHOT_TEMPERATURE * head(instruction, observation, actions)
