"""What every command has: examples that can be given, --dry-run that does nothing, --json, --debug, completion."""

import fnmatch
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from karmma import cli
from karmma.data.sample import write_sample


def commands(group, above=()):
    """Yield the words of every command, and the command."""
    for name, command in group.commands.items():
        words = (*above, name)
        if hasattr(command, "commands"):
            yield from commands(command, words)
        else:
            yield words, command


COMMANDS = dict(commands(typer.main.get_command(cli.app)))


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_its_flags_and_examples_that_can_be_given(words):
    command = COMMANDS[words]
    options = {option for parameter in command.params for option in parameter.opts}
    assert options >= {"--json", "--dry-run", "--debug"}
    _, found, text = command.help.partition("Examples:")
    assert found
    examples = [shlex.split(line) for line in text.strip().splitlines()]
    assert examples
    for example in examples:
        given = example[example.index("karmma") + 1 :]
        assert tuple(given[: len(words)]) == words
        command.make_context("karmma", given[len(words) :])  # raises a usage error


SETTINGS = """
preset = "tiny"
[data]
table = "sample/clips.csv"
heads = ["verb"]
modalities = ["audio", "detections"]
[extract]
shard_rows = 8
[teacher]
epochs = 1
threads = 1
[student]
epochs = 1
threads = 1
"""
PIPELINE = ("extract", "train-teacher", "distill", "evaluate")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of 24 sample clips, of their settings, and of all that came of them."""
    folder = tmp_path_factory.mktemp("trained")
    write_sample(folder / "sample", n_clips=24)
    (folder / "karmma.toml").write_text(SETTINGS)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        for command in PIPELINE:
            assert not cli.app([command], standalone_mode=False)
        assert not cli.app(["cache", "export", "tokens.h5"], standalone_mode=False)
    return folder


@pytest.fixture
def here(trained, tmp_path, monkeypatch):
    """A copy of that folder as the working folder."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# What each command is given beside --dry-run, and what it then says that it would do.
ASKED = {
    ("extract",): ((), "Nothing to do: the cache is complete"),
    ("train-teacher",): (("--max-lr", "0.002"), "Would train runs/teacher-"),
    ("distill",): (("--variant", "delta"), "Would train runs/student-"),
    ("evaluate",): (("--split", "val"), "Would evaluate runs/student-"),
    ("report",): ((), "Would write runs/student-"),
    ("predict",): (("sample/videos/clip_0001.mp4",), "Would predict 1 clips with runs/student-"),
    ("app",): ((), "Would serve runs/student-"),
    ("export",): ((), "Would export runs/student-"),
    ("sweep",): (("max_lr=1e-4,1e-3",), "Would train 20 teachers that differ in max_lr in runs/sweep-"),
    ("check",): ((), "Would open the files of 24 clips"),
    ("init",): (("sample", "--output", "mine.toml"), "Would write mine.toml"),
    ("doctor",): ((), "Would look at the environment, and at the clips of "),
    ("demo",): ((), "Would run extract, train-teacher, distill, evaluate, report on the sample data"),
    ("cache", "info"): ((), "Would list the stores of cache"),
    ("cache", "verify"): ((), "Would read 6 shards and all logits of cache"),
    ("cache", "merge"): (("cache", "--cache", "other"), "Would take over into other what it lacks of cache (3 stores)"),
    ("cache", "adopt"): (("AUDIO",), "Would make 16 clips anew and hold tokens AUDIO"),
    ("cache", "prune"): (("--runs", "sample"), "Would remove 3 stores of cache"),
    ("cache", "export"): (("t.h5",), "Would write audio, detections of cache to t.h5"),
    ("cache", "import"): (("tokens.h5", "--cache", "other"), "Would take audio, detections of tokens.h5 into other"),
}


def test_every_command_is_asked():
    assert {*ASKED} == {*COMMANDS}


@pytest.mark.parametrize("words", ASKED, ids=" ".join)
def test_dry_run_says_what_would_be_done_and_writes_nothing(here, give, words):
    options, says = ASKED[words]
    if options == ("AUDIO",):
        (store,) = (here / "cache/tokens/audio").glob("*.zarr")
        options, says = (store.stem,), says.replace("AUDIO", store.stem)
    before = files(here)
    code, out, err = give(*words, *options, "--dry-run", "--json")
    assert code == 0, err
    said = json.loads(out)
    assert said["dry_run"] is True
    assert said["would"].startswith(says)
    assert "(--dry-run: nothing was done)" in err
    assert files(here) == before


def test_dry_run_of_an_extraction_counts_what_is_left(here, give):
    def due(*options):
        return json.loads(give("extract", "--dry-run", "--json", *options)[1])["due"]

    assert due("--cache", "none") == {"audio": 24, "detections": 24}
    next(Path("cache").glob("receipts/tokens/audio/*/view0/1.json")).unlink()
    assert due() == {"audio": 8, "detections": 0}
    assert due("--part", "1/3") == {"audio": 0, "detections": 0}
    code, out, _ = give("extract", "--json")
    assert code == 0
    assert json.loads(out)["n_written"] == 8


