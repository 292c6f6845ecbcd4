"""A checkup before one begins: environment, codecs, GPU, clips, frames, weights and disks, each with its next step."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from packaging.requirements import Requirement

from ..data.annotations import ClipTable
from ..data.cache import Cache, has_cache
from ..data.check import check_clips, missing_codecs, unreadable_frames
from ..data.clips import read_rows
from ..data.config import DataConfig
from ..data.device import has_bfloat16
from ..data.errors import KarmmaError
from ..data.places import is_local, place, sizes
from ..data.progress import watched
from ..data.selection import n_missing
from ..extract.backbones import build_backbone, find_recipe
from ..extract.config import BackboneConfig, ExtractConfig
from ..fuse.config import TeacherConfig
from ..fuse.stage import require_labels
from .config import StudentConfig
from .needs import DataSet, need

SECTIONS = {"teacher": "extract", "student": "student"}
SCARCE = 1.2  # a disk with less than so many times what is needed


@dataclass(frozen=True)
class Finding:
    """What one check came to; step: what to do next, empty where all is well."""

    check: str
    verdict: Literal["PASS", "WARN", "FAIL"]
    found: str
    step: str = ""


@dataclass(frozen=True)
class Checkup:
    """The settings that are looked at; n_clips: how many clips' frames are decoded, None for all."""

    data: DataConfig
    extract: ExtractConfig
    teacher: TeacherConfig
    student: StudentConfig
    n_clips: int | None = None

    def findings(self) -> Iterator[Finding]:
        """Yield one finding a check, cheap ones first."""
        yield _environment()
        yield _codecs()
        yield _gpu()
        if self.data.table is None:
            yield Finding("clips", "WARN", "no clip table is named", "karmma init FOLDER, or add [data] table")
        else:
            yield from self._of_clips()
        yield from self._weights()

    def _of_clips(self) -> Iterator[Finding]:
        """Yield what is found of the table, its files, their frames, and the disks that its tokens go to."""
        try:
            table, bad = read_rows(self.data)
            require_labels(table, self.data.heads)
        except KarmmaError as error:
            yield Finding("table", "FAIL", str(error), "correct the table, then karmma doctor")
            return
        n_train = len(table.rows("train"))
        classes = ", ".join(f"{len(table.classes(head))} of {head}" for head in self.data.heads)
        yield _judged("table", [str(row) for row in bad], f"{table.n_clips} clips, {n_train} to train; {classes}")
        with watched("files", table.n_clips, "clips") as progress:
            wrong = check_clips(table, self.data, progress.advance)
        yield _judged("files", [str(row) for row in wrong], f"those of {table.n_clips} clips are there")
        yield self._frames(table)
        for modality in self.data.own_modalities:
            yield self._imported(table, modality)
        if self.data.read_modalities:
            yield self._disk(table)

    def _frames(self, table: ClipTable) -> Finding:
        n_clips = min(self.n_clips or table.n_clips, table.n_clips)
        rows = np.linspace(0, table.n_clips - 1, n_clips).round().astype(int)
        with watched("frames", n_clips, "clips") as progress:
            failed = unreadable_frames(table, rows, self.data, self.extract.readers, progress.advance)
        lines = [f"{clip_id}: {reason}" for clip_id, reason in failed.items()]
        return _judged("frames", lines, f"first, middle and last of {n_clips} clips decode")

    def _imported(self, table: ClipTable, modality: str) -> Finding:
        """Say whether the cache has tokens of a modality of one's own for every clip."""
        step = "karmma cache import FILE"
        if not has_cache(self.data.cache):
            return Finding(modality, "WARN", "nothing is imported", step)
        cache = Cache.open(self.data.cache)
        cache.foresee_clips(table)
        n = min((n_missing(cache, table, modality, name) for name in cache.identities(modality)), default=table.n_clips)
        if n:
            return Finding(modality, "WARN", f"{n} of {table.n_clips} clips are not imported", step)
        return Finding(modality, "PASS", "imported for every clip")

    def _disk(self, table: ClipTable) -> Finding:
        """Hold what the cache will take against what is free where it goes."""
        cache = self.data.cache
        try:
            if not is_local(place(cache)):
                return Finding("disk", "PASS", f"{cache} is an object store: its room is not looked at")
            if Path(cache).exists() and not Path(cache).is_dir():
                return Finding("disk", "FAIL", f"{cache} is no folder", "name another --cache")
        except KarmmaError as error:
            return Finding("disk", "FAIL", str(error), "name another --cache")
        try:
            found = need(DataSet.of(table, self.data), self.data, self.extract, self.teacher, self.student, tflops=1.0)
        except KarmmaError as error:
            return Finding("disk", "WARN", f"what the cache will take is not known: {error}", "see weights below")
        path = Path(cache).absolute()
        where = next(folder for folder in (path, *path.parents) if folder.exists())
        wanted = (
            _lacking(found.tokens_gb, *(path / "tokens" / modality for modality in self.data.read_modalities))
            + _lacking(found.logits_gb, path / "logits")
            + _lacking(self.student.decoded_gb, self.data.inputs)
        )
        free = shutil.disk_usage(where).free / 1e9
        said = f"{wanted:.2f} GB are needed, {free:.1f} GB are free at {where}"
        step = "free space, name another --cache, or lower --theta or --views"
        if free < wanted:
            return Finding("disk", "FAIL", said, step)
        return Finding("disk", "WARN", said, step) if free < SCARCE * wanted else Finding("disk", "PASS", said)

    def _weights(self) -> Iterator[Finding]:
        """Build the backbones of the teacher and of the student with their weights, and say where one is not there."""
        for role, config in (("teacher", self.extract), ("student", self.student)):
            chosen = self.student.modalities if role == "student" else None
            for modality in chosen or self.data.read_modalities:
                yield _backbone(role, getattr(config, modality), modality, self.data.input_shape(modality))


