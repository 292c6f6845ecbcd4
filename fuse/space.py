"""What a sweep varies: options such as max_lr=1e-4..1e-2,log, and the settings that a trial makes of them."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from ..data.config import PLACES, DataConfig, StageConfig
from ..data.errors import ConfigError, nearest
from ..data.settings import resolve
from .config import NOT_DECISIVE, TeacherConfig

if TYPE_CHECKING:
    from optuna.trial import Trial

SECTIONS: dict[str, type[StageConfig]] = {"data": DataConfig, "teacher": TeacherConfig}
# The command line's name of a setting, where it is another.
RENAMED = {"modality": "modalities"}
RANGE = re.compile(r"(?P<low>[^,]+?)\.\.(?P<high>[^,]+)(?P<log>,log)?(,step=(?P<step>[^,]+))?")
HOW = "Write values a,b,c or a range low..high, low..high,log or low..high,step=s."
# Trials that differ in none of these see the same batches.
BATCHED_BY = ("batch_size", "epochs", "seed", "tokens")
# What is told apart, and on which clips: the table is read once, and trials are compared by what they reach on it.
TASK = ("heads", "prune", "holdout", "holdout_share", "holdout_seed")


@dataclass(frozen=True)
class Dimension:
    """One option: the texts to choose from, or a range of numbers."""

    section: str
    field: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float | None = None

    def suggest(self, trial: "Trial") -> Any:
        """Have Optuna choose a value for a trial."""
        if self.choices:
            return trial.suggest_categorical(self.field, self.choices)
        if isinstance(self.low, int):
            return trial.suggest_int(self.field, self.low, int(self.high), log=self.log, step=int(self.step or 1))
        return trial.suggest_float(self.field, self.low, self.high, log=self.log, step=self.step)


class Space:
    """The dimensions of a sweep, and the settings that they start from.

    written: option -> text, as `HOW` says.  Raises ConfigError that says which option or value does not fit.
    """

    def __init__(self, written: Mapping[str, str], data: DataConfig, config: TeacherConfig) -> None:
        self.data, self.config = data, config
        if not written:
            raise ConfigError("Nothing to vary. Name options and their values, such as max_lr=1e-4..1e-2,log.")
        dimensions = [self._dimension(name, text) for name, text in written.items()]
        # By name: the order in which they are written decides nothing, draws neither.
        self.dimensions = tuple(sorted(dimensions, key=lambda dimension: dimension.field))
        if len({dimension.field for dimension in dimensions}) < len(dimensions):
            raise ConfigError(f"Sweep: {', '.join(written)}: an option is named twice. Write all its values together.")

    @property
    def varies_data(self) -> bool:
        """Say whether trials may differ in which clips they see, or how."""
        return any(dimension.section == "data" for dimension in self.dimensions)

    def suggest(self, trial: "Trial") -> dict[str, Any]:
        """Choose a value of every dimension."""
        return {dimension.field: dimension.suggest(trial) for dimension in self.dimensions}

    def grid(self) -> list[dict[str, str]]:
        """Return every combination; those that share batches follow each other.  Raises ConfigError on a range."""
        for dimension in self.dimensions:
            if not dimension.choices:
                raise ConfigError(f"Sweep: {dimension.field} is a range, and a grid needs values. Write them as a,b,c.")
        slow_first = sorted(
            self.dimensions, key=lambda each: each.section == "teacher" and each.field not in BATCHED_BY
        )
        combinations = product(*(dimension.choices for dimension in slow_first))
        return [dict(zip((d.field for d in slow_first), chosen, strict=True)) for chosen in combinations]

    def settings(self, chosen: Mapping[str, Any]) -> tuple[DataConfig, TeacherConfig]:
        """Return the settings of a trial.  Raises ConfigError if the values do not fit each other."""
        over: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
        for dimension in self.dimensions:
            if dimension.field in chosen:
                over[dimension.section][dimension.field] = _listed(dimension.field, chosen[dimension.field])
        return self._resolved(over)

    def thetas(self) -> list[int]:
        """Return the values of Theta that trials may have, of a range its least; none if all tokens are kept."""
        swept = [dimension for dimension in self.dimensions if dimension.field == "theta"]
        values = [self.settings({"theta": value})[1].theta for each in swept for value in each.choices or [each.low]]
        return [value for value in values or [self.config.theta] if value is not None]

    def _dimension(self, name: str, text: str) -> Dimension:
        field = option(name)
        known = {known: section for section, model in SECTIONS.items() for known in model.model_fields}
        if field in TASK:
            raise ConfigError(
                f"Sweep: {field} cannot vary: accuracies of other tasks, or on other clips, say nothing of each other."
            )
        for fixed in PLACES | NOT_DECISIVE:
            known.pop(fixed, None)
        if field not in known:
            raise ConfigError(f"Sweep: {name!r} is no option that decides a result. {nearest(field, known)}")
        parsed = RANGE.fullmatch(text.strip())
        choices = () if parsed else tuple(part.strip() for part in text.split(",") if part.strip())
        dimension = Dimension(known[field], field, choices)
        if parsed:
            low, high = (self._typed(dimension, parsed.group(end)) for end in ("low", "high"))
            return _range(dimension, text, low, high, parsed)
        typed = [self._typed(dimension, value) for value in choices]
        if not typed or len(set(typed)) < len(typed):
            raise ConfigError(f"Sweep: {name}={text}: expected values, each once. {HOW}")
        return dimension

    def _typed(self, dimension: Dimension, text: str) -> Any:
        """Return a value as its setting has it.  Raises ConfigError if it does not fit."""
        found = self._resolved({dimension.section: {dimension.field: _listed(dimension.field, text)}})
        return getattr(found[dimension.section == "teacher"], dimension.field)

    def _resolved(self, over: Mapping[str, Mapping[str, Any]]) -> tuple[DataConfig, TeacherConfig]:
        base = {"data": self.data.model_dump(), "teacher": self.config.model_dump()}
        found = resolve(SECTIONS, ("settings", base), ("sweep", over))
        return found["data"], found["teacher"]


def option(name: str) -> str:
    """Return the field of a setting, as it is written on the command line or in a file."""
    field = name.strip().replace("-", "_")
    return RENAMED.get(field, field)


def _listed(field: str, value: Any) -> Any:
    """Return a list of names as settings write it: within one value of a sweep they are joined by +."""
    return value.replace("+", ",") if field == "modalities" else value


def _range(dimension: Dimension, text: str, low: Any, high: Any, parsed: re.Match[str]) -> Dimension:
    stated = parsed.group("step")
    try:
        step = float(stated) if stated else None
    except ValueError:
        step = math.nan
    fits = all(isinstance(each, int | float) and not isinstance(each, bool) for each in (low, high)) and low < high
    if parsed.group("log"):
        fits = fits and low > 0 and step is None
    if step is not None:
        fits = fits and 0 < step < math.inf and (isinstance(low, float) or step == int(step))
    if not fits:
        raise ConfigError(
            f"Sweep: {dimension.field}={text}: expected numbers, the lower one first, above 0 with log, and log or a "
            f"step, not both. {HOW}"
        )
    return Dimension(dimension.section, dimension.field, (), low, high, bool(parsed.group("log")), step)
