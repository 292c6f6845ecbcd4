"""The fusion block: CLS and the tokens of all modalities through a few transformer layers, then one token each."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.errors import ConfigError
from .attention import attend
from .embedding import Embedded, learned_token
from .seeds import layer_seeds


@dataclass(frozen=True)
class FusionShape:
    """The numbers of a fusion block.

    attention_dropout: probability in 0..1, on attention probabilities only.  norm_first: LayerNorm before each half of
    a layer rather than after it.  Raises ConfigError if the heads do not divide the width.

    The paper states neither activation nor norm placement: the default is that of `torch.nn.TransformerEncoderLayer`,
    ReLU and norm after. ffn_dim = embed_dim reproduces the published parameter counts and GFLOPs.
    """

    embed_dim: int
    ffn_dim: int
    n_layers: int
    n_attention_heads: int
    attention_dropout: float = 0.0
    norm_first: bool = False

    def __post_init__(self) -> None:
        if self.embed_dim % self.n_attention_heads:
            raise ConfigError(
                f"Fusion block: width {self.embed_dim} is not divisible by {self.n_attention_heads} attention heads. "
                "Choose a multiple."
            )
        if not 0.0 <= self.attention_dropout <= 1.0:
            raise ConfigError(f"Fusion block: attention dropout is {self.attention_dropout}, expected 0 to 1.")


class FusionLayer(nn.Module):
    """One transformer encoder layer; equal to `torch.nn.TransformerEncoderLayer` but for its fused attention."""

    def __init__(self, shape: FusionShape) -> None:
        super().__init__()
        width = shape.embed_dim
        self.n_heads = shape.n_attention_heads
        self.dropout = shape.attention_dropout
        self.norm_first = shape.norm_first
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, shape.ffn_dim)
        self.down = nn.Linear(shape.ffn_dim, width)
        self.norm_attention = nn.LayerNorm(width)
        self.norm_ffn = nn.LayerNorm(width)
        nn.init.xavier_uniform_(self.qkv.weight)  # as torch.nn.MultiheadAttention
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.out.bias)

    def forward(self, tokens: Tensor, mask: Tensor | None, seeds: Sequence[int] | None = None) -> Tensor:
        """Return [B, N, E] from tokens [B, N, E].

        mask: [B, 1, 1, N] bool, True = may be attended to; None = all.  seeds: one a clip, for dropout in training;
        None draws them.
        """
        if self.norm_first:
            tokens = tokens + self._attend(self.norm_attention(tokens), mask, seeds)
            return tokens + self._transform(self.norm_ffn(tokens))
        tokens = self.norm_attention(tokens + self._attend(tokens, mask, seeds))
        return self.norm_ffn(tokens + self._transform(tokens))

    def _attend(self, tokens: Tensor, mask: Tensor | None, seeds: Sequence[int] | None) -> Tensor:
        qkv = self.qkv(tokens).unflatten(-1, (3, self.n_heads, -1))  # [B, N, 3, heads, E / heads]
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, N, E / heads]
        if self.training and self.dropout:
            out = attend(query, key, value, mask, self.dropout, seeds)
        else:
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(out.transpose(1, 2).flatten(2))  # [B, N, E]

    def _transform(self, tokens: Tensor) -> Tensor:
        return self.down(F.relu(self.up(tokens)))


class FusionBlock(nn.Module):
    """Embedded tokens to M + 1 tokens: CLS, and per modality the average of its tokens.  Source: KARMMA sec. 3.2."""

    def __init__(self, shape: FusionShape) -> None:
        super().__init__()
        self.cls = learned_token(shape.embed_dim)
        self.layers = nn.ModuleList(FusionLayer(shape) for _ in range(shape.n_layers))

    def forward(self, embedded: Embedded, seeds: Sequence[int] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return CLS [B, E] and modality -> [B, E].  seeds: one a clip, for dropout in training; None draws them.

        Where a modality has no token of a clip (`ignore`) its row is zero and stands for nothing.
        """
        cls = self.cls.expand(embedded.tokens.shape[0], 1, -1)
        tokens = torch.cat((cls, embedded.tokens), dim=1)  # [B, 1 + N, E]
        # A mask rules out the fastest attention kernels, so it is there only when some clip needs it.
        mask = None if embedded.keep is None else F.pad(embedded.keep, (1, 0), value=True)[:, None, None]
        for at, layer in enumerate(self.layers):
            tokens = layer(tokens, mask, seeds and layer_seeds(seeds, at))
        cls, *parts = tokens.split([1, *embedded.counts.values()], dim=1)
        return cls.squeeze(1), dict(zip(embedded.counts, _averages(parts, embedded.keep), strict=True))


def _averages(parts: list[Tensor], keep: Tensor | None) -> list[Tensor]:
    """Average each [B, n, E] over those of its n tokens that `keep` [B, N] names; zero where there are none."""
    if keep is None:
        return [part.sum(1) / max(part.shape[1], 1) for part in parts]
    weights = [kept[:, :, None] for kept in keep.split([part.shape[1] for part in parts], dim=1)]  # each [B, n, 1]
    return [(part * kept).sum(1) / kept.sum(1).clamp(min=1) for part, kept in zip(parts, weights, strict=True)]
