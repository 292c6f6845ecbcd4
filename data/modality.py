"""Names, order, letters and states of the modalities."""

from collections.abc import Iterable

from .errors import ConfigError, nearest

LETTERS = {"video": "V", "flow": "F", "audio": "A", "detections": "D"}
MODALITIES = tuple(LETTERS)

# One (clip, modality, view) on disk is in exactly one of these states (design: the cache cannot lie).
UNWRITTEN, PRESENT, ABSENT, FAILED = 0, 1, 2, 3
STATE_NAMES = {PRESENT: "present", ABSENT: "absent", FAILED: "failed"}


def in_order(modalities: Iterable[str]) -> tuple[str, ...]:
    """Return the modalities without repeats in the one fixed order; raise ConfigError on an unknown or empty choice."""
    chosen = set(modalities)
    for name in chosen - set(MODALITIES):
        raise ConfigError(f"Unknown modality {name!r}. {nearest(name, MODALITIES)}")
    if not chosen:
        raise ConfigError(f"No modality chosen. Choose from {', '.join(MODALITIES)}.")
    return tuple(name for name in MODALITIES if name in chosen)


def letters(modalities: Iterable[str]) -> str:
    """Return the paper's short name of a subset, such as 'V+F+A'."""
    return "+".join(LETTERS[name] for name in in_order(modalities))


def subsets(modalities: Iterable[str]) -> list[tuple[str, ...]]:
    """Return all 2^M - 1 subsets that are not empty, the largest first, in the order of Tab. 1."""
    names = in_order(modalities)
    bits = range(1, 2 ** len(names))
    found = [tuple(name for place, name in enumerate(names) if bit >> place & 1) for bit in bits]
    return sorted(found, key=lambda subset: (-len(subset), [names.index(name) for name in subset]))
