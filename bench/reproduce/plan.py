"""The plan: which commands answer the paper's questions, in which order, and what each reads of others."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# Epochs of a teacher and of a student, by data set.
EPOCHS = {"grid": (8, 20), "sample": (25, 40)}
SETS = tuple(EPOCHS)
VARIANTS = ("baseline", "dropout", "delta", "karmma")
STRATEGIES = ("B.1", "B.2", "B.3", "B.4")  # 'dropout' ignores what is missing, 'delta' is B.5
MODALITIES = ("video", "flow", "audio")
FROM_TOKENS = "start/video-tokens.safetensors"
LABELS = "labels.json"
TEMPERATURE = "4"  # of Hinton et al. (2015), where the paper has 1


@dataclass(frozen=True)
class Scale:
    """How much of it all is done.

    keep_every: one in so many of the grid's sentences.  n_sample: clips of the sample data.  n_uncached, n_few: clips
    that the time without a cache is measured on.  epochs: of every training; None: those of the settings.
    """

    keep_every: int
    n_sample: int
    n_uncached: int
    seeds: tuple[int, ...]
    epochs: int | None
    n_trials: int
    thetas: tuple[str, ...]
    n_few: int = 2


FULL = Scale(1, 1920, 50, (0, 1, 2), None, 8, ("none", "144", "48", "24"))
QUICK = Scale(20, 192, 20, (0, 1), 2, 2, ("none", "24"))


@dataclass(frozen=True)
class Step:
    """A command, and what it reads of others.

    words: of `karmma`, or `tokens` or `labels` and what the script of that name takes; {run:x} is the run that step x
    left, {teacher} the digest of the teacher.  after: steps it reads from.
    """

    name: str
    words: tuple[str, ...]
    after: tuple[str, ...] = ()

    @property
    def trains(self) -> bool:
        """Say whether it leaves a run, which is then evaluated on test."""
        return self.words[0] in ("train-teacher", "distill")

    @property
    def alone(self) -> bool:
        """Say whether it takes all cores."""
        return self.words[0] in ("extract", "sweep", "report")

    @property
    def starts(self) -> bool:
        """Say whether its backbone is kept, as weights that students start from."""
        return self.name.startswith("start-")


def plan(name: str, scale: Scale) -> tuple[Step, ...]:
    """Return the steps for one data set, each after those that it reads from; those that need the cache come first."""
    epochs = () if scale.epochs is None else ("--epochs", str(scale.epochs))
    return (*_starts(name, epochs), *_teachers(scale, epochs), *_students(scale, epochs))


def _starts(name: str, epochs: tuple[str, ...]) -> Iterator[Step]:
    """Yield the extraction, and the steps to the weights that every student's backbones start from."""
    yield Step("extract", ("extract",))
    for modality in MODALITIES:
        first, after = "none", ()
        if (name, modality) == ("grid", "video"):  # labels alone teach it nothing, not even the training clips
            words = ("tokens", modality, FROM_TOKENS, *epochs[1:])
            yield Step("tokens-video", words, ("extract",))
            first, after = FROM_TOKENS, ("tokens-video",)
        words = ("distill", "--teacher", "none", "--modality", modality)
        yield Step(f"start-{modality}", (*words, "--set", f"student.{modality}.weights={first}", *epochs), after)


def _teachers(scale: Scale, epochs: tuple[str, ...]) -> Iterator[Step]:
    space = ("max_lr=3e-4..3e-3,log", "alpha=0.5,0.7,0.9", "attention_dropout=0.1,0.3")
    trials = ("--sampler", "random", "--pruner", "none", "--trials", str(scale.n_trials), "--workers", "2")
    yield Step("sweep", ("sweep", *space, *trials, *epochs), ("extract",))
    yield Step("teacher", ("train-teacher", "--config", "best.toml"), ("sweep",))
    for theta in scale.thetas:  # of V and A, as in Tab. 4
        words = ("train-teacher", "--modality", "video", "--modality", "audio", "--theta", theta, *epochs)
        yield Step(f"theta-{theta}", words, ("extract",))
    # What each epoch of a teacher would take without a cache: what many clips take more than few, so without start-up.
    for name in ("uncached", "few"):
        yield Step(name, ("extract", "--table", f"{name}.csv", "--cache", name, "--views", "1"))


def _students(scale: Scale, epochs: tuple[str, ...]) -> Iterator[Step]:
    starts = tuple(f"start-{modality}" for modality in MODALITIES)
    for seed in scale.seeds:
        words = ("distill", "--variant", "karmma", "--seed", str(seed), *epochs, "--teacher", "{teacher}")
        yield Step(f"karmma-{seed}", words, (*starts, "teacher"))
    first = f"karmma-{scale.seeds[0]}"
    yield Step("labels", ("labels", "{teacher}", LABELS), ("teacher",))
    # A teacher that is sure of its training clips says more at a higher temperature.
    words = ("distill", "--variant", "karmma", "--temperature", TEMPERATURE, *epochs, "--teacher", "{teacher}")
    yield Step("soft-0", words, (*starts, "teacher"))
    thetas = tuple(word for theta in scale.thetas for word in ("--theta", theta))
    words = ("report", "--efficiency", "{run:teacher}", f"{{run:{first}}}", *thetas, "--into", "efficiency")
    yield Step("efficiency", words, ("teacher", first))
    for seed in scale.seeds:
        for variant in VARIANTS[:-1]:
            yield Step(f"{variant}-{seed}", ("distill", "--variant", variant, "--seed", str(seed), *epochs), starts)
    for missing in STRATEGIES:
        yield Step(f"{missing}-0", ("distill", "--variant", "delta", "--missing", missing, *epochs), starts)


def named(steps: Sequence[Step]) -> dict[str, Step]:
    """Return the steps by name."""
    return {step.name: step for step in steps}
