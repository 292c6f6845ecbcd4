"""The embedded sample data set: what each of its clips shows, and the folder that holds them.

Verbs are motions and nouns are objects with a look and a sound of their own.  Every modality of some clips is spoiled
on purpose, seldom two of them at once, so that the modalities complement each other.
"""

import csv
import io
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ConfigError
from .publish import publish, publish_json

if TYPE_CHECKING:
    import numpy as np

# Raised by hand whenever the same seed would give other files.
GENERATOR = 1

VERBS = ("push", "pull", "lift", "lower")
NOUNS = ("ball", "box", "tent", "kite", "cross", "ring")
CLASSES = len(VERBS) * len(NOUNS)
SPLITS = ("train", "train", "train", "train", "val", "train", "test", "test")
FPS, DURATION_S = 16, 1.5

# Two draws in 0..1 per clip, one for each head, that step evenly through the square within a split, so that 60 clips
# are spoiled in the same proportions as 300.  Source: Roberts 2018, the R2 sequence (powers of the plastic number).
STEPS = (0.7548776662466927, 0.5698402909980532)

# Stretches of those draws.  Where two of them overlap (1% and 2%), hardly any modality that knows the head is intact.
LOOK_HIDDEN = (0.00, 0.26)  # noun: blurred and without colour
SOUND_DROWNED = (0.25, 0.44)  # noun: noise only
SOUND_OF_OTHERS = (0.44, 0.56)  # noun: two other objects are heard instead
SOUND_ABSENT = (0.56, 0.64)  # noun: the file has no sound track
VIDEO_FROZEN = (0.00, 0.12)  # verb: one frame repeated
VIDEO_COVERED = (0.12, 0.20)  # verb and look: a board in front of nearly everything
BOXES_STILL = (0.18, 0.30)  # verb: the boxes follow a thing that stays where it is
BOXES_ASTRAY = (0.30, 0.52)  # verb: the boxes wander about
BOXES_ABSENT = (0.52, 0.58)  # verb: no box file
# Drawn on their own, harmful to flow above all.
P_PAN, P_DISTRACTOR = 0.20, 0.15
P_HAND = 0.9

COLUMNS = ("clip_id", "video", "start_s", "stop_s", "split", "participant", "verb", "noun", "detections")
README = """{title}

Made by karmma; nobody filmed this.  An object crosses the picture.  Verb: which way (push: to the right, pull: to the
left, lift: up, lower: down).  Noun: which object; each has its own shape, colour, pattern and sound.
Some clips have no sound track, some no boxes, and in some a modality misleads.

karmma.toml  settings: run the karmma commands in this folder
clips.csv    one row per clip
videos/      96 x 96 pixels, 16 frames a second, 1.5 s, H.264 with AAC sound at 16 kHz
boxes/       boxes per frame in pixels, labelled as in Something-Else; standard_category 0000 is the object

Safe to delete: karmma writes it again, the same.
"""
SETTINGS = """{title}, {n_clips} clips
preset = "tiny"

[data]
table = "clips.csv"
heads = ["verb", "noun"]
modalities = ["video", "flow", "audio", "detections"]
"""


@dataclass(frozen=True)
class ClipPlan:
    """What one clip shows, and what is wrong with it; everything else about it is drawn from (seed, index)."""

    seed: int
    index: int
    verb: str
    noun: str
    split: str
    participant: str
    sound: str  # clear, drowned, others, absent
    boxes: str  # clear, still, astray, absent
    hidden: bool
    frozen: bool
    covered: bool
    panned: bool
    distracted: bool
    hand: bool

    @property
    def clip_id(self) -> str:
        """Name of the clip and of its files."""
        return f"clip_{self.index:04d}"

    def row(self) -> dict[str, object]:
        """Return the clip's row of the table."""
        return {
            "clip_id": self.clip_id,
            "video": f"videos/{self.clip_id}.mp4",
            "start_s": 0.0,
            "stop_s": DURATION_S,
            "split": self.split,
            "participant": self.participant,
            "verb": self.verb,
            "noun": self.noun,
            "detections": "" if self.boxes == "absent" else f"boxes/{self.clip_id}.json",
        }


def generator(seed: int, index: int, purpose: int) -> "np.random.Generator":
    """Return the random numbers of one purpose of one clip: 0 plan, 1 motion, 2 look, 3 sound, 4 boxes, 5 spoiling."""
    import numpy as np

    return np.random.default_rng((seed, index, purpose))


