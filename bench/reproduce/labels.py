"""How much the cached teacher says beyond the labels: how sure it is of its first class on training clips.

    python labels.py TEACHER PATH    # in a folder with a karmma.toml and a cache; writes JSON

Written for each head: accuracy; mean probability of the first class; mean entropy, in nats, of at most log(classes).
"""

import sys
from pathlib import Path

import numpy as np
import torch
from karmma.cli_options import Settings
from karmma.data.cache import Cache
from karmma.data.publish import publish_json
from karmma.data.stores import LogitStore


def main(teacher: str, path: Path) -> None:
    """Write what the logits of a teacher are like on the training clips, over all views."""
    settings = Settings(None, None, [], {"data": {}}, needs_clips=True)
    table, cache = settings.table(), Cache.open(settings.data.cache)
    store, train = LogitStore.open(cache.logits_path(teacher)), table.rows("train")
    rows, found = cache.rows(table.clip_ids[train]), {}
    held = [store.has(rows, view) for view in range(store.n_views)]  # not of clips that failed
    for head in store.heads:
        values = [store.values(head)[rows[has], view] for view, has in enumerate(held)]
        logits = torch.from_numpy(np.concatenate(values))
        labels = torch.from_numpy(np.concatenate([table.labels(head)[train[has]] for has in held]))
        log_probs = logits.double().log_softmax(1)
        first, at = log_probs.exp().max(1)
        found[head] = {
            "classes": logits.shape[1],
            "accuracy": (at == labels).double().mean().item(),
            "first": first.mean().item(),
            "entropy": -(log_probs.exp() * log_probs).sum(1).mean().item(),
        }
    publish_json(path, found)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
