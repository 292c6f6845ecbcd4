"""A cache of made-up tokens: no video, no backbone."""

import hashlib

import numpy as np
import pytest
from karmma.data.cache import Cache
from karmma.data.clips import read_clip_table
from karmma.data.config import DataConfig, digest
from karmma.data.identity import token_identity
from karmma.data.modality import ABSENT, FAILED, PRESENT, STATE_NAMES
from karmma.data.stores import TokenStore

N_CLIPS = 24


class MadeCache:
    """24 clips, V and A; tokens tell the verb in V and the noun in A. Clip 2 has no audio."""

    def __init__(self, folder):
        rows = [
            f"c{i},v.mp4,{'train' if i < 16 else 'val' if i < 20 else 'test'},{'ab'[i % 2]},{'xyz'[i % 3]}"
            for i in range(N_CLIPS)
        ]
        (folder / "clips.csv").write_text("clip_id,video,split,verb,noun\n" + "\n".join(rows) + "\n")
        self.data = DataConfig(cache=folder / "cache", runs=folder / "runs", modalities=("video", "audio"))
        self.table = read_clip_table(folder / "clips.csv", self.data.heads)
        self.cache = Cache(self.data.cache)
        self.cache.add_clips(self.table)
        self.add("video", 0)
        self.add("audio", 1)

    def add(self, modality, head, theta=3, states=None):
        """Write a store of [24, 1, 3, 4] whose tokens show the label of a head, and its identity."""
        fields = token_identity(modality, self.data, {"name": "made up", "weights": "0" * 16}, theta, "float32")
        name = digest(fields)
        labels = self.table.labels(("verb", "noun")[head])
        draw = np.random.default_rng(head)
        tokens = (np.eye(4)[labels][:, None] + 0.1 * draw.standard_normal((N_CLIPS, 3, 4))).astype(np.float16)
        state = np.full(N_CLIPS, PRESENT)
        if modality == "audio":
            state[2] = ABSENT
        state[list(states or {})] = list((states or {}).values())
        tokens[state != PRESENT] = np.nan
        store = TokenStore.create(self.cache.tokens_path(modality, name), (N_CLIPS, 1, 3, 4), N_CLIPS, {})
        self.cache.write_identity(modality, name, fields)
        if (state != 0).all():
            data, states = store.write_shard(0, 0, tokens, state)
            failed = [{"row": int(i), "clip_id": f"c{i}", "reason": "broken"} for i in np.flatnonzero(state == FAILED)]
            receipt = {
                "first_row": 0,
                "rows": self.cache.row_digests().tolist(),
                "counts": {n: int((state == code).sum()) for code, n in STATE_NAMES.items() if (state == code).any()},
                "failures": failed,
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
                "state_sha256": hashlib.sha256(states).hexdigest(),
            }
            self.cache.write_receipt(modality, name, 0, 0, receipt)
        return name


@pytest.fixture
def made(tmp_path):
    return MadeCache(tmp_path)