def plan_clips(n_clips: int, seed: int) -> list[ClipPlan]:
    """Plan all clips; clip i is the same whatever `n_clips` is.

    Each run of 24 clips holds every (verb, noun) once, 15 of them for training, 3 for validation, 6 for test.
    Participant P06 occurs in the test split only.
    """
    plans: list[ClipPlan] = []
    ranks: Counter[str] = Counter()
    for index in range(n_clips):
        turn, place = divmod(index, CLASSES)
        split = SPLITS[(turn + place + place // len(SPLITS)) % len(SPLITS)]
        plans.append(_plan_clip(seed, index, split, ranks[split]))
        ranks[split] += 1
    return plans


def _plan_clip(seed: int, index: int, split: str, rank: int) -> ClipPlan:
    """Plan one clip; `rank` counts the clips of its split before it."""
    place = index % CLASSES
    draw = generator(seed, index, 0)
    starts = generator(seed, 0, 5).random(2).tolist()
    noun_draw, verb_draw = ((start + rank * step) % 1 for start, step in zip(starts, STEPS, strict=True))
    sounds = {"drowned": SOUND_DROWNED, "others": SOUND_OF_OTHERS, "absent": SOUND_ABSENT}
    boxes = {"still": BOXES_STILL, "astray": BOXES_ASTRAY, "absent": BOXES_ABSENT}
    return ClipPlan(
        seed=seed,
        index=index,
        verb=VERBS[place % len(VERBS)],
        # 4 and 6 share a factor: the second dozen is moved on by one noun to reach the other half of the pairs.
        noun=NOUNS[(place + place // 12) % len(NOUNS)],
        split=split,
        participant=f"P{draw.integers(1, 7 if split == 'test' else 6):02d}",
        sound=next((name for name, stretch in sounds.items() if _within(noun_draw, stretch)), "clear"),
        boxes=next((name for name, stretch in boxes.items() if _within(verb_draw, stretch)), "clear"),
        hidden=_within(noun_draw, LOOK_HIDDEN),
        frozen=_within(verb_draw, VIDEO_FROZEN),
        covered=_within(verb_draw, VIDEO_COVERED),
        panned=bool(draw.random() < P_PAN),
        distracted=bool(draw.random() < P_DISTRACTOR),
        hand=bool(draw.random() < P_HAND),
    )


def _within(value: float, stretch: tuple[float, float]) -> bool:
    return stretch[0] <= value < stretch[1]


def write_sample(
    folder: Path, n_clips: int = 480, seed: int = 0, progress: Callable[[int], None] | None = None
) -> Path:
    """Write the sample data set into `folder` and return its `karmma.toml`, which is written last.

    Returns at once if it is there already; an interrupted run is taken up where it stopped.  `progress` is called with
    the number of clips newly finished.  The same library versions give the same bytes.
    Raises ConfigError if n_clips < 1 or seed < 0, or if the folder holds a `karmma.toml` that is not of our making.
    """
    if n_clips < 1 or seed < 0:
        raise ConfigError(f"Sample data: asked for {n_clips} clips from seed {seed}. Ask for n_clips >= 1, seed >= 0.")
    settings, readme, title = folder / "karmma.toml", folder / "README.txt", _title(seed)
    found = _first_line(settings)
    if found == f"# {title}, {n_clips} clips":
        return settings
    if settings.exists() and not found.startswith("# KARMMA sample data"):
        raise ConfigError(f"{settings}: not written with the sample data, left as it is. Choose another folder for it.")
    settings.unlink(missing_ok=True)
    if _first_line(readme) != title:
        _delete_clips(folder)
        publish(readme, README.format(title=title).encode())
    plans = plan_clips(n_clips, seed)
    _write_clips(folder, plans, progress or (lambda n: None))
    publish(folder / "clips.csv", _table(plans).encode())
    publish(settings, ("# " + SETTINGS.format(title=title, n_clips=n_clips)).encode())
    return settings


def _title(seed: int) -> str:
    return f"KARMMA sample data, generator {GENERATOR}, seed {seed}"


def _first_line(path: Path) -> str:
    """Return the first line of a text file, or nothing if there is no such file."""
    if not path.is_file():
        return ""
    return path.read_text(encoding="utf-8", errors="replace").partition("\n")[0]


def _delete_clips(folder: Path) -> None:
    """Delete clips that another seed or generator left here; other files are not ours to touch."""
    for pattern in ("videos/clip_*.mp4", "boxes/clip_*.json"):
        for path in folder.glob(pattern):
            path.unlink()


def _write_clips(folder: Path, plans: list[ClipPlan], progress: Callable[[int], None]) -> None:
    """Write the clips that are not there yet; the video comes last and stands for the whole clip."""
    rows = [(plan, plan.row()) for plan in plans]
    missing = [(plan, row) for plan, row in rows if not (folder / str(row["video"])).exists()]
    if len(missing) < len(rows):
        progress(len(rows) - len(missing))
    if not missing:
        return
    from .sample_media import draw_boxes, draw_frames, draw_sound, encode

    for plan, row in missing:
        if row["detections"]:
            publish_json(folder / str(row["detections"]), draw_boxes(plan))
        publish(folder / str(row["video"]), encode(draw_frames(plan), draw_sound(plan)))
        progress(1)


def _table(plans: list[ClipPlan]) -> str:
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(plan.row() for plan in plans)
    return text.getvalue()
