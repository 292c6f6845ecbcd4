"""What a run is, in the paper's words, and which runs are the same but for the seed."""

from collections.abc import Mapping
from typing import Any

from ..data.config import digest
from ..data.modality import in_order, is_own, letters
from .config import NO_TEACHER, StudentConfig

BASELINE = "Baseline"
DROPOUT, DELTA = f"{BASELINE} w/ mod. dropout", f"{BASELINE} w/ delta"


def variant(described: Mapping[str, Any]) -> str:
    """Return 16 hex digits for all that decides a run but its seed: runs that share them are repetitions."""
    settings = {name: value for name, value in described["settings"].items() if name != "seed"}
    return digest({**described, "settings": settings})


def run_modalities(described: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the modalities of a student's or teacher's run, in order; raises KeyError if it does not say them."""
    if described["kind"] == "teacher":
        return in_order(described["tokens"])
    chosen = described["settings"]["modalities"] or described["data"]["modalities"]
    return in_order(name for name in chosen if not is_own(name))


def label(described: Mapping[str, Any]) -> str:
    """Return the paper's name of a run, as in Tab. 1 to 3 and B.1."""
    if described["kind"] == "teacher":
        return "KARMMA_T"
    settings, has_teacher = described["settings"], described["teacher"] != NO_TEACHER
    modalities = run_modalities(described)
    missing, drops = settings["missing"], settings["modality_dropout"] > 0
    own = StudentConfig.model_fields["missing"].default
    if len(modalities) == 1:
        return f"KARMMA_{letters(modalities)}" if has_teacher else f"{BASELINE} {letters(modalities)}"
    if has_teacher:
        return "KARMMA_S" if drops and missing == own else f"KARMMA_S ({missing}{'' if drops else ', no dropout'})"
    if not drops:
        return BASELINE if missing == "ignore" else f"{BASELINE} w/ Eq. ({missing})"
    return {"ignore": DROPOUT, own: DELTA}.get(missing, f"{DROPOUT} and Eq. ({missing})")
