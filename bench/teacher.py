"""One training step of the teacher's fusion head against torch's own transformer with the same dropout.

    python bench/teacher.py [--batch 32] [--repeats 3] [--precision float32] [--json]

Tokens of three modalities, [300, 1024] each, as they come from the cache; forward, backward, clipping and AdamW, with
the classes of EPIC-KITCHENS-100. Both sides have the same layers and 0.3 dropout of attention weights, and nothing else
dropped; they take turns in one process; medians, and the median of the ratios of each turn.
"""

import argparse
import json
import os
import statistics
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before torch is loaded

import torch
from karmma.data.device import arithmetic
from karmma.fuse.config import TeacherConfig
from karmma.fuse.losses import cross_entropy, info_nce
from karmma.fuse.model import build_fusion
from karmma.fuse.seeds import clip_seeds
from torch import Tensor, nn

MODALITIES, K, WIDTH = ("video", "flow", "audio"), 300, 1024
CLASSES = {"verb": 97, "noun": 300}
ASKED = 1.45


class Plain(nn.Module):
    """The teacher as one writes it first: Linear, nn.TransformerEncoder, averages, MLP."""

    def __init__(self, config: TeacherConfig) -> None:
        super().__init__()
        width = config.embed_dim
        self.project = nn.ModuleDict({m: nn.Linear(WIDTH, width) for m in MODALITIES})
        self.cls = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        dropout = config.attention_dropout
        layer = nn.TransformerEncoderLayer(width, config.n_attention_heads, config.ffn_dim, dropout, batch_first=True)
        layer.dropout.p = layer.dropout1.p = layer.dropout2.p = 0.0  # of attention weights alone
        self.encoder = nn.TransformerEncoder(layer, config.n_layers)
        self.shared = nn.Linear(width, 2 * width)
        self.heads = nn.ModuleDict({head: nn.Linear(2 * width, n) for head, n in CLASSES.items()})

    def forward(self, tokens: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return logits by head and averaged tokens by modality."""
        parts = [self.project[m](tokens[m]) for m in MODALITIES]
        x = self.encoder(torch.cat([self.cls.expand(len(parts[0]), -1, -1), *parts], dim=1))
        averages = {m: part.mean(1) for m, part in zip(MODALITIES, x[:, 1:].split(K, dim=1), strict=True)}
        hidden = self.shared(torch.stack([x[:, 0], *averages.values()], dim=1)).relu()
        return {head: classify(hidden).mean(1) for head, classify in self.heads.items()}, averages


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], config: TeacherConfig) -> float:
    """Take one step; return its seconds."""
    labels = {head: torch.arange(len(batch["video"])) % n for head, n in CLASSES.items()}
    start = time.perf_counter()
    tokens = {m: values.float() for m, values in batch.items()}
    if isinstance(model, Plain):
        logits, averages = model(tokens)
    else:
        seeds = clip_seeds(0, 0, [str(clip) for clip in range(len(batch["video"]))])
        present = torch.ones(len(batch["video"]), len(MODALITIES), dtype=torch.bool)
        with arithmetic(config.precision, torch.device("cpu")):
            output = model(tokens, present, seeds)
        logits, averages = output.logits, output.tokens
    loss = config.alpha * cross_entropy(logits, labels) + config.beta * info_nce(averages, config.tau)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
    optimizer.step()
    return time.perf_counter() - start


def main() -> None:
    """Time both sides in turns and print medians and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    config = TeacherConfig(precision=asked.precision)
    torch.manual_seed(0)
    widths, counts = dict.fromkeys(MODALITIES, WIDTH), dict.fromkeys(MODALITIES, K)
    models = {"karmma": build_fusion(widths, counts, CLASSES, config).train(), "plain": Plain(config).train()}
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    assert len(set(sizes.values())) == 1, sizes
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-5) for name, model in models.items()}
    batch = {m: torch.randn(asked.batch, K, WIDTH).half() for m in MODALITIES}
    for name, model in models.items():  # the first step also makes the optimizer's memory
        step(model, optimizers[name], batch, config)
    turns = [{n: step(m, optimizers[n], batch, config) for n, m in models.items()} for _ in range(asked.repeats)]
    medians = {name: statistics.median(turn[name] for turn in turns) for name in models}
    ratio = statistics.median(turn["plain"] / turn["karmma"] for turn in turns)
    if asked.json:
        print(json.dumps({**medians, "ratio": ratio, "asked": ASKED, "precision": asked.precision}))
        return
    missed = "" if ratio >= ASKED else "  MISSED"
    print(f"batch {asked.batch}, {asked.precision}: karmma {medians['karmma']:.2f} s a step, ", end="")
    print(f"plain {medians['plain']:.2f} s, {ratio:.2f}x (asked: {ASKED}x){missed}")


if __name__ == "__main__":
    main()