ANSWERS = {
    ("extract",): lambda said: said["counts"]["detections"]["failed"] == 0,
    ("train-teacher",): lambda said: said["was_there"] and said["logits"].startswith("cache/logits/"),
    ("distill",): lambda said: said["was_there"] and said["run"].startswith("runs/student-"),
    ("evaluate",): lambda said: said["runs"][0]["evaluation"]["split"] == "test",
    ("check",): lambda said: said["clips"] == {"train": 15, "val": 3, "test": 6},
    ("cache", "info"): lambda said: said["clips"] == 24,
    ("cache", "verify"): lambda said: said == {"cache": "cache", "shards": 6, "damage": [], "logits": []},
    ("cache", "prune"): lambda said: said["unused"] == [],
}


@pytest.mark.parametrize("words", ANSWERS, ids=" ".join)
def test_json_is_one_value_and_all_that_stdout_gets(here, give, words):
    code, out, err = give(*words, "--json")
    assert code == 0, err
    assert ANSWERS[words](json.loads(out))
    assert "┃" not in out
    assert give(*words)[1] != out  # tables, or nothing, for people


# What is given anew, and how the last line for people goes: what was written, and what comes next.
LAST = {
    ("extract",): ((), "Next: karmma train-teacher --cache cache"),
    ("train-teacher",): ((), "Wrote runs/teacher-* and cache/logits/*. Next: karmma distill"),
    ("distill",): ((), "Wrote runs/student-*. Next: karmma evaluate runs/student-*"),
    ("evaluate",): ((), "Next: karmma report runs/student-*"),
    ("report",): ((), "Wrote runs/student-*/evaluation/test.html. Next: open it in a browser, or *"),
    ("check",): ((), "Next: karmma extract"),
    ("cache", "export"): (("t.h5",), "Wrote t.h5: * of 24 clips. Next, *: karmma cache import t.h5"),
    ("cache", "import"): (("tokens.h5", "--cache", "o"), "detections: 24 rows are now tokens *. Next: *"),
    ("cache", "merge"): (("cache", "--cache", "o"), "Wrote o. Next: karmma train-teacher --cache o"),
    ("sweep",): (("max_lr=1e-4,1e-3", "--trials", "1"), "Wrote runs/sweep-*/best.toml. Next: *"),
}


@pytest.mark.parametrize(
    "words",
    [pytest.param(words, marks=[pytest.mark.slow] * (words == ("sweep",)), id=" ".join(words)) for words in LAST],
)
def test_last_line_names_what_was_written_and_what_comes_next(here, give, words):
    options, says = LAST[words]
    code, _, err = give(*words, *options)
    assert code == 0, err
    assert fnmatch.fnmatchcase(err.strip().splitlines()[-1], says), err


def test_exit_code_is_the_same_with_json(here, give):
    shard = next(Path("cache").glob("tokens/audio/*/tokens/c/0/0/0/0"))
    shard.write_bytes(b"x" + shard.read_bytes()[1:])
    code, out, _ = give("cache", "verify", "--json")
    assert code == 4
    (damage,) = json.loads(out)["damage"]
    assert damage["file"] == str(shard)


@pytest.mark.parametrize("words", [("export", "TEACHER"), ("app", "TEACHER"), ("cache", "adopt", "1a2b3c4d5e6f7081")])
def test_dry_run_promises_nothing_that_is_refused(here, give, words):
    (teacher,) = (here / "runs").glob("teacher-*")
    words = [str(teacher) if word == "TEACHER" else word for word in words]
    (dry_code, _, dry), (code, _, err) = give(*words, "--dry-run"), give(*words)
    assert (dry_code, code) == (1, 1)
    assert dry.strip().splitlines()[-1] == err.strip().splitlines()[-1]


def test_error_of_the_users_has_a_traceback_with_debug_alone(tmp_path, monkeypatch, give):
    monkeypatch.chdir(tmp_path)
    for more, n_tracebacks in ((), 0), (("--debug",), 1):
        code, _, err = give("extract", "--table", "none.csv", *more)
        assert code == 1
        assert err.count("Traceback (most recent call last)") == n_tracebacks
        assert err.strip().splitlines()[-1].startswith("TableError: none.csv: no such clip table")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (("ext",), ["extract"]),
        (("distill", "--preset", "t"), ["tiny"]),
        (("distill", "--missing", "B.2"), ["B.2"]),
        (("extract", "--modality", "f"), ["flow"]),
        (("cache", "ver"), ["verify"]),
        (("init", "e"), ["epic"]),
        (("init", "cl"), ["clips/"]),
    ],
)
def test_shell_completes_commands_options_and_their_values(typed, offered, tmp_path, monkeypatch):
    (tmp_path / "clips").mkdir()
    monkeypatch.chdir(tmp_path)
    line = {"COMP_WORDS": " ".join(("karmma", *typed)), "COMP_CWORD": str(len(typed))}
    asked = {"_KARMMA_COMPLETE": "complete_bash", **line}
    code = "import sys; sys.argv[0] = 'karmma'; from karmma.cli import main; main()"
    found = subprocess.run([sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True)
    assert found.stdout.split() == offered
