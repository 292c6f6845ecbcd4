"""The command line: options from config fields, exit codes, and one clear line for every error of the user's."""

import logging
import platform
import subprocess
import sys

import pytest
from karmma import cli, cli_options
from karmma.data.clips import read_clip_table
from karmma.data.sample import write_sample

TABLE = "clip_id,video,split,verb,noun\na,a.mp4,train,push,ball\nb,b.mp4,val,pull,box\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli_options, "err", cli_options.Console(stderr=True, highlight=False, width=200))
    return tmp_path


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("extract", "--table", "no.csv"), "TableError: no.csv: no such clip table"),
        (("extract", "--config", "no.toml"), "ConfigError: no.toml: no such settings file"),
        (("extract", "--table", "t.csv", "--preset", "tinny"), "Unknown preset 'tinny'. Did you mean 'tiny'?"),
        (("extract", "--table", "t.csv", "--modality", "flwo"), "Unknown modality 'flwo'. Did you mean 'flow'?"),
        (("extract", "--table", "t.csv", "--frames", "many"), "option: data.frames = 'many'"),
        (("extract", "--table", "t.csv", "--set", "extract.thetta=1"), "Did you mean 'theta'?"),
        (("extract", "--table", "empty.csv"), "no rows below the header"),
        (("extract", "--table", "t.csv", "--heads", "vreb"), "no column 'vreb'. Did you mean 'verb'?"),
        (("train-teacher", "--table", "t.csv", "--cache", "none"), "none: no cache here. Run karmma extract"),
        (("sweep", "--table", "t.csv"), "Nothing to vary. Name options and their values, such as max_lr=1e-4"),
        (("sweep", "max_lr", "--table", "t.csv"), "max_lr: expected option=values, each option once, such as max_lr"),
        (("sweep", "max_rl=1,2", "--table", "t.csv"), "'max_rl' is no option that decides a result. Did you mean"),
        (("sweep", "alpha=0,1", "--table", "t.csv", "--cache", "none"), "none: no cache here. Run karmma extract"),
        (("sweep", "alpha=0,1", "--table", "t.csv", "--sampler", "tpf"), "sweep.sampler = 'tpf'"),
        (("distill", "--table", "t.csv"), "cache: no cache here"),
        (("evaluate", "--table", "t.csv"), "runs: no finished student here. Run karmma distill"),
        (("evaluate", "none", "--table", "t.csv"), "none: no run here"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_error_is_one_clear_line_and_exit_code_1(here, give, args, said):
    (here / "t.csv").write_text(TABLE)
    (here / "empty.csv").write_text(TABLE.splitlines()[0] + "\n")
    code, _, err = give(*args)
    assert said in err
    assert code == 1
    assert len(err.strip().splitlines()) == 1


def test_unknown_option_is_wrong_usage(here, give):
    code, _, err = give("extract", "--thetta", "3")
    assert code == 2
    assert "No such option: --thetta" in err


def test_every_plain_field_is_an_option_and_help_names_its_source(here, give, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    for command, sections in {"extract": ("data", "extract"), "distill": ("data", "student")}.items():
        code, out, _ = give(command, "--help")
        assert code == 0
        for section in sections:
            for name, field in cli_options.SECTIONS[section].model_fields.items():
                if cli_options._is_plain(field.annotation) and name != "modalities":
                    assert "--" + name.replace("_", "-") in out, name
    assert "paper, sec. 4" in out


def test_without_settings_the_sample_data_is_used_and_said(here, give, monkeypatch, capsys):
    monkeypatch.setattr(cli_options, "write_sample", lambda folder, progress: write_sample(folder, n_clips=24))
    settings = cli_options.Settings(None, None, [], {}, needs_clips=True)
    assert "using the sample data in ./karmma-sample" in capsys.readouterr().err
    assert settings.data.table.name == "clips.csv"
    assert settings.data.frames == 8
    assert settings.table().n_clips == 24


def test_settings_file_in_the_working_folder_is_found_and_options_override_it(here):
    (here / "t.csv").write_text(TABLE)
    (here / "karmma.toml").write_text('preset = "tiny"\n[data]\ntable = "t.csv"\nframes = 4\n[student]\nepochs = 7\n')
    settings = cli_options.Settings(None, None, ["student.batch_size=3"], {"data": {"size": "32"}}, needs_clips=True)
    assert (settings.data.frames, settings.data.size) == (4, 32)
    assert (settings.student.epochs, settings.student.batch_size) == (7, 3)


def test_preset_option_wins_over_the_preset_of_the_file(here):
    (here / "t.csv").write_text(TABLE)
    (here / "karmma.toml").write_text('preset = "tiny"\n[data]\ntable = "t.csv"\n')
    assert cli_options.Settings(None, "paper", [], {}, needs_clips=True).data.frames == 32


def test_check_lists_every_bad_row_and_ends_with_exit_code_3(here, give):
    rows = [f"c{k},none{k}.mp4,train,push,ball" for k in range(12)]
    (here / "t.csv").write_text("\n".join([TABLE.splitlines()[0], *rows, "c0,b.mp4,val,pull,box"]) + "\n")
    code, out, err = give("check", "--table", "t.csv")
    assert code == 3
    assert len(out.strip().splitlines()) == 13
    assert "t.csv, line 14, c0: clip_id 'c0' is taken by line 2" in out
    assert "clip 12, c11: none11.mp4: no such file" in out
    assert "12 clips (12 train, 0 val, 0 test), 12 with something wrong" in err


def test_check_writes_the_table_as_read_and_it_reads_the_same(here, give):
    write_sample(here / "sample", n_clips=12)
    code, out, err = give("check", "--config", str(here / "sample/karmma.toml"), "--write", "as_read.csv")
    assert (code, out) == (0, "")
    assert "12 clips" in err
    as_read = ("check", "--table", "as_read.csv", "--media", str(here / "sample"))
    assert give(*as_read, "--write", "again.parquet")[:2] == (0, "")
    one, two = (read_clip_table(here / name, ("verb", "noun")) for name in ("sample/clips.csv", "again.parquet"))
    assert one.content_digest() == two.content_digest()
    code, _, err = give(*as_read, "--write", "x.xlsx")
    assert code == 1
    assert "x.xlsx: a clip table ends in .csv or .parquet" in err


def test_check_writes_only_the_clips_with_nothing_wrong_if_asked(here, give):
    write_sample(here / "sample", n_clips=12)
    lines = (here / "sample/clips.csv").read_text().splitlines()
    (here / "sample/videos/clip_0003.mp4").unlink()
    options = ("--config", str(here / "sample/karmma.toml"), "--write", "subset.csv", "--only-good")
    code, out, _ = give("check", *options)
    assert code == 3
    assert "clip_0003.mp4: no such file" in out
    written = read_clip_table(here / "subset.csv", ("verb", "noun"))
    assert [f"clip_{at:04d}" for at in range(12) if at != 3] == written.clip_ids.tolist()
    assert len(lines) == 13


FAULTS = """
import resource
import sys
import torch
from karmma import cli
if "keep" in sys.argv:
    cli.keep_freed_memory()
torch.ones(2**24)  # what is given back, or kept
first = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - first)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="memory of glibc alone")
def test_freed_memory_is_used_again_without_asking_the_system():
    def faults(*words):
        return int(subprocess.check_output([sys.executable, "-c", FAULTS, *words], text=True))

    # 64 MiB ten times are 163,840 pages of 4 KiB, or 320 of 2 MiB where the system gives such.
    given_back, kept = faults(), faults("keep")
    assert kept < given_back / 4


def test_log_line_of_a_module_is_shown_and_not_obeyed_by_the_terminal(capsys):
    cli.LogHandler().handle(logging.LogRecord("karmma", logging.WARNING, "", 0, "clip %s: [b]", ("\x1b[2Ja",), None))
    assert capsys.readouterr().err == "clip \\x1b[2Ja: [b]\n"


@pytest.mark.parametrize(
    ("words", "again"),
    [
        (("train-teacher", "--seed", "1"), "karmma train-teacher --seed 1 --resume"),
        (("distill", "--resume"), "karmma distill --resume"),
        (("evaluate", "distill"), "karmma evaluate distill"),
        (("demo",), "karmma demo"),
        (("extract", "--cache", "a b"), "karmma extract --cache 'a b'"),
    ],
)
def test_interrupted_command_names_the_one_that_goes_on(give, monkeypatch, words, again):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupted)
    code, _, err = give(*words)
    assert code == 130
    assert err == f"Interrupted. What was finished is kept. To go on: {again}\n"
