"""The paper's claim on real clips: runs what is not finished yet of the plan, and writes docs/reproduction.md.

    python bench/reproduce/run.py [--quick] [--shared ../shared] [--folder reproduce] [--only grid] [--steps 'karmma-*']

Every finished step is kept as JSON in bench/reproduce/results and not done again, so this may be stopped at any time
and continued by the same command; trainings go on with the epoch they were in.  A step whose files are needed but gone
is repeated, and has to end with the same accuracies.  --quick runs all of the plan at a fraction of its size, and
writes into the folder alone.
"""

import argparse
import csv
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from inputs import best_settings, prepare, start_weights
from karmma.data.annotations import ClipTable
from karmma.data.clips import read_clip_table
from karmma.data.config import digest
from karmma.data.publish import publish_json, read_json
from karmma.data.runs import RunFolder
from karmma.data.sample import GENERATOR
from pages import write_pages
from plan import EPOCHS, FULL, LABELS, QUICK, SETS, Scale, Step, named, plan

HERE = Path(__file__).parent
LANES = 2  # steps side by side, each in one thread
# Sections of the settings that decide what a command ends with.
READS = {
    "extract": ("data", "extract"),
    "sweep": ("data", "teacher"),
    "train-teacher": ("data", "teacher"),
    "tokens": ("data", "student"),
    "labels": ("data",),
    "distill": ("data", "student"),
    "report": ("data",),
}
SCRIPTS = ("tokens", "labels")  # steps that no command of karmma does
COMMAND = "import sys; from karmma.cli import main; sys.argv[0] = 'karmma'; main()"


