"""First weights for a backbone that does not learn from labels: it learns to say what a frozen one says.

    python tokens.py MODALITY PATH [EPOCHS]    # in a folder with a karmma.toml and a cache

The frozen backbone's tokens, [8 x 6 x 6], of training clips are averaged over blocks of 2 x 2 x 2 to the student's
[4 x 3 x 3], and standardised at each place, so that what all clips share counts nothing.  Mean squared error.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from karmma.cli_options import Settings
from karmma.data.batches import plan_epoch
from karmma.data.cache import Cache
from karmma.data.progress import watched
from karmma.data.publish import written_by
from karmma.data.selection import select_stores
from karmma.data.stores import TokenStore
from karmma.distill.stream import ClipBatch, ClipStream
from karmma.extract.backbones import Backbone, build_backbone
from karmma.fuse.schedule import learning_rate
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import avg_pool3d, mse_loss

GRID, BLOCK, BATCH = (8, 6, 6), 2, 32
MAX_LR, WARMUP_EPOCHS = 1e-3, 1


def targets(cache: Cache, store: TokenStore, clip_ids: list[str], n_views: int) -> torch.Tensor:
    """Return tokens [V, n, 36, D] as float16, averaged over blocks and standardised at each place."""
    rows, n = cache.rows(clip_ids), len(clip_ids)
    found = torch.empty(n_views, n, np.prod(GRID) // BLOCK**3, store.width, dtype=torch.float16)
    for view in range(n_views):
        for part in np.array_split(np.arange(n), max(1, n // 64)):
            tokens = torch.from_numpy(store.read(rows[part], view)).float()  # [b, 288, D]
            volume = tokens.transpose(1, 2).unflatten(2, GRID)
            found[view, part] = avg_pool3d(volume, BLOCK).flatten(2).transpose(1, 2).half()
    for place in range(found.shape[2]):
        here = found[:, :, place].float()
        found[:, :, place] = ((here - here.mean((0, 1))) / here.std((0, 1)).clamp_min(1e-3)).half()
    return found


def batches(stream: ClipStream, rows: np.ndarray, epochs: int, n_views: int) -> Iterator[ClipBatch]:
    """Yield the batches of all epochs, in view epoch mod V."""
    for epoch in range(epochs):
        order = plan_epoch(rows, BATCH, 0, epoch)
        yield from stream.batches([(part, np.ones((len(part), 1), bool)) for part in order], epoch % n_views)


def learn(
    backbone: Backbone, stream: ClipStream, wanted: torch.Tensor, rows: np.ndarray, epochs: int, weight_decay: float
) -> None:
    """Train a backbone on wanted [V, n, 36, D], the tokens of the clips of these rows."""
    head = nn.Linear(backbone.width, wanted.shape[-1])
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr=MAX_LR, weight_decay=weight_decay)
    n_steps, place = -(-len(rows) // BATCH), {row: at for at, row in enumerate(rows.tolist())}
    with watched("tokens", epochs * len(rows), "clips") as progress:
        for step, batch in enumerate(batches(stream, rows, epochs, len(wanted))):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, n_steps, max_lr=MAX_LR, warmup_epochs=WARMUP_EPOCHS, epochs=epochs)
            target = wanted[batch.view, [place[row] for row in batch.rows.tolist()]].float()
            (inputs,) = batch.inputs.values()
            loss = mse_loss(head(backbone(inputs)), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            progress.advance(len(batch.rows), f"{loss.item():.3f} of the variance of the tokens is left")


def main() -> None:
    """Train the student's backbone on the frozen one's tokens; write its weights."""
    modality, path = sys.argv[1], Path(sys.argv[2])
    settings = Settings(None, None, [], {}, needs_clips=True)
    table, config = settings.table(), settings.student
    epochs = int(sys.argv[3]) if len(sys.argv) > 3 else config.epochs
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cache = Cache.open(settings.data.cache)
    data = settings.data.model_copy(update={"modalities": (modality,)})
    store, rows = select_stores(cache, table, data, {}).stores[modality], table.rows("train")
    wanted = targets(cache, store, table.clip_ids[rows].tolist(), config.views)
    backbone = build_backbone(getattr(config, modality).name, modality, data.input_shape(modality))
    with ClipStream(table, data, (modality,), readers=1, cache_mb=4096) as stream:
        learn(backbone, stream, wanted, rows, epochs, config.weight_decay)
    with written_by(path) as half:
        save_file(backbone.state_dict(), half)


if __name__ == "__main__":
    main()
