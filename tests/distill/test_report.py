"""The page about runs: complete, self-contained, and at ease on a phone and on paper."""

import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from karmma.data.clips import read_clip_table
from karmma.data.config import DataConfig
from karmma.data.modality import subsets
from karmma.data.runs import RunFolder
from karmma.distill.blueprint import student_blueprint
from karmma.distill.config import StudentConfig
from karmma.distill.efficiency import count
from karmma.distill.examples import examples
from karmma.distill.plots import class_bars, subset_bars
from karmma.distill.report import Reported, write_report
from karmma.distill.results import Asked, ClassRow, Evaluation, SubsetRow
from karmma.distill.scores import judge
from karmma.distill.subsets import Predictions
from karmma.fuse.metrics import wilson_bounds

M = ("video", "audio", "detections")
DATA = DataConfig(
    modalities=M, frames=4, size=32, max_boxes=3, audio_segment_s=0.256, audio_hop=128, audio_mels=24, audio_steps=32
)
CONFIG = StudentConfig(
    video={"name": "swin3d_micro", "weights": "none"}, audio={"name": "ast_micro", "weights": "none"},
    detections={"name": "stlt_micro", "weights": "none"}, theta=9, embed_dim=16, ffn_dim=16, n_attention_heads=2,
)  # fmt: skip
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def reported(sample, tmp_path_factory):
    """Two runs of other seeds and one without teacher, with made-up predictions."""
    folder, data, table = tmp_path_factory.mktemp("runs"), DATA, read_clip_table(sample / "clips.csv", DATA.heads)
    out, classes = [], {head: list(table.classes(head)) for head in data.heads}
    rows = table.rows("test")
    for at, (teacher, seed) in enumerate([("t" * 16, 0), ("t" * 16, 1), ("none", 0)]):
        run = RunFolder(folder / f"student-{at}")
        settings = CONFIG.model_copy(update={"seed": seed}).model_dump(mode="json")
        described = {"kind": "student", "teacher": teacher, "settings": settings, "classes": classes}
        run.start({**described, "data": data.model_dump(mode="json"), "inputs": {"video": {"frames": 4}}})
        for epoch in range(3):
            val = {"verb": 0.3, "noun": None, "action": 0.1 * epoch, "loss": 1.0}
            run.log({"epoch": epoch, "loss": 2.0 - epoch, "ce": 2.0, "kl": 0.1, "val": val})
        run.finish({"epoch": 2, "parameters": 1_234_567, "val": val, "failed": {}})
        draw = torch.Generator().manual_seed(at)
        sizes = {head: len(names) for head, names in classes.items()}
        logits = {s: {h: torch.randn(len(rows), n, generator=draw) for h, n in sizes.items()} for s in subsets(M)}
        found = Predictions(rows, np.ones((len(rows), 3), bool), logits, {"clip_x": "no <such> file"})
        evaluation, _ = judge(run, table, found, Asked("test", draws=2), "digest")
        cost = count(student_blueprint(data, CONFIG, sizes))
        out.append(Reported(run, evaluation, cost, examples(run, table, found)))
    return out