class Bench:
    """The steps of one data set: which are finished, and how one is run."""

    def __init__(self, name: str, scale: Scale, folder: Path, results: Path) -> None:
        """folder: where caches and runs are, with a karmma.toml.  results: where finished steps are kept."""
        self.name, self.scale, self.folder, self.results = name, scale, folder, results
        self.steps = named(plan(name, scale))
        models = (HERE / "models.toml").read_text()
        for what, epochs in zip(("TEACHER_EPOCHS", "STUDENT_EPOCHS"), EPOCHS[name], strict=True):
            models = models.replace(what, str(epochs))
        self.settings = (HERE / f"{name}.toml").read_text() + models

    def result(self, step: Step) -> dict[str, Any] | None:
        """Return what a finished step is known by, None if it was not run from what the plan says now."""
        path = self.results / f"{step.name}.json"
        found = read_json(path) if path.exists() else None
        return found if found and found["made_from"] == self.made_from(step) else None

    def made_from(self, step: Step) -> str:
        """Return a digest of what a step is run from: clips, settings, its command, and the steps it reads from.

        Code is no part of it: whoever changes what it computes deletes the results that it changes.
        """
        read = {section: tomllib.loads(self.settings)[section] for section in READS[step.words[0]]}
        clips = [self.scale.keep_every] if self.name == "grid" else [self.scale.n_sample, GENERATOR]
        clips += [self.scale.n_uncached, self.scale.n_few] if step.name in ("uncached", "few") else []
        return digest([clips, read, *step.words, *(self.made_from(self.steps[name]) for name in step.after)])

    def pending(self, pattern: str = "*") -> list[Step]:
        """Return the steps to run: those without a result, and those whose files such a step needs but lacks.

        pattern: of the names of the former, as of files.
        """
        wanted: set[str] = set()
        for step in reversed(self.steps.values()):
            if step.name in wanted or (fnmatch(step.name, pattern) and self.result(step) is None):
                wanted |= {step.name, *(name for name in step.after if not self._is_there(self.steps[name]))}
        return [step for step in self.steps.values() if step.name in wanted]

    def stale(self) -> list[str]:
        """Return the steps whose kept result is of other settings, clips or commands than the plan's."""
        kept = [step for step in self.steps.values() if (self.results / f"{step.name}.json").exists()]
        return [step.name for step in kept if self.result(step) is None]

    def _is_there(self, step: Step) -> bool:
        """Say whether what later steps need of this one is there; weights that are kept are those of their result."""
        return self.mark(step).exists() and (not step.starts or self.result(step) is not None)

    def mark(self, step: Step) -> Path:
        """Return the file that says: what later steps need of this one is there.

        Weights to start from are kept with the results, as a gone cache would have to be made again for them.
        """
        return self.results / f"{step.name}.safetensors" if step.starts else self.folder / "done" / self._own(step)

    def _own(self, step: Step) -> str:
        return f"{step.name}-{self.made_from(step)[:8]}"

    def _run(self, step: Step) -> Path:
        """Return the only run that a step left; raises SystemExit if there are several."""
        runs = [*(self.folder / "runs" / self._own(step)).iterdir()]
        if len(runs) > 1:  # one was begun from weights, or beside a teacher, that have been made anew since
            raise SystemExit(f"{runs[0].parent}: {len(runs)} runs, expected one. Delete those that are not wanted.")
        return runs[0]

    def run(self, step: Step) -> None:
        """Run a step and keep its result; raises SystemExit if the command fails, or ends otherwise than before.

        A sweep is not repeated: what it chose is in its result.
        """
        if step.name != "sweep" or self.result(step) is None:
            self._keep(step)
        self._hand_on(step)

    def _keep(self, step: Step) -> None:
        before, runs = self.result(step), f"runs/{self._own(step)}"
        words = [self._filled(word) for word in step.words]
        if step.trains or step.name == "sweep":
            words += ["--runs", runs]
        is_continued = (self.folder / runs).exists()
        if step.trains and is_continued:
            words += ["--resume"]
        if step.name in ("uncached", "few"):  # what is measured is an extraction from nothing
            shutil.rmtree(self.folder / step.name, ignore_errors=True)
        is_continued |= step.name == "extract" and (self.folder / "cache").exists()
        found = {"step": step.name, "made_from": self.made_from(step), "command": " ".join(step.words)}
        found["machine"] = _machine()
        if is_continued:  # so that nobody takes the seconds of its last part for all of it
            found["continued"] = True
        found |= self._karmma(step.name, words)
        if step.trains:
            found |= self._kept(step)
        found |= self._about(step)
        if before is None:
            publish_json(self.results / f"{step.name}.json", found)
        elif before.get("evaluation", {}).get("rows") != found.get("evaluation", {}).get("rows"):
            raise SystemExit(
                f"{self.name}/{step.name}: ended with other accuracies than the result kept, which was made on "
                f"{before.get('machine', 'a machine not named')}, this on {found['machine']}. Delete the results of "
                "this step and of those after it to have them all of one machine."
            )

    def _filled(self, word: str) -> str:
        if word.startswith("{run:"):
            return str(self._run(self.steps[word[5:-1]]))
        if word == "{teacher}":
            return read_json(self._run(self.steps["teacher"]) / "result.json")["teacher"]
        return word

    def _karmma(self, name: str, words: Sequence[str]) -> dict[str, Any]:
        """Run a command; return its seconds and the most memory it held in bytes."""
        log = self.folder / "logs" / f"{name}.log"
        log.parent.mkdir(exist_ok=True)
        start = time.monotonic()
        with open(log, "a", encoding="utf-8") as said:
            process = subprocess.Popen(
                [sys.executable, *_program(words)], cwd=self.folder, stdout=said, stderr=subprocess.STDOUT
            )
            _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            last = log.read_text(encoding="utf-8").strip().rpartition("\n")[2]
            raise SystemExit(f"karmma {' '.join(words)}: exit code {process.returncode}: {last} (all in {log})")
        return {"seconds": round(time.monotonic() - start, 1), "peak_bytes": used.ru_maxrss * 1024}

    def _kept(self, step: Step) -> dict[str, Any]:
        """Return a run's config, log and result, and its evaluation on test."""
        run = RunFolder.open(self._run(step))
        self._karmma(f"{step.name}-evaluate", ["evaluate", str(run.path)])
        evaluation = read_json(run.path / "evaluation/test.json")
        return {"config": run.config, "result": run.result, "log": run.metrics(), "evaluation": evaluation}

    def _about(self, step: Step) -> dict[str, Any]:
        """Return what else is to be known of a step: how many clips or trials, or what models cost."""
        if step.name == "extract":
            return {"clips": Counter(self._table(tomllib.loads(self.settings)["data"]["table"]).split.tolist())}
        if step.name in ("uncached", "few"):
            return {"clips": self._table(f"{step.name}.csv").n_clips}
        if step.name == "sweep":
            best = tomllib.loads((self._run(step) / "best.toml").read_text(encoding="utf-8"))["teacher"]
            chosen = {name: best[name] for name, equals, _ in (word.partition("=") for word in step.words) if equals}
            with open(self._run(step) / "trials.csv", newline="", encoding="utf-8") as file:
                tried = list(csv.DictReader(file))
            return {"trials": self.scale.n_trials, "epochs": best["epochs"], "chosen": chosen, "tried": tried}
        if step.name == "efficiency":
            return {"models": read_json(self.folder / "efficiency/efficiency.json")}
        if step.name == "labels":
            return {"heads": read_json(self.folder / LABELS)}
        return {}

    def _table(self, name: str) -> ClipTable:
        data = tomllib.loads(self.settings)["data"]
        return read_clip_table(self.folder / name, tuple(data["heads"]))

    def _hand_on(self, step: Step) -> None:
        """Put what later steps need where they look for it, and say that it is there."""
        if step.name == "sweep":
            best_settings(self.folder, read_json(self.results / "sweep.json"))
        if step.starts:
            start_weights(self._run(step), self.mark(step))
        self.mark(step).parent.mkdir(exist_ok=True)
        self.mark(step).touch()


