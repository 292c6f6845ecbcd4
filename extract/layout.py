"""STLT: tokens from what was detected where; a spatial transformer in each frame, a temporal one over the frames."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .backbone import Backbone
from .checkpoints import stlt_names

CATEGORIES = ("no box", "hand", "object", "whole frame")
REGULAR, EMPTY, CLIP = 0, 1, 2  # kinds of frames
EMBEDDING_EPS = 1e-12  # of the norms over embeddings; those of the layers have torch's own


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
        self.attention_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """Attend within [N, L, D]; seen: bool, broadcasts to [N, heads, L, L], True where a row may look."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)  # [N, heads, L, D / heads]
        attended = self._attend(q, k, v, seen).transpose(1, 2).flatten(2)  # [N, L, D]
        x = self.norm_attention(x + self.dropout(self.proj(attended)))
        return self.norm_ffn(x + self.dropout(self.ffn(x)))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        if not (self.training and self.attention_dropout.p):
            return F.scaled_dot_product_attention(q, k, v, seen)
        # Written out, for a fused kernel draws its own mask; L is a few dozen at most.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return self.attention_dropout(weights) @ v


class LayoutTransformer(Backbone):
    """STLT over the boxes, scores and categories of a clip.

    Every frame begins with a box around it all, whose row sums the frame up; one more frame of nothing else stands for
    the clip. The temporal transformer looks back only, and the clip's frame comes last, where it sees every other.
    Tokens: one for each of the T frames, then the clip's.
    Source: Revisiting spatio-temporal layouts for compositional action recognition, BMVC 2021.
    """

    clip_token = True
    whole_frame: Tensor

    def __init__(
        self, input_shape: tuple[int, ...], width: int, n_heads: int, n_spatial: int, n_temporal: int, dropout: float
    ) -> None:
        n_frames = input_shape[0]
        super().__init__(input_shape, n_frames + 1, width)
        self.category = nn.Embedding(len(CATEGORIES), width, padding_idx=0)
        self.box = nn.Linear(4, width)
        nn.init.normal_(self.box.weight, std=2.0)  # places differ by 0.3 or so: as loud as the category, from the start
        self.score = nn.Linear(1, width)
        self.norm_boxes = nn.LayerNorm(width, eps=EMBEDDING_EPS)
        self.spatial = nn.ModuleList(EncoderLayer(width, n_heads, dropout) for _ in range(n_spatial))
        self.position = nn.Parameter(torch.randn(n_frames + 1, width))
        self.frame_kind = nn.Parameter(torch.randn(3, width))
        self.norm_frames = nn.LayerNorm(width, eps=EMBEDDING_EPS)
        self.temporal = nn.ModuleList(EncoderLayer(width, n_heads, dropout) for _ in range(n_temporal))
        self.dropout = nn.Dropout(dropout)
        whole_frame = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, CATEGORIES.index("whole frame")])
        self.register_buffer("whole_frame", whole_frame, persistent=False)

    def fitted(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the tensors of our own files, or of STLT's authors' checkpoints, under the names of this module."""
        return stlt_names(super().fitted(state), len(self.position))

    def tokens(self, x: Tensor) -> Tensor:
        """Turn detections [B, T, n, 6] into tokens [B, T + 1, D]; without the clip's token, [B, T, D]."""
        x = F.pad(x, (0, 0, 0, 0, 0, 1))  # the clip's frame, [B, T + 1, n, 6]
        real = x[..., 5] != 0
        kind = torch.where(real.any(-1), REGULAR, EMPTY)  # [B, T + 1]
        kind[:, -1] = CLIP
        frames = self._frames(x, real) + self.position + self.frame_kind[kind]
        frames = self.dropout(self.norm_frames(frames))
        past = torch.ones(frames.shape[1], frames.shape[1], dtype=torch.bool, device=x.device).tril()
        for layer in self.temporal:
            frames = layer(frames, past)
        return frames if self.clip_token else frames[:, :-1]

    def _frames(self, x: Tensor, real: Tensor) -> Tensor:
        """Sum up each frame's boxes, [B, F, n, 6] -> [B, F, D]; real: [B, F, n] bool, False where there is no box."""
        # What stands in a row that holds no box must not matter, not even NaN: a weight of 0 would not stop that.
        x = x.masked_fill(~real[..., None], 0.0).to(self.box.weight.dtype)
        x = torch.cat([self.whole_frame.to(x.dtype).expand(*x.shape[:2], 1, -1), x], dim=2)  # [B, F, 1 + n, 6]
        boxes = self.category(x[..., 5].long()) + self.box(x[..., :4]) + self.score(x[..., 4:5])
        rows = self.dropout(self.norm_boxes(boxes)).flatten(0, 1)  # [B * F, 1 + n, D]
        seen = F.pad(real.flatten(0, 1), (1, 0), value=True)[:, None, None]
        for layer in self.spatial:
            rows = layer(rows, seen)
        return rows[:, 0].unflatten(0, x.shape[:2])
