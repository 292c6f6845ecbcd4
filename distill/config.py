"""Settings of `karmma distill`: the end-to-end student and what it learns from."""

from typing import Any, Literal

from pydantic import field_validator, model_validator

from ..data.config import DataConfig, Names, Theta, ours, paper
from ..data.modality import in_order, is_own
from ..extract.config import BackboneConfig, backbone
from ..fuse.config import Missing, TrainingConfig

NO_TEACHER = "none"


# What the paper's models to compare with are, beside the student itself (Tab. 1 and 3).
VARIANTS: dict[str, dict[str, Any]] = {
    "karmma": {},
    "delta": {"teacher": NO_TEACHER},
    "dropout": {"teacher": NO_TEACHER, "missing": "ignore"},
    "baseline": {"teacher": NO_TEACHER, "missing": "ignore", "modality_dropout": 0.0},
}


class StudentConfig(TrainingConfig):
    """The student: small trained backbones, a smaller fusion block, and the distillation."""

    variant: Literal["karmma", "delta", "dropout", "baseline"] = paper(
        "karmma", "the student, or without teacher, also without learned tokens, also without dropout", "Tab. 1 and 3"
    )
    modalities: Names | None = ours(None, "the student's modalities; none: those of the data", "sec. 3.2")
    teacher: str | None = ours(
        None, "digest of the cached teacher, or 'none' for the paper's Baseline", "one teacher is the rule"
    )
    views: int = ours(
        0, "views that a student without teacher cycles through; 0: those of the cache, or 1", "as with a teacher", ge=0
    )
    video: BackboneConfig = paper(backbone("swin3d_t", "kinetics400"), "backbone of V", "sec. 4")
    flow: BackboneConfig = paper(backbone("swin3d_t", "kinetics400"), "backbone of F", "sec. 4")
    audio: BackboneConfig = paper(backbone("ast_t", "none"), "backbone of A", "sec. 4")
    detections: BackboneConfig = paper(backbone("stlt_9", "none"), "backbone of D", "sec. 4")
    theta: Theta = paper(300, "tokens kept per modality (Theta-Average); none keeps all", "sec. 4", ge=1)
    embed_dim: int = paper(384, "width of the fusion block", "sec. 4", ge=1)
    ffn_dim: int = ours(384, "width of the feed-forward layers", "ratio 1 gives the published 65.15 M", ge=1)
    n_layers: int = paper(1, "transformer layers of the fusion block", "sec. 4", ge=1)
    n_attention_heads: int = paper(8, "attention heads", "sec. 4, as the teacher's", ge=1)
    attention_dropout: float = paper(0.0, "dropout of attention weights", "sec. 4", ge=0, lt=1)
    missing: Missing = paper("B.5", "what stands in for a missing modality", "Eq. 6; one modality needs none")
    modality_dropout: float = paper(0.5, "probability of dropping a modality of a clip", "sec. 4", ge=0, lt=1)
    batch_size: int = paper(6, "clips a step", "sec. 4", ge=1)
    max_lr: float = paper(1e-4, "learning rate at the end of the warm-up", "sec. 4", gt=0)
    weight_decay: float = paper(0.01, "weight decay of AdamW", "sec. 4", ge=0)
    clip_norm: float = paper(2.0, "largest norm of the gradient", "sec. 4", gt=0)
    gamma: float = paper(0.7, "weight of cross-entropy in Eq. 5", "sec. 4", ge=0)
    kl_lambda: float = paper(0.3, "weight of KL in Eq. 5 (lambda)", "sec. 4", ge=0)
    temperature: float = paper(1.0, "temperature of KL", "Eq. 4 has none", gt=0)
    accumulate: int = ours(1, "parts that a batch is computed in, one after the other, for small GPUs", "speed", ge=1)
    recompute: bool = ours(
        False, "compute layers of backbones again in the backward pass, not keep them, for small GPUs", "speed"
    )
    readers: int = ours(2, "processes that read clips", "two cores", ge=1)
    input_cache_mb: int = ours(
        2048, "memory for decoded clips, so that later epochs need no decoding", "8 GB PCs", ge=0
    )
    decoded_gb: float = ours(
        0.0, "gigabytes of decoded clips kept in data.inputs, for later epochs and runs", "disks are not ours", ge=0
    )

    @model_validator(mode="before")
    @classmethod
    def _varied(cls, given: Any) -> Any:
        """Fill in what a variant means; none of it may be asked for otherwise."""
        if not isinstance(given, dict):
            return given
        variant = given.get("variant")
        meant = VARIANTS.get(variant, {}) if isinstance(variant, str) else {}
        for name, value in meant.items():
            asked = given.get(name)
            if asked is not None and not _is_same(asked, value):
                raise ValueError(f"variant {variant} means {name} {value}, found {asked}; leave one of them out")
        return {**given, **meant}

    @field_validator("modalities")
    @classmethod
    def _in_order(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        own = [name for name in value or () if is_own(name)]
        if own:
            raise ValueError(f"a student starts from raw clips, and {own[0]} is imported; leave it to the teacher")
        return value and in_order(value)

    def modalities_of(self, data: DataConfig) -> tuple[str, ...]:
        """Return its own choice, else all modalities that are read from files; raises ConfigError if none is."""
        return self.modalities or data.require_read()


def _is_same(asked: Any, value: Any) -> bool:
    """Say whether a value, perhaps still text, is the one that is meant."""
    if isinstance(value, str):
        return asked == value
    try:
        return float(asked) == value
    except (TypeError, ValueError):
        return False