def _machine() -> str:
    """Name what rounding depends on: other instructions or another torch sum up in another order."""
    about = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = next((line.partition(": ")[2] for line in about.splitlines() if line.startswith("model name")), "a CPU")
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}), torch {torch.__version__}"


def _program(words: Sequence[str]) -> list[str]:
    return [str(HERE / f"{words[0]}.py"), *words[1:]] if words[0] in SCRIPTS else ["-c", COMMAND, *words]


def run_all(waiting: list[tuple[Bench, Step]]) -> None:
    """Run steps as soon as those before them are through, so many side by side as there are lanes."""
    n_all, running, start = len(waiting), {}, time.monotonic()
    with ThreadPoolExecutor(LANES) as pool:
        while waiting or running:
            for bench, step in list(waiting):
                busy = sum(LANES if other.alone else 1 for _, other in running.values())
                if _blocked(bench, step, [*waiting, *running.values()]):
                    continue
                if busy + (LANES if step.alone else 1) > LANES:
                    break
                waiting.remove((bench, step))
                running[pool.submit(bench.run, step)] = (bench, step)
                print(f"{_clock()} {bench.name}/{step.name} begins", flush=True)
            over, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in over:
                bench, step = running.pop(future)
                if future.exception():  # said at once: the step beside it is waited for, it may take long
                    print(f"{_clock()} {bench.name}/{step.name} failed", flush=True)
                future.result()
                n_done = n_all - len(waiting) - len(running)
                left = (time.monotonic() - start) / n_done * (n_all - n_done) / 3600
                said = f"{n_done} of {n_all}, about {left:.1f} h left if the others are like these"
                print(f"{_clock()} {bench.name}/{step.name} is through, {said}", flush=True)


def _blocked(bench: Bench, step: Step, unfinished: Sequence[tuple[Bench, Step]]) -> bool:
    return any(bench is other and before.name in step.after for other, before in unfinished)


def _clock() -> str:
    return time.strftime("%H:%M:%S")


def main() -> None:
    """Prepare the inputs, run what is pending, write the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="all of it, small: half an hour")
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("KARMMA_SHARED", "../shared")))
    parser.add_argument("--folder", type=Path, help="where caches and runs are (default: reproduce)")
    parser.add_argument("--only", choices=SETS, action="append", help="one data set of the two")
    parser.add_argument("--steps", default="*", help="those of this name alone, such as 'karmma-*'")
    asked = parser.parse_args()
    scale = QUICK if asked.quick else FULL
    folder = (asked.folder or Path("reproduce-quick" if asked.quick else "reproduce")).resolve()
    results = folder / "results" if asked.quick else HERE / "results"
    benches = [Bench(name, scale, folder / name, results / name) for name in asked.only or SETS]
    for bench in benches:
        prepare(bench.name, bench.settings, bench.folder, asked.shared.resolve(), bench.results, scale)
    try:
        run_all([(bench, step) for bench in benches for step in bench.pending(asked.steps)])
    except KeyboardInterrupt:
        sys.exit("Stopped. What is finished is kept; the same command goes on.")
    for bench in benches:
        if bench.stale():
            print(f"{bench.name}: in the tables, but of other settings: {', '.join(bench.stale())}. Run these too.")
    write_pages(results, folder if asked.quick else HERE.parents[1] / "docs")


if __name__ == "__main__":
    main()
