"""Names, order, letters and states of the modalities."""

import re
from collections.abc import Iterable

from .errors import ConfigError, nearest

LETTERS = {"video": "V", "flow": "F", "audio": "A", "detections": "D"}
MODALITIES = tuple(LETTERS)
# What features made elsewhere may be called: no reader here makes them, and no misspelt name passes for one.
OWN = re.compile("own_([a-z0-9]{1,32})")

# One (clip, modality, view) on disk is in exactly one of these states (design: the cache cannot lie).
UNWRITTEN, PRESENT, ABSENT, FAILED = 0, 1, 2, 3
STATE_NAMES = {PRESENT: "present", ABSENT: "absent", FAILED: "failed"}


def is_own(name: str) -> bool:
    """Say whether a modality is one of the user's own, such as own_imu, whose tokens are imported."""
    return OWN.fullmatch(name) is not None


def in_order(modalities: Iterable[str]) -> tuple[str, ...]:
    """Return the modalities without repeats in the one fixed order, one's own last, by name.

    Raises ConfigError on an unknown or empty choice.
    """
    chosen = set(modalities)
    own = sorted(filter(is_own, chosen))
    for name in chosen - {*MODALITIES, *own}:
        raise ConfigError(f"Unknown modality {name!r}. {nearest(name, MODALITIES)}")
    if not chosen:
        raise ConfigError(f"No modality chosen. Choose from {', '.join(MODALITIES)}.")
    return (*(name for name in MODALITIES if name in chosen), *own)


def letters(modalities: Iterable[str]) -> str:
    """Return the paper's short name of a subset, such as 'V+F+A', or 'V+imu' with own_imu."""
    return "+".join(LETTERS.get(name) or OWN.sub(r"\1", name) for name in in_order(modalities))


def subsets(modalities: Iterable[str]) -> list[tuple[str, ...]]:
    """Return all 2^M - 1 subsets that are not empty, the largest first, in the order of Tab. 1."""
    names = in_order(modalities)
    bits = range(1, 2 ** len(names))
    found = [tuple(name for place, name in enumerate(names) if bit >> place & 1) for bit in bits]
    return sorted(found, key=lambda subset: (-len(subset), [names.index(name) for name in subset]))
