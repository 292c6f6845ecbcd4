"""What tests in every room share: the real clips, where they are to be had."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

BESIDE = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real clips and weights; without it a test is skipped, or fails if KARMMA_SHARED is set."""
    named = os.environ.get("KARMMA_SHARED")
    folder = Path(named) if named else BESIDE
    if folder.is_dir():
        return folder.resolve()
    if named:
        pytest.fail(f"KARMMA_SHARED={named}: no such folder")
    pytest.skip("needs the folder ../shared")


@pytest.fixture(scope="session")
def object_store() -> Iterator[str]:
    """An S3 server on loopback; returns its address, which the environment names too, for child processes."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    found = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in found}
    os.environ.update(found)
    yield found["AWS_ENDPOINT_URL"]
    server.stop()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


@pytest.fixture
def bucket(object_store: str) -> str:
    """The address of a new bucket of the server."""
    import s3fs

    name = f"bucket-{uuid4().hex[:12]}"
    s3fs.S3FileSystem().mkdir(name)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def make_student(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that writes a finished run of a tiny student of video, sound and boxes, as if trained."""
    import torch
    from karmma.data.config import PLACES, DataConfig
    from karmma.data.runs import RunFolder
    from karmma.distill.config import StudentConfig
    from karmma.distill.stage import NOT_DECISIVE
    from karmma.distill.student import build_student

    torch.set_num_threads(1)  # reader processes share the cores
    data = DataConfig(
        modalities=("video", "audio", "detections"), frames=4, size=32, max_boxes=3, audio_segment_s=0.256,
        audio_hop=128, audio_mels=24, audio_steps=32,
    )  # fmt: skip
    config = StudentConfig(
        video={"name": "swin3d_micro", "weights": "none"}, flow={"name": "swin3d_micro", "weights": "none"},
        audio={"name": "ast_micro", "weights": "none"},
        detections={"name": "stlt_micro", "weights": "none"}, theta=9, embed_dim=16, ffn_dim=16, n_attention_heads=2,
    )  # fmt: skip
    classes = {"verb": ["lift", "lower", "pull", "push"], "noun": ["ball", "box", "cross", "kite", "ring", "tent"]}

    def make(folder: Path | None = None, **changes: object) -> Path:
        seen = data.model_copy(update=changes.pop("data", {}))
        names = changes.pop("classes", classes)
        student = build_student(seen, config, {head: len(known) for head, known in names.items()})
        with torch.no_grad():  # clear-cut answers, so that one clip's cannot pass for another's
            for parameter in student.fusion.mlp.parameters():
                parameter.mul_(4)
        run = RunFolder((folder or tmp_path_factory.mktemp("runs")) / "student-tiny")
        described = {"kind": "student", "classes": names, "clips": "none"} | changes
        described["settings"] = config.model_dump(mode="json", exclude=NOT_DECISIVE)
        described["data"] = seen.model_dump(mode="json", exclude=PLACES)
        run.start(described)
        run.save_checkpoint("best", student.state_dict(), {})
        run.finish({"epoch": 1})
        return run.path

    return make


@pytest.fixture(scope="session")
def student_run(make_student: Callable[..., Path]) -> Path:
    """A finished run of a tiny student; nobody writes into it."""
    return make_student()


@pytest.fixture
def write_student_run(tmp_path: Path) -> Callable[..., Any]:
    """Write a finished run as distill leaves it, of an untrained student; returns its folder."""
    from karmma.data.config import PLACES
    from karmma.data.runs import RunFolder
    from karmma.distill.student import build_student

    def write(data: Any, config: Any, n_classes: dict[str, int], name: str = "student-made") -> RunFolder:
        run = RunFolder(tmp_path / "runs" / name)
        classes = {head: [f"{head} {at}" for at in range(n)] for head, n in n_classes.items()}
        described = {
            "kind": "student",
            "settings": config.model_dump(mode="json"),
            "data": data.model_dump(mode="json", exclude=PLACES),
            "inputs": {modality: {"preprocessing": 3, "frames": data.frames} for modality in config.modalities},
            "teacher": "none",
            "clips": "c" * 16,
            "classes": classes,
        }
        run.start(described)
        student = build_student(data, config, n_classes)
        run.save_checkpoint("best", student.state_dict(), {"epoch": 0})
        n_parameters = sum(p.numel() for p in student.parameters())
        val = {**dict.fromkeys(n_classes, 0.5), "action": None, "loss": 1.25}
        run.finish({"epoch": 0, "val": val, "parameters": n_parameters, "failed": {"clip 7": "not there"}})
        return run

    return write


@pytest.fixture
def give(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    """Return a function that gives a command in this process; it returns exit code, stdout and stderr."""
    from karmma import cli

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["karmma", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return run


@pytest.fixture
def left() -> Callable[[Path], Any]:
    """Return a function: what a finished run has left that must not differ, weights and records without times."""
    from karmma.data.runs import RunFolder

    def found(run: Path) -> Any:
        weights = {name: (run / f"{name}.safetensors").read_bytes() for name in ("best", "last")}
        records = RunFolder.open(run).metrics()
        for record in records:
            del record["clips_per_s"], record["waiting_share"]
        return weights, records

    return found


@pytest.fixture
def slowed(tmp_path: Path) -> dict[str, str]:
    """An environment in which a training step takes longer: one has to hit the middle of an epoch."""
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "sitecustomize.py").write_text(
        "import sys, time, importlib.abc\n"
        "class Slow(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'karmma.fuse.loop':\n"
        "            from karmma.fuse import training\n"
        "            step = training.Training.step\n"
        "            training.Training.step = lambda self, batch: (time.sleep(0.1), step(self, batch))[1]\n"
        "sys.meta_path.insert(0, Slow())\n"
    )
    return os.environ | {"PYTHONPATH": f"{tmp_path / 'slow'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
