"""What models cost, as files and as a figure."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from matplotlib.figure import Figure

from ..data.publish import publish, publish_json
from ..fuse.figures import as_text, svg
from .efficiency import Cost, Efficiency
from .results import write_csv


def write_efficiency(found: Sequence[Efficiency], folder: Path) -> list[Path]:
    """Write what models cost as efficiency.json, .csv and .svg; return the three paths."""
    paths = [folder / f"efficiency.{kind}" for kind in ("json", "csv", "svg")]
    publish_json(paths[0], [asdict(model) for model in found])
    rows = [{"model": model.name, **asdict(row)} for model in found for row in model.rows]
    write_csv(paths[1], list(rows[0]), [list(row.values()) for row in rows])
    publish(paths[2], efficiency_bars(found).encode())
    return paths


def efficiency_bars(found: Sequence[Efficiency]) -> str:
    """Draw memory, latency and GFLOPs by subset, models side by side: the paper's Fig. 5, and latency."""
    values: dict[str, Callable[[Cost], float | None]] = {
        "memory (MiB)": lambda row: row.peak_bytes and row.peak_bytes / 2**20,
        "latency (s)": lambda row: row.seconds,
        "GFLOPs": lambda row: row.gflops,
    }
    shown = {name: of for name, of in values.items() if any(of(row) for model in found for row in model.rows)}
    figure = Figure(figsize=(5.4, 2.2 * len(shown)), layout="constrained")
    names = list(dict.fromkeys(row.subset for model in found for row in model.rows))
    width = 0.8 / len(found)
    for axes, (label, of) in zip(figure.subplots(len(shown), squeeze=False)[:, 0], shown.items(), strict=True):
        for at, model in enumerate(found):
            places = [names.index(row.subset) + (at - (len(found) - 1) / 2) * width for row in model.rows]
            axes.bar(places, [of(row) or 0 for row in model.rows], width, label=as_text(model.name))
        axes.set_xticks(range(len(names)), names, rotation=45 if len(names) > 7 else 0)
        axes.set_ylabel(label)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(found))
    return svg(figure)
