"""STLT: tokens from what was detected where; a spatial transformer in each frame, a temporal one over the frames."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .backbone import Backbone

N_CATEGORIES = 3  # no box here, hand, object


class EncoderLayer(nn.Module):
    """A transformer layer that normalises after each residual sum, as STLT does.

    torch's own layer leaves for another kernel in inference, which FLOP counters do not see.
    """

    def __init__(self, width: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.ffn = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )
        self.norm_attention = nn.LayerNorm(width)
        self.norm_ffn = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """Attend within [N, L, D]; seen: bool, broadcasts to [N, heads, L, L], True where a row may look."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)  # [N, heads, L, D / heads]
        dropout = self.dropout.p if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, seen, dropout).transpose(1, 2).flatten(2)  # [N, L, D]
        x = self.norm_attention(x + self.dropout(self.proj(attended)))
        return self.norm_ffn(x + self.dropout(self.ffn(x)))


class LayoutTransformer(Backbone):
    """STLT over the boxes, scores and categories of a clip.

    The temporal transformer looks back only, and the clip's token comes last, where it sees every frame: so do the
    published checkpoints. Tokens: one for each of the T frames, then the clip's.
    Source: Revisiting spatio-temporal layouts for compositional action recognition, BMVC 2021.
    """

    def __init__(
        self, input_shape: tuple[int, ...], width: int, n_heads: int, n_spatial: int, n_temporal: int, dropout: float
    ) -> None:
        n_frames = input_shape[0]
        super().__init__(input_shape, n_frames + 1, width)
        self.category = nn.Embedding(N_CATEGORIES, width, padding_idx=0)
        self.box = nn.Linear(4, width)
        nn.init.normal_(self.box.weight, std=2.0)  # places differ by 0.3 or so: as loud as the category, from the start
        self.score = nn.Linear(1, width)
        self.norm_boxes = nn.LayerNorm(width)
        self.frame_token = nn.Parameter(torch.randn(width))
        self.spatial = nn.ModuleList(EncoderLayer(width, n_heads, dropout) for _ in range(n_spatial))
        self.clip_token = nn.Parameter(torch.randn(width))
        self.position = nn.Parameter(torch.randn(n_frames + 1, width))
        self.norm_frames = nn.LayerNorm(width)
        self.temporal = nn.ModuleList(EncoderLayer(width, n_heads, dropout) for _ in range(n_temporal))
        self.dropout = nn.Dropout(dropout)

    def tokens(self, x: Tensor) -> Tensor:
        """Turn detections [B, T, n, 6] into tokens [B, T + 1, D]; a frame without boxes is a frame like any other."""
        frames = self._frames(x)
        clip = self.clip_token.expand(len(x), 1, -1)
        x = self.dropout(self.norm_frames(torch.cat([frames, clip], dim=1) + self.position))
        past = torch.ones(self.n_tokens, self.n_tokens, dtype=torch.bool, device=x.device).tril()
        for layer in self.temporal:
            x = layer(x, past)
        return x

    def _frames(self, x: Tensor) -> Tensor:
        """Sum up each frame's boxes, [B, T, n, 6] -> [B, T, D]."""
        category = x[..., 5].long()
        real = category != 0
        # What stands in a row that holds no box must not matter, not even NaN: a weight of 0 would not stop that.
        x = x.masked_fill(~real[..., None], 0.0).to(self.box.weight.dtype)
        boxes = self.category(category) + self.box(x[..., :4]) + self.score(x[..., 4:5])
        boxes = self.dropout(self.norm_boxes(boxes)).flatten(0, 1)  # [B * T, n, D]
        rows = torch.cat([self.frame_token.expand(len(boxes), 1, -1), boxes], dim=1)
        seen = F.pad(real.flatten(0, 1), (1, 0), value=True)[:, None, None]  # the frame's own token is always there
        for layer in self.spatial:
            rows = layer(rows, seen)
        return rows[:, 0].unflatten(0, (-1, self.n_tokens - 1))
