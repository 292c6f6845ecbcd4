"""Seconds that clip tables take to read: as large as the data sets they come from.

    python bench/tables.py [--repeats 3]

Tables are made of real rows (in the folder KARMMA_SHARED, else ../shared), repeated under new names up to 67,217 clips
(EPIC-KITCHENS-100, training) and 168,913 (Something-Something V2, training).
"""

import argparse
import csv
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from karmma.data.clips import read_clips
from karmma.data.config import DataConfig

N_EPIC, N_SOMETHING = 67_217, 168_913
ROOT = Path(__file__).parents[1]


def epic_table(folder: Path, real: Path) -> Path:
    """Write a training table of the official form and size, with the official class files beside it."""
    with open(real / "EPIC_100_uda_source_train.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for name in ("verb_classes", "noun_classes", "tail_verbs", "tail_nouns", "unseen_participant_ids_validation"):
        (folder / f"EPIC_100_{name}.csv").symlink_to(real / f"EPIC_100_{name}.csv")
    with open(folder / "EPIC_100_train.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        for at in range(N_EPIC):
            row = rows[at % len(rows)]
            writer.writerow(row | {"narration_id": f"{row['narration_id']}_{at}"})
    return folder / "EPIC_100_train.csv"


def something_table(folder: Path, real: Path) -> Path:
    """Write a training file of the official form and size."""
    entries = json.loads((real / "validation.json").read_text())
    (folder / "labels.json").symlink_to(real / "labels.json")
    many = [entries[at % len(entries)] | {"id": str(at)} for at in range(N_SOMETHING)]
    (folder / "train.json").write_text(json.dumps(many))
    return folder / "train.json"


def main() -> None:
    """Time each kind of table and print its median."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    data = Path(os.environ.get("KARMMA_SHARED", ROOT.parent / "shared")).resolve() / "data"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        epic = DataConfig(table=epic_table(folder, data / "epic"), val_table=data / "epic/EPIC_100_validation.csv")
        read_clips(epic).write(folder / "own.csv")
        read_clips(epic).write(folder / "own.parquet")
        something = DataConfig(table=something_table(folder, data / "ssv2"), heads=("action",))
        tables = {
            "EPIC-KITCHENS-100, training and validation, pruned": epic,
            "the same, Epic-Kitchens* held out": epic.model_copy(update={"holdout": "clips"}),
            "one's own CSV of these clips": DataConfig(table=folder / "own.csv"),
            "one's own Parquet of these clips": DataConfig(table=folder / "own.parquet"),
            "Something-Something V2, training": something,
        }
        print(f"{'':52}{'clips':>8}{'seconds':>9}")
        for said, settings in tables.items():
            seconds = []
            for _ in range(repeats):
                start = time.perf_counter()
                table = read_clips(settings)
                seconds.append(time.perf_counter() - start)
            print(f"{said:52}{table.n_clips:8}{statistics.median(seconds):9.2f}")


if __name__ == "__main__":
    main()
