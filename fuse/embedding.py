"""The embedding layer: tokens of every backbone to one width, and what stands in for a missing modality."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ..data.errors import ConfigError, nearest
from ..data.modality import in_order

# How a missing modality is handled: left out, or by one of the equations of the paper's supplementary B (B.5 = Eq. 6).
STRATEGIES = ("ignore", "B.1", "B.2", "B.3", "B.4", "B.5")
WITH_MODALITY_TOKEN = ("B.1", "B.2", "B.5")
WITH_TOKEN_TOKENS = ("B.3", "B.4", "B.5")
# Under these a clip that lacks a modality has fewer tokens than one that has it.
UNEVEN = ("ignore", "B.1")


@dataclass(frozen=True)
class Embedded:
    """Input of the fusion block.

    tokens: [B, N, E], the modalities one after the other.  counts: modality -> its share of N (0 = left out).
    keep: [B, N], True where a token takes part; None if all do.
    """

    tokens: Tensor
    counts: dict[str, int]
    keep: Tensor | None


def learned_token(*shape: int) -> nn.Parameter:
    """Return a parameter drawn from a normal distribution of deviation 0.02, cut at two absolute units."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(*shape), std=0.02))


class Embedding(nn.Module):
    """One Linear per modality, and the learned tokens of the chosen strategy.

    With projected tokens t_i, modality token c and token-specific tokens d_i (i = 1..k), a clip's modality becomes

        strategy   available     missing         strategy   available        missing
        ignore     t_i           no tokens       B.3        t_i + d_i        d_i
        B.1        t_i + c       one token c     B.4        t_i              d_i
        B.2        t_i + c       c, k times      B.5        t_i + c + d_i    c + d_i

    widths: modality -> D.  n_tokens: modality -> k.  Raises ConfigError on an unknown strategy or modality.
    Source: KARMMA sec. 3.4 and supplementary B.
    """

    def __init__(self, widths: Mapping[str, int], n_tokens: Mapping[str, int], embed_dim: int, missing: str) -> None:
        super().__init__()
        if missing not in STRATEGIES:
            raise ConfigError(f"Unknown missing-modality strategy {missing!r}. {nearest(missing, STRATEGIES)}")
        self.modalities = in_order(widths)
        if set(n_tokens) != set(widths):
            raise ConfigError(
                f"Embedding: token counts are given for {', '.join(sorted(n_tokens))}, "
                f"widths for {', '.join(sorted(widths))}. Name the same modalities in both."
            )
        self.missing = missing
        self.n_tokens = {name: n_tokens[name] for name in self.modalities}
        self.project = nn.ModuleDict({name: nn.Linear(widths[name], embed_dim) for name in self.modalities})
        self.modality_token = nn.ParameterDict()
        self.token_tokens = nn.ParameterDict()
        for name in self.modalities:
            if missing in WITH_MODALITY_TOKEN:
                self.modality_token[name] = learned_token(embed_dim)
            if missing in WITH_TOKEN_TOKENS:
                self.token_tokens[name] = learned_token(n_tokens[name], embed_dim)

    def forward(self, tokens: Mapping[str, Tensor], present: Tensor, whole: bool = False) -> Embedded:
        """Embed a batch.

        tokens: modality -> [B, k, D], any float dtype; a modality that every clip lacks may be left out.
        present: [B, M] bool, columns in the order of `modalities`. What sits in the rows of a missing modality does
        not matter.  whole: keep the places of a modality that every clip lacks, so that N does not depend on the batch.
        Raises ValueError if the two do not fit each other or the layer.
        """
        return self.join(self.available(tokens, present), present, whole)

    def available(self, tokens: Mapping[str, Tensor], present: Tensor) -> dict[str, Tensor]:
        """Embed what is there: modality -> [B, k, E], without modalities that every clip lacks.

        What comes out can be joined under any mask that leaves no more than `present`.
        """
        self._check(tokens, present)
        some, every = _some_and_every(present)
        out = {}
        for column, name in enumerate(self.modalities):
            if some[column]:
                out[name] = self._available(name, tokens[name], None if every[column] else present[:, column])
        return out

    def join(self, available: Mapping[str, Tensor], present: Tensor, whole: bool = False) -> Embedded:
        """Put all modalities together, [B, N, E], what is learned in the place of what is missing."""
        some, every = _some_and_every(present)
        parts = {}
        for column, name in enumerate(self.modalities):
            if not some[column]:
                parts[name] = self._stand_in(name, present, whole)
                continue
            here = None if every[column] else present[:, column]
            parts[name] = self._joined(name, available[name], here)
        counts = {name: part.shape[1] for name, part in parts.items()}
        mixed = any((one or whole) and not all_ for one, all_ in zip(some, every, strict=True))
        keep = self._keep(counts, present) if mixed and self.missing in UNEVEN else None
        return Embedded(torch.cat(list(parts.values()), dim=1), counts, keep)

    def masked(self, tokens: Mapping[str, Tensor], present: Tensor) -> Embedded:
        """Embed as `forward` does, every place kept, without asking which values `present` has: for traced graphs.

        tokens: modality -> [B, k, D], all of them.  Where `forward` leaves tokens out, `keep` says so.
        """
        parts = {}
        for column, name in enumerate(self.modalities):
            here = present[:, column]
            parts[name] = self._joined(name, self._available(name, tokens[name], here), here)
        counts = {name: part.shape[1] for name, part in parts.items()}
        keep = self._keep(counts, present) if self.missing in UNEVEN else None
        return Embedded(torch.cat(list(parts.values()), dim=1), counts, keep)

    def _linear(self, name: str) -> nn.Linear:
        """Return the projection of a modality: torch's types do not say what a ModuleDict holds."""
        return cast(nn.Linear, self.project[name])

    def _learned(self, name: str) -> Tensor | None:
        """Return what replaces a missing modality, [1, E] or [k, E]; None if nothing does."""
        if self.missing == "ignore":
            return None
        if self.missing == "B.5":
            return self.modality_token[name] + self.token_tokens[name]
        return self.token_tokens[name] if self.missing in WITH_TOKEN_TOKENS else self.modality_token[name][None]

    def _available(self, name: str, tokens: Tensor, here: Tensor | None) -> Tensor:
        """Return [B, k, E] for a modality of which some clips have tokens; here: [B] bool, None = all of them."""
        project, learned = self._linear(name), self._learned(name)
        if here is not None:
            here = here[:, None, None]  # [B, 1, 1]
            tokens = tokens.masked_fill(~here, 0.0)  # else a NaN there would reach the gradient of the weights
        out = project(tokens.to(project.weight.dtype))  # [B, k, E]
        return out if learned is None or self.missing == "B.4" else out + learned

    def _joined(self, name: str, available: Tensor, here: Tensor | None) -> Tensor:
        """Return [B, k, E], what is learned in the rows that are not `here`; None = all are."""
        learned = self._learned(name)
        return available if learned is None or here is None else torch.where(here[:, None, None], available, learned)

    def _stand_in(self, name: str, present: Tensor, whole: bool) -> Tensor:
        """Return [B, n, E] for what every clip lacks; n is 0 under ignore, 1 under B.1, otherwise, or if whole, k."""
        weight, learned = self._linear(name).weight, self._learned(name)
        n_tokens = self.n_tokens[name] if whole else {"ignore": 0, "B.1": 1}.get(self.missing, self.n_tokens[name])
        if learned is None:
            return weight.new_zeros(len(present), n_tokens, len(weight))
        return learned.expand(len(present), n_tokens, -1)

    def _keep(self, counts: Mapping[str, int], present: Tensor) -> Tensor:
        """Return [B, N] bool: all tokens of an available modality; of a missing one none, or under B.1 the first."""
        keep = []
        for column, n_tokens in enumerate(counts.values()):
            stays = torch.zeros(n_tokens, dtype=torch.bool, device=present.device)
            stays[:1] = self.missing == "B.1"
            keep.append(present[:, column, None] | stays)  # [B, n]
        return torch.cat(keep, dim=1)

    def _check(self, tokens: Mapping[str, Tensor], present: Tensor) -> None:
        """Raise ValueError unless tokens and present fit each other and the layer."""
        names, n_modalities = ", ".join(self.modalities), len(self.modalities)
        if present.ndim != 2 or present.shape[1] != n_modalities or present.dtype != torch.bool:
            found = f"{present.dtype} {list(present.shape)}"
            raise ValueError(f"present is {found}, expected torch.bool [B, {n_modalities}], columns {names}.")
        for name in set(tokens) - set(self.modalities):
            raise ValueError(f"Tokens of {name!r} given to a model of {names}. Leave them out.")
        for column, name in enumerate(self.modalities):
            if name not in tokens:
                if present[:, column].any():
                    raise ValueError(f"present has clips with {name}, but no tokens of {name} are given. Pass them.")
                continue
            shape, width = tuple(tokens[name].shape), self._linear(name).in_features
            fixed = self.missing not in UNEVEN
            n_tokens = self.n_tokens[name] if fixed else "k"
            fits = len(shape) == 3 and shape[0] == len(present) and shape[2] == width
            if not fits or (fixed and shape[1] != n_tokens):
                raise ValueError(f"Tokens of {name} are {list(shape)}, expected [{len(present)}, {n_tokens}, {width}].")


def _some_and_every(present: Tensor) -> tuple[list[bool], list[bool]]:
    """Say for each column of present [B, M] whether some clip has it, and whether every clip has."""
    some, every = torch.stack((present.any(0), present.all(0))).tolist()  # one wait for the device, not 2 M
    return some, every
