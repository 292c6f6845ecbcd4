"""The model card of a student that is shared: what it is, what it reaches, and how it is used."""

import json
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from ..data.modality import letters
from ..data.noise import noise
from .model import ClipModel


def model_card(config: Mapping[str, Any], student: ClipModel, shared: ModelCardData, repo: str) -> str:
    """Return the card as Markdown with its YAML header.

    config: as in `StudentHub`.  shared: what the header says of every student.  repo: what the example loads.
    """
    header = deepcopy(shared)
    header.license = config.get("license") or "unknown"
    header.tags = sorted({*(header.tags or ()), *student.modalities})
    result = config.get("result") or {}
    pages = Environment(
        loader=PackageLoader("karmma.distill", "."),
        undefined=StrictUndefined,
        autoescape=False,
        trim_blocks=True,
    )
    pages.filters |= {"cell": _cell, "percent": lambda value: "-" if value is None else f"{100 * value:.1f}"}
    return pages.get_template("model_card.md").render(
        header=header.to_yaml(),
        title=config.get("run", "KARMMA student"),
        modalities=f"{', '.join(student.modalities)} ({letters(student.modalities)})",
        columns=", ".join(student.modalities),
        heads=config["classes"],
        inputs=[_input(modality, config, student) for modality in student.modalities],
        teacher=config["teacher"],
        missing=student.fusion.embedding.missing,
        parameters=result.get("parameters"),
        epoch=result.get("epoch"),
        val={name: _shown(name, value) for name, value in (result.get("val") or {}).items()},
        evaluations=config.get("evaluations") or [],
        clips=config["clips"],
        licence=config.get("license"),
        settings=json.dumps({"settings": config["settings"], "data": config["data"]}, indent=1),
        repo=repo,
    )


def _input(modality: str, config: Mapping[str, Any], student: ClipModel) -> dict[str, Any]:
    shape = student.backbones[modality].input_shape
    backbone = config["settings"][modality]["name"]
    return {"modality": modality, "backbone": backbone, "shape": list(shape), "dtype": noise(modality, shape, 0).dtype}


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if name == "loss" else f"{100 * value:.1f} %"


def _cell(text: Any) -> str:
    """Return a name as a cell of a Markdown table can hold it."""
    return str(text).replace("|", "\\|").replace("\n", " ")
