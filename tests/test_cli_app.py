"""`karmma app`: the real page in a real browser, with real clips, and what it must not give away."""

import base64
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import av
import cv2
import karmma
import numpy as np
import pytest
from karmma.data.footage import footage_clip
from karmma.data.raw import read_clip
from karmma.data.sample import write_sample
from karmma.data.views import draw_view
from karmma.distill import viewing
from karmma.tests.browsing import CHROMIUM, GIVE_UP_S, Browser

M = ("video", "flow", "audio", "detections")
# Class names are text, whatever templates and markup they look like.
CLASSES = {"verb": ["<i>lift</i>", "${1 + 1}", "{{ pull }}", "push"], "noun": ["ball", "box", "cross", "kite", "ring"]}
FILES = "#files input[type=file]"
SAID = """Object.fromEntries([...document.querySelectorAll('#answer .k-card')].map(card => [card.dataset.head,
    [...card.querySelectorAll('li')].map(row => [row.dataset.class, Number(row.dataset.prob)])]))"""
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


class Served:
    """The command, serving the page of a run in a process of its own."""

    def __init__(self, run: Path, home: Path, port: int) -> None:
        self.port = port
        command = [sys.executable, "-c", "from karmma.cli import main; main()", "app", run, "--no-browser"]
        self.temporary = home / "tmp"
        self.temporary.mkdir()
        self.process = subprocess.Popen(
            [*map(str, command), "--port", str(port)], cwd=home, text=True,
            env=os.environ | {"TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.first_line = self.process.stdout.readline()
        self.address = f"http://127.0.0.1:{self.port}/"

    def left(self) -> list[Path]:
        """The files that are anywhere in its temporary folder."""
        found = [Path(folder, name) for folder, _, names in os.walk(self.temporary) for name in names]
        return [path for path in found if path.suffix]  # Gradio's own empty files have none

    def ended(self) -> tuple[int, str, str]:
        """Press Ctrl-C twice; return the exit code and what it has said since."""
        for _ in range(2):
            self.process.send_signal(signal.SIGINT)
        out, err = self.process.communicate(timeout=GIVE_UP_S)
        return self.process.returncode, out, err


@pytest.fixture(scope="module")
def run(make_student):
    return make_student(classes=CLASSES, data={"modalities": M, "flow_size": 64, "flow_step_s": 0.0625})


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    write_sample(folder, n_clips=4)
    return folder


@pytest.fixture(scope="module")
def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def served(run, tmp_path_factory, free_port):
    command = Served(run, tmp_path_factory.mktemp("home"), free_port)
    yield command
    command.process.kill()
    command.process.communicate()


@pytest.fixture
def browser(served, tmp_path):
    with Browser(tmp_path / "profile") as one:
        one.open(served.address)
        one.until(f"document.querySelector('{FILES}') && document.querySelector('#answer .k-hint')")
        yield one
        elsewhere = [url for url in one.asked if not url.startswith((served.address, "data:", "about:"))]
        assert elsewhere == []
        assert one.said == []


@pytest.fixture(scope="module")
def predictor(run):
    return karmma.load(run, "cpu")


def is_on(browser, name):
    found = f"document.querySelector('#switch-{name} input')"
    return browser.ask(f"{found}.checked"), not browser.ask(f"{found}.disabled")


def switch(browser, name):
    browser.ask(f"document.querySelector('#switch-{name} input').click()")


def answered(browser, modalities):
    """Wait for the answer from these modalities, and return it: (class, probability) by head, likeliest first."""
    browser.until(f"document.querySelector('#answer [data-modalities=\"{','.join(modalities)}\"]')")
    return browser.ask(SAID)


def require_same(found, said):
    wanted = {head: said.top(head, 5) for head in said}
    wanted = {"action": [(" + ".join(names), prob) for names, prob in said.actions(5)]} | wanted
    assert list(found) == list(wanted)
    for head, rows in wanted.items():
        assert [name for name, _ in found[head]] == [name for name, _ in rows]
        assert [prob for _, prob in found[head]] == pytest.approx([prob for _, prob in rows], abs=1e-6)


def pictures(browser, selector):
    """Return the pictures of a part of the page, pixel by pixel, RGB."""
    assert browser.until(f"[...document.querySelectorAll('{selector}')].every(one => one.naturalWidth > 0)")
    found = browser.ask(f"[...document.querySelectorAll('{selector}')].map(one => one.src)")
    raw = [np.frombuffer(base64.b64decode(each.partition(",")[2]), np.uint8) for each in found]
    return [cv2.cvtColor(cv2.imdecode(each, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB) for each in raw]


@needs_browser
def test_page_says_what_python_says_of_every_choice_of_modalities_and_reads_the_clip_once(
    served, browser, sample, predictor
):
    film, boxes = sample / "videos/clip_0001.mp4", sample / "boxes/clip_0001.json"
    browser.upload(FILES, film, boxes)

    def said(*modalities):
        return predictor.predict(film, modalities, files={"detections": boxes})

    require_same(answered(browser, M), said(*M))
    assert [is_on(browser, name) for name in M] == [(True, True)] * 4
    for path in served.left():  # it cannot be read a second time
        path.unlink()
    switch(browser, "audio")
    require_same(answered(browser, ("video", "flow", "detections")), said("video", "flow", "detections"))
    assert browser.ask("document.querySelector('#answer .k-bar b') !== null")
    assert browser.until("getComputedStyle(document.querySelector('#given-audio .k-body')).display === 'none'")
    switch(browser, "video")
    switch(browser, "flow")
    require_same(answered(browser, ("detections",)), said("detections"))
    switch(browser, "detections")
    assert "Every modality is switched off" in browser.until("document.querySelector('#answer .k-error')?.innerText")
    for name in M:
        switch(browser, name)
    require_same(answered(browser, M), said(*M))


@needs_browser
def test_pictures_are_what_the_student_is_given(browser, sample, predictor):
    film, boxes = sample / "videos/clip_0001.mp4", sample / "boxes/clip_0001.json"
    browser.upload(FILES, film, boxes)
    answered(browser, M)
    data, clip = predictor.data, footage_clip(film, predictor.data, files={"detections": boxes})
    given = {name: each.array for name, each in read_clip(clip, draw_view("", 0, data), M, data).items()}
    shown = pictures(browser, "#given-video .k-strip img")
    assert np.array_equal(np.stack(shown).transpose(0, 3, 1, 2), given["video"])
    channels = pictures(browser, "#given-flow details img")
    assert np.array_equal(np.stack(channels)[..., 0].reshape(3, 4, 32, 32).swapaxes(0, 1), given["flow"])
    colours = pictures(browser, "#given-flow .k-body > .k-strip img")
    assert np.array_equal(colours, viewing.flow_colours(given["flow"], viewing.fast(given["flow"])))
    heard = pictures(browser, "#given-audio img")
    assert sum(each.shape[1] for each in heard) <= 4 * data.audio_steps
    assert all(each.shape[0] == data.audio_mels and each.std() > 0 for each in heard)
    drawn = browser.ask("[...document.querySelectorAll('#given-detections svg')].map(one => one.children.length)")
    assert drawn == [int((rows[:, 5] > 0).sum()) for rows in given["detections"]]
    times = browser.ask("[...document.querySelectorAll('#given-video figcaption')].map(one => one.innerText)")
    assert times == ["0.19 s", "0.56 s", "0.94 s", "1.31 s"]


@needs_browser
@pytest.mark.parametrize("width", [400, 1280])
def test_page_fits_its_window(browser, sample, width):
    browser.resize(width, 900)
    browser.upload(FILES, sample / "videos/clip_0000.mp4", sample / "boxes/clip_0000.json")
    answered(browser, M)
    wide, window = browser.ask("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert wide <= window
    beside = browser.ask(
        "document.querySelector('#answer').getBoundingClientRect().top < "
        "document.querySelector('#switch-video').getBoundingClientRect().top"
    )
    assert beside == (width > 1000)


@needs_browser
def test_switch_of_what_a_clip_lacks_is_off_and_says_why(browser, sample, predictor, tmp_path):
    silent = tmp_path / "silent.mkv"
    with av.open(str(sample / "videos/clip_0002.mp4")) as film, av.open(str(silent), "w") as out:
        stream = out.add_stream_from_template(film.streams.video[0])
        for packet in film.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    browser.upload(FILES, silent)
    require_same(answered(browser, ("video", "flow")), predictor.predict(silent))
    assert [is_on(browser, name) for name in M] == [(True, True)] * 2 + [(False, False)] * 2
    assert "silent.mkv has no sound track" in browser.ask("document.querySelector('#switch-audio').innerText")
    assert "no boxes were given" in browser.ask("document.querySelector('#switch-detections').innerText")
    assert browser.ask("document.querySelector('#given-audio').innerText.trim()") == ""


@needs_browser
def test_damaged_file_gives_its_one_line_and_the_next_clip_is_none_the_worse(browser, sample, tmp_path):
    bad = tmp_path / "bad.mp4"
    bad.write_bytes((sample / "videos/clip_0001.mp4").read_bytes()[:900])
    browser.upload(FILES, bad)
    line = browser.until("document.querySelector('#answer .k-error')?.innerText")
    assert line.startswith("bad.mp4: video and flow and audio failed: not a media file")
    assert str(tmp_path.parent) not in line
    assert "Traceback" not in browser.ask("document.body.innerText")
    assert [is_on(browser, name) for name in M] == [(True, False)] * 4
    browser.ask("document.querySelector('#files button[aria-label=Clear]').click()")
    browser.until(f"document.querySelector('#answer .k-hint') && document.querySelector('{FILES}')")
    browser.upload(FILES, sample / "videos/clip_0001.mp4")
    answered(browser, ("video", "flow", "audio"))


@needs_browser
def test_real_clip_is_answered_as_in_python(browser, predictor, shared):
    clip = shared / "data/grid/clips/bbaf2n.mp4"
    browser.upload(FILES, clip)
    require_same(answered(browser, ("video", "flow", "audio")), predictor.predict(clip))


@needs_browser
def test_files_are_deleted_once_their_visitor_has_left(served, browser, sample):
    browser.upload(FILES, sample / "videos/clip_0003.mp4")
    browser.until("document.querySelector('#answer .k-answer')")
    assert {path.name for path in served.left()} == {"clip_0003.mp4"}
    browser.open("about:blank")
    give_up = time.monotonic() + GIVE_UP_S
    while served.left():
        assert time.monotonic() < give_up
        time.sleep(0.05)
    browser.ask("document.title")
    browser.said.clear()  # that a page which was left stops waiting for news is no error


@pytest.mark.parametrize(
    ("path", "host", "status"),
    [
        ("/", None, 200),
        ("/", "localhost:{port}", 200),
        ("/", "evil.example", 403),
        ("/", "evil.example:{port}", 403),
        ("/gradio_api/file={run}/config.json", None, 403),
        ("/gradio_api/file=/etc/hostname", None, 403),
        ("/gradio_api/file/etc/hostname", None, 403),
        ("/gradio_api/file=http://127.0.0.1:{port}/", None, 403),
        ("/gradio_api/proxy=http://127.0.0.1:{port}/", None, 403),
        ("/monitoring", None, 403),
    ],
)
def test_nothing_but_the_page_is_served(served, run, path, host, status):
    assert served.first_line == f"{served.address} is up. Ctrl-C ends it.\n"
    known = {"run": run, "port": served.port}
    asked = http.client.HTTPConnection("127.0.0.1", served.port, timeout=GIVE_UP_S)
    asked.request("GET", path.format(**known), headers={"Host": host.format(**known)} if host else {})
    answer = asked.getresponse()
    assert answer.status == status
    if status == 200:
        assert b"default-src 'self'" in answer.getheader("Content-Security-Policy").encode()
        page = answer.read().decode()
        assert str(run.parent) not in page
        assert "fonts.googleapis" not in page
    asked.close()


def test_only_this_machine_is_served(served):
    with open("/proc/net/tcp") if Path("/proc/net/tcp").exists() else pytest.skip("needs /proc") as file:
        local = [line.split()[1] for line in file.readlines()[1:] if line.split()[3] == "0A"]
    assert [where for where in local if where.endswith(f":{served.port:04X}")] == [f"0100007F:{served.port:04X}"]


def test_taken_port_is_one_line_before_anything_is_loaded(give, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        port = one.getsockname()[1]
        code, _, err = give("app", run, "--port", port)
    assert code == 1
    assert f"ConfigError: 127.0.0.1:{port}: nothing can be served there: Address already in use." in err
    code, _, err = give("app", run, "--host", "no.such.host.invalid")
    assert code == 1
    assert "ConfigError: no.such.host.invalid:7860: nothing can be served there" in err


def test_page_without_gradio_says_what_to_install(give, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    code, _, err = give("app", run, "--port", port)
    assert code == 1
    assert "InstallationError: The page needs gradio. Install it: pip install 'karmma[app]'." in err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["nowhere"], 1, "RunError: nowhere: no run here"),
        (["--port", "0"], 2, "--port"),
        (["--runs", "nowhere"], 1, "no finished student here"),
    ],
)
def test_what_cannot_be_served_is_one_clear_line(give, tmp_path, monkeypatch, words, code, said):
    monkeypatch.chdir(tmp_path)
    found, _, err = give("app", *words)
    assert found == code
    assert said in err
    assert "Traceback" not in err


# Last: it ends the page of all tests above.
def test_page_ends_with_exit_code_0_and_leaves_no_file(served, sample):
    (folder,) = served.temporary.glob("karmma-app-*")
    shutil.copy(sample / "videos/clip_0000.mp4", folder)
    code, out, err = served.ended()
    assert (code, out) == (0, "")
    assert err.splitlines()[-1] == "Closed. What was uploaded is deleted."
    assert "Traceback" not in err
    assert [*served.temporary.iterdir()] == []