def _lacking(needed_gb: float, *folders: Path) -> float:
    """Return how many of so many GB are not in these folders yet."""
    return max(0.0, needed_gb - sum(sum(sizes(folder).values()) for folder in folders) / 1e9)


def _judged(check: str, wrong: list[str], good: str) -> Finding:
    """Return a finding about clips: the first that is wrong, and how many are."""
    if not wrong:
        return Finding(check, "PASS", good)
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return Finding(
        check, "FAIL", wrong[0] + more, "karmma check lists them; --write good.csv --only-good leaves them out"
    )


def _environment() -> Finding:
    """Hold the versions of all packages against what this one asks for."""
    try:
        lines = requires("karmma") or ()
    except PackageNotFoundError:
        return Finding("environment", "WARN", "karmma is on the path, but not installed", "pip install -e .")
    wrong = []
    for line in lines:
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            if not wanted.specifier.contains(version(wanted.name), prereleases=True):
                wrong.append(f"{wanted.name} {version(wanted.name)}, expected {wanted.specifier}")
        except PackageNotFoundError:
            wrong.append(f"no {wanted.name}")
    if wrong:
        return Finding("environment", "FAIL", "; ".join(wrong), "pip install --upgrade karmma")
    return Finding("environment", "PASS", f"torch {torch.__version__}, {torch.get_num_threads()} threads")


def _codecs() -> Finding:
    missing = missing_codecs()
    if missing:
        return Finding("codecs", "WARN", f"not decoded here: {', '.join(missing)}", "pip install --force-reinstall av")
    return Finding("codecs", "PASS", "all of the usual ones")


def _gpu() -> Finding:
    if not torch.cuda.is_available():
        step = "preset tiny runs on a CPU; karmma doctor --plan says what paper needs"
        return Finding("GPU", "WARN", "none that torch can use", step)
    device = torch.device("cuda")
    about, bfloat16 = torch.cuda.get_device_properties(device), "" if has_bfloat16(device) else "no "
    memory = about.total_memory / 2**30
    return Finding("GPU", "PASS", f"{torch.cuda.device_count()} x {about.name}, {memory:.0f} GiB, {bfloat16}bfloat16")


def _backbone(role: str, chosen: BackboneConfig, modality: str, shape: tuple[int, ...]) -> Finding:
    """Build one backbone with its weights; those that would be fetched first are left alone."""
    check, name, weights = f"{role}'s {modality}", chosen.name, chosen.weights
    try:
        recipe = find_recipe(name)
        if weights in recipe.weights:
            step = "be online when they are first needed, or name a file"
            return Finding(check, "WARN", f"{name} with {weights} weights, which may have to be fetched", step)
        if weights == "none":
            with torch.device("meta"):
                build_backbone(name, modality, shape)
        else:
            build_backbone(name, modality, shape, weights)
    except KarmmaError as error:
        return Finding(check, "FAIL", str(error), f"correct [{SECTIONS[role]}] {modality}")
    if weights == "none" and role == "teacher":
        return Finding(check, "WARN", f"{name} with random weights", "name pretrained weights, if this is no trial run")
    return Finding(check, "PASS", f"{name}, " + ("from scratch" if weights == "none" else f"weights {weights}"))
