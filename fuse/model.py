"""What teacher and student share after their backbones: embedding, fusion block and multi-head MLP as one module."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from .block import FusionBlock, FusionShape
from .embedding import Embedded, Embedding
from .heads import MultiHeadMLP


@dataclass(frozen=True)
class FusionOutput:
    """logits: head -> [B, N_h].  tokens: modality -> [B, E], averaged after the block.  cls: [B, E].

    `tokens` names every modality of the model. Under `ignore` the rows of a missing one are zero and stand for
    nothing; read them with `present`.
    """

    logits: dict[str, Tensor]
    tokens: dict[str, Tensor]
    cls: Tensor


class FusionModel(nn.Module):
    """Tokens of any subset of the modalities to logits by head.

    widths: modality -> D of its backbone.  n_tokens: modality -> k after Theta-Average.  n_classes: head -> N_h.
    missing: `ignore` or `B.1` to `B.5` (see `Embedding`). Under B.1 to B.5 all M + 1 predictions are averaged, under
    `ignore` those of CLS and of the modalities a clip has; a clip that has none is then judged by CLS alone.
    numbers: the fields of `FusionShape`.
    Source: KARMMA sec. 3.2, 3.4 and supplementary B.
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        n_tokens: Mapping[str, int],
        n_classes: Mapping[str, int],
        *,
        missing: str = "ignore",
        **numbers: Any,
    ) -> None:
        super().__init__()
        shape = FusionShape(**numbers)
        self.embedding = Embedding(widths, n_tokens, shape.embed_dim, missing)
        self.block = FusionBlock(shape)
        self.mlp = MultiHeadMLP(shape.embed_dim, n_classes)
        self.modalities = self.embedding.modalities
        self.n_classes = dict(n_classes)
        self.drops = shape.attention_dropout > 0

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile fusion block and heads in place, as `torch.nn.Module.compile` does; names of parameters stay.

        The embedding stays as it is: it asks which modalities are there, and would be compiled anew for each answer.
        """
        self.block.compile(*args, **options)
        self.mlp.compile(*args, **options)

    def forward(
        self, tokens: Mapping[str, Tensor], present: Tensor, seeds: Sequence[int] | None = None
    ) -> FusionOutput:
        """Fuse a batch.

        tokens: modality -> [B, k, D]; one that every clip lacks may be left out.  present: [B, M] bool, True =
        available, columns in the order of `modalities`. What sits in the rows of a missing modality does not matter.
        seeds: one a clip, for dropout in training: a clip's result then depends on nobody beside it; None draws them.
        Raises ValueError if tokens and present do not fit each other or the model.
        """
        if not self.drops:
            seeds = None
        return self.fuse(self.embedding(tokens, present, whole=seeds is not None), present, seeds)

    def fuse(self, embedded: Embedded, present: Tensor, seeds: Sequence[int] | None = None) -> FusionOutput:
        """Fuse what is embedded already; see `forward`."""
        cls, averages = self.block(embedded, seeds)
        used = [column for column, name in enumerate(self.modalities) if embedded.counts[name]]
        fused = torch.stack([cls, *(averages[self.modalities[column]] for column in used)], dim=1)  # [B, 1 + used, E]
        counted = None
        if self.embedding.missing == "ignore" and embedded.keep is not None:
            counted = torch.cat((torch.ones_like(present[:, :1]), present[:, used]), dim=1)  # [B, 1 + used]
        return FusionOutput(self.mlp(fused, counted), averages, cls)


def build_fusion(
    widths: Mapping[str, int], n_tokens: Mapping[str, int], n_classes: Mapping[str, int], config: Any, missing: str = ""
) -> FusionModel:
    """Build the model from the plain numbers of a config that has the fields of `FusionShape`, and `missing`.

    missing: a strategy that takes the place of the config's. A model of one modality never misses it, so it has no
    learned tokens, like the published one (Tab. 2: 29.64 M parameters).
    """
    numbers = {field.name: getattr(config, field.name) for field in fields(FusionShape)}
    missing = "ignore" if len(widths) == 1 else missing or config.missing
    return FusionModel(widths, n_tokens, n_classes, missing=missing, **numbers)
