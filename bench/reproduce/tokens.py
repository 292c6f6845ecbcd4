"""First weights for a backbone that does not learn from labels: it learns to say what a frozen one says.

    python tokens.py MODALITY PATH [EPOCHS]    # in a folder with a karmma.toml and a cache

The frozen backbone's tokens, [8 x 6 x 6], of training clips are averaged over blocks of 2 x 2 x 2 to the student's
[4 x 3 x 3], and standardised at each place, so that what all clips share counts nothing.  Mean squared error.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from karmma.cli_options import Settings
from karmma.data.batches import plan_epoch
from karmma.data.cache import Cache
from karmma.data.progress import watched
from karmma.data.selection import select_stores
from karmma.distill.stream import ClipStream
from karmma.extract.backbones import build_backbone
from karmma.fuse.schedule import learning_rate
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import avg_pool3d, mse_loss

GRID, BLOCK, BATCH, VIEWS = (8, 6, 6), 2, 32, 2


def targets(cache: Cache, store, clip_ids: list[str], n: int) -> torch.Tensor:
    """Return tokens [VIEWS, n, 36, D] as float16, averaged over blocks and standardised at each place."""
    found = torch.empty(VIEWS, n, np.prod(GRID) // BLOCK**3, store.width, dtype=torch.float16)
    rows = cache.rows(clip_ids)
    for view in range(VIEWS):
        for part in np.array_split(np.arange(n), max(1, n // 64)):
            tokens = torch.from_numpy(store.read(rows[part], view)).float()  # [b, 288, D]
            volume = tokens.transpose(1, 2).unflatten(2, GRID)
            found[view, part] = avg_pool3d(volume, BLOCK).flatten(2).transpose(1, 2).half()
    for place in range(found.shape[2]):
        here = found[:, :, place].float()
        found[:, :, place] = ((here - here.mean((0, 1))) / here.std((0, 1)).clamp_min(1e-3)).half()
    return found


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
    store = select_stores(cache, table, data, {}).stores[modality]
    rows = table.rows("train")
    wanted = targets(cache, store, table.clip_ids[rows].tolist(), len(rows))
    place = {row: at for at, row in enumerate(rows.tolist())}
    backbone = build_backbone(getattr(config, modality).name, modality, data.input_shape(modality))
    head = nn.Linear(backbone.width, store.width)
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=config.weight_decay)
    n_steps = -(-len(rows) // BATCH)
    with ClipStream(table, data, (modality,), readers=1, cache_mb=4096) as stream:
        for epoch in range(epochs):
            order = plan_epoch(rows, BATCH, 0, epoch)
            total, view = 0.0, epoch % VIEWS
            every = [(part, np.ones((len(part), 1), bool)) for part in order]
            with watched(f"tokens, epoch {epoch}", len(rows), "clips") as progress:
                for at, batch in enumerate(stream.batches(every, view)):
                    rate = learning_rate(
                        epoch * n_steps + at, n_steps, max_lr=1e-3, min_lr=1e-5, warmup_epochs=1, epochs=epochs
                    )
                    for group in optimizer.param_groups:
                        group["lr"] = rate
                    target = wanted[view, [place[row] for row in batch.rows.tolist()]].float()
                    loss = mse_loss(head(backbone(batch.inputs[modality])), target)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    total += loss.item() * len(batch.rows)
                    progress.advance(len(batch.rows))
            print(f"epoch {epoch}: {total / len(rows):.4f} of the variance of the tokens is left", flush=True)
    save_file(backbone.state_dict(), path)


if __name__ == "__main__":
    main()
