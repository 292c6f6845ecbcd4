"""The multi-head MLP: every fused token gives a prediction by head, and their average is the output."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from ..data.errors import ConfigError


class MultiHeadMLP(nn.Module):
    """A shared layer of twice the width with ReLU, then one Linear per head.

    n_classes: head -> N_h.  Raises ConfigError if there is no head, or one whose name a checkpoint cannot hold.
    Source: KARMMA sec. 3.2; the paper states neither the width 2 E nor the activation, the width reproduces its counts.
    """

    def __init__(self, embed_dim: int, n_classes: Mapping[str, int]) -> None:
        super().__init__()
        if not n_classes:
            raise ConfigError("Multi-head MLP: no head given, expected at least one. Name a label column.")
        for head in n_classes:
            if "." in head:
                raise ConfigError(f"Multi-head MLP: head {head!r} has a dot in its name. Rename the label column.")
        self.heads = tuple(n_classes)
        self.shared = nn.Linear(embed_dim, 2 * embed_dim)
        # The prefix keeps a label column such as "type" from meeting an attribute of ModuleDict.
        self.classify = nn.ModuleDict({f"to_{head}": nn.Linear(2 * embed_dim, n_classes[head]) for head in self.heads})

    def forward(self, tokens: Tensor, counted: Tensor | None = None) -> dict[str, Tensor]:
        """Return head -> [B, N_h], the mean of the logits of a clip's tokens.

        tokens: [B, n, E].  counted: [B, n] bool, the tokens whose predictions count, at least one; None = all.
        """
        hidden = F.relu(self.shared(tokens))  # [B, n, 2 E]
        logits = {head: self.classify[f"to_{head}"](hidden) for head in self.heads}  # each [B, n, N_h]
        if counted is None:
            return {head: each.mean(1) for head, each in logits.items()}
        weight = (counted / counted.sum(1, keepdim=True))[:, :, None]  # [B, n, 1]
        return {head: (each * weight).sum(1) for head, each in logits.items()}
