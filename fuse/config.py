"""Settings of `karmma train-teacher`, and those that it shares with the student's training."""

from typing import TYPE_CHECKING, Literal, Self

from pydantic import model_validator

from ..data.config import StageConfig, Theta, ours, paper

# Settings that do not decide what a training ends with.
NOT_DECISIVE = frozenset({"device", "threads", "resume", "save_minutes", "allow_failures"})
Missing = Literal["ignore", "B.1", "B.2", "B.3", "B.4", "B.5"]


class TrainingConfig(StageConfig):
    """Optimisation of either model, and where its run goes."""

    if TYPE_CHECKING:  # each of the two states its own, in another place of its help
        weight_decay: float
        clip_norm: float

    epochs: int = paper(100, "passes over the training clips; the paper's ablations use 50", "sec. 4", ge=1)
    max_lr: float = paper(5e-4, "learning rate at the end of the warm-up", "sec. 4", gt=0)
    min_lr: float = paper(1e-5, "learning rate at the start and at the end", "sec. 4", gt=0)
    warmup_epochs: int = paper(10, "epochs of linear warm-up", "sec. 4", ge=0)
    norm_first: bool = ours(False, "LayerNorm before attention instead of after", "not stated; torch's default")
    resume: bool = ours(False, "go on with a run that was interrupted", "never in silence")
    save_minutes: float = ours(10.0, "minutes between saves in the middle of an epoch", "so much may be lost", ge=0)
    allow_failures: int = ours(0, "clips that may be failed; they then lack that modality", "never in silence", ge=0)
    precision: Literal["float32", "bfloat16"] = ours(
        "float32", "arithmetic of the forward pass (autocast); losses and weights stay float32", "exact before fast"
    )
    compile: bool = ours(False, "torch.compile; the first steps take minutes", "worth it in long runs only")
    device: str = ours("auto", "torch device; auto takes CUDA where there is one", "convenience")
    threads: int = ours(0, "torch threads; 0 leaves torch's own choice", "torch knows the cores", ge=0)
    seed: int = ours(0, "seed of weights, sample order and dropout", "any number will do")

    @model_validator(mode="after")
    def _rates_fit(self) -> Self:
        if self.max_lr < self.min_lr:
            raise ValueError(f"max_lr is {self.max_lr}, below min_lr, {self.min_lr}; raise the one or lower the other")
        return self


class TeacherConfig(TrainingConfig):
    """The teacher's light fusion head over cached tokens."""

    embed_dim: int = paper(768, "width of the fusion block", "sec. 4", ge=1)
    ffn_dim: int = ours(768, "width of the feed-forward layers", "ratio 1 gives the published 11.25 M", ge=1)
    n_layers: int = paper(2, "transformer layers of the fusion block", "sec. 4", ge=1)
    n_attention_heads: int = paper(8, "attention heads", "sec. 4", ge=1)
    attention_dropout: float = paper(0.3, "dropout of attention weights", "sec. 4", ge=0, lt=1)
    missing: Missing = ours("ignore", "what stands in for a missing modality", "figures.md: no learned tokens")
    batch_size: int = paper(32, "clips a step", "sec. 4", ge=1)
    weight_decay: float = paper(0.05, "weight decay of AdamW", "sec. 4", ge=0)
    clip_norm: float = paper(1.0, "largest norm of the gradient", "sec. 4", gt=0)
    tokens: dict[str, str] = ours({}, "modality -> digest, where a cache has several sets", "one set is the rule")
    alpha: float = paper(0.7, "weight of cross-entropy in Eq. 3", "sec. 4", ge=0)
    beta: float = paper(0.3, "weight of InfoNCE in Eq. 3", "sec. 4", ge=0)
    tau: float = paper(0.1, "temperature of InfoNCE in Eq. 2", "sec. 4", gt=0)
    modality_dropout: float = ours(
        0.0, "probability of dropping a modality of a clip", "none in the paper; its later version has it", ge=0, lt=1
    )
    theta: Theta = ours(
        None, "tokens kept per modality in training, of a cache that holds all of them", "else the cache's own", ge=1
    )
    symmetric: bool = ours(False, "InfoNCE in both directions instead of from video alone", "Eq. 2 has the one")


class SweepConfig(StageConfig):
    """A sweep: which options of the teacher it varies, how values are chosen, and who works on it."""

    space: dict[str, str] = ours({}, "option -> values a,b,c or range low..high[,log][,step=s]", "nothing to guess")
    sampler: Literal["tpe", "random", "grid"] = ours("tpe", "how values are chosen", "Optuna's default")
    trials: int = ours(0, "trials in all; 0: the whole grid, or 20", "a night of small runs", ge=0)
    pruner: Literal["median", "halving", "none"] = ours(
        "median", "ends trials early that do worse than others at the same epoch", "Optuna's default"
    )
    workers: int = ours(1, "processes on this machine; other machines give the same command", "one GPU", ge=1)
    together: int = ours(1, "trials that a worker trains on the same batches, each read once", "memory", ge=1)