def test_page_of_one_run_has_every_part(reported, tmp_path):
    each = reported[0]
    write_report([each], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    for heading in (
        "Subsets of modalities", "Modalities missing at random", "What it costs", "Training", "Hardest classes",
        "Example clips", "Clips that could not be read whole", "Settings and identities",
    ):  # fmt: skip
        assert heading in page, heading
    row = each.evaluation.of("all")[0]
    for number in (row.accuracy["verb"], row.low["noun"], row.ece["action"]):
        assert f"{100 * number:.1f}" in page
    assert "1.23 M" in page
    assert "no &lt;such&gt; file" in page
    assert page.count("<svg") == 4 + sum(map(bool, each.hardest.values()))
    for head in ("verb", "noun"):
        best = max(row.accuracy[head] for row in each.evaluation.of("all"))
        assert re.search(rf'class="best">\s*{100 * best:.1f}', page)
    assert page.count("data:image/jpeg;base64,") == len(each.examples) > 0
    assert '"view_seed": 0' in page


def test_page_of_several_runs_puts_them_side_by_side(reported, tmp_path):
    write_report(reported, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "KARMMA_S" in page
    assert "2 seeds" in page
    assert "average rank" in page
    for each in reported:
        assert each.run.path.name in page


def test_page_of_two_seeds_shows_their_mean(reported, tmp_path):
    write_report(reported[:2], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    rows = [each.evaluation.of("all")[0].accuracy["action"] for each in reported[:2]]
    assert re.search(rf"<td>\s*{50 * sum(rows):.1f}\s*<small class=\"quiet\">±", page)
    assert "average rank" not in page


def test_names_with_dollar_signs_and_perfect_accuracy_are_drawn():
    rows = [ClassRow("verb", r"a $\frac$ b", 20, {"V": 1.0}), ClassRow("verb", "a$_{$b", 3, {"V": 0.0})]
    assert "<svg" in class_bars(rows, "V")
    whole = {"action": 1.0}
    low, high = ({"action": bound} for bound in wilson_bounds(20, 20))
    row = SubsetRow("all", "V", 20, 20, whole, low, high, whole, whole)
    perfect = Evaluation("r$1$", "KARMMA_V", "v", "test", 1, 5, "c", {"action": None}, (row,), (), (), {}, {}, "")
    assert "<svg" in subset_bars([perfect])


def test_page_needs_no_network_and_no_script(reported, tmp_path):
    write_report(reported, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(link.startswith(("data:", "#")) for link in links)
    assert "<script" not in page
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)


def test_same_runs_give_the_same_page(reported, tmp_path):
    for name in ("a.html", "b.html"):
        write_report(reported[:1], tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_examples_are_the_surest_right_and_wrong_ones(reported, table):
    found = reported[0].examples
    sure = [next(g for g in example.guesses if g.subset == "V+A+D") for example in found]
    right = [guess.is_right for guess in sure]
    assert right == sorted(right, reverse=True)
    wrong = [guess.sure for guess in sure if not guess.is_right]
    assert wrong == sorted(wrong, reverse=True)
    assert all(len(example.guesses) == 7 for example in found)
    labels = {str(clip_id): at for at, clip_id in enumerate(table.clip_ids)}
    for example in found:
        at = labels[example.clip_id]
        assert example.truth == tuple(table.arrow.column(head)[at].as_py() for head in ("verb", "noun"))


def test_clip_without_video_has_no_picture(reported, sample, tmp_path):
    each = reported[0]
    (tmp_path / "t.csv").write_text((sample / "clips.csv").read_text())  # whose videos are not beside it
    table = read_clip_table(tmp_path / "t.csv", DATA.heads)
    rows = table.rows("test")
    classes = each.run.config["classes"]
    logits = {s: {h: torch.ones(len(rows), len(c)) for h, c in classes.items()} for s in subsets(M)}
    found = examples(each.run, table, Predictions(rows, np.ones((len(rows), 3), bool), logits))
    assert {example.picture for example in found} == {""}


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("n_runs", [1, 3])
@pytest.mark.parametrize("width", [390, 1200])
def test_page_in_a_browser_fits_its_window_and_logs_nothing(reported, tmp_path, n_runs, width):
    write_report(reported[:n_runs], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    ask = (
        "<script>window.onload = () => { const root = document.documentElement; document.title = 'measured ' + "
        "root.scrollWidth + ' ' + root.clientWidth + ' ' + [...document.images].every(i => i.naturalWidth > 0) + ' ' + "
        "[...document.querySelectorAll('svg')].every(s => s.getBoundingClientRect().height > 50); }</script>"
    )
    (tmp_path / "m.html").write_text(page.replace("</body>", ask + "</body>"))
    done = browse(tmp_path, f"--window-size={width},2000", "--dump-dom", f"file://{tmp_path}/m.html")
    scroll, client, images, figures = re.search(r"<title>measured (\d+) (\d+) (\w+) (\w+)", done.stdout).groups()
    assert int(scroll) <= int(client)
    assert (images, figures) == ("true", "true")
    assert "CONSOLE" not in done.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_page_prints(reported, tmp_path):
    write_report(reported[:1], tmp_path / "r.html")
    browse(tmp_path, f"--print-to-pdf={tmp_path / 'r.pdf'}", f"file://{tmp_path}/r.html")
    pdf = (tmp_path / "r.pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 12


def browse(folder, *asked):
    """Run Chromium without a window; what pages log comes on stderr as CONSOLE."""
    quiet = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--virtual-time-budget=5000")
    command = [CHROMIUM, *quiet, "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", *asked]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done
