"""`karmma app`: a page in the browser on which a student is tried."""

import signal
import threading
import webbrowser
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from .cli_options import Settings, tell, with_options
from .data.runs import RunFolder, latest_run

ENDS = (signal.SIGINT, signal.SIGTERM)


@with_options("data.runs", "data.flow_weights", needs_clips=False)
def app(
    run: Annotated[Path | None, typer.Argument(help="run folder of a student (default: the latest)")] = None,
    *,
    settings: Settings,
    host: Annotated[str, typer.Option(help="address to serve at; by default this machine alone can reach it")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=1, max=65535, help="port to serve at")] = 7860,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="open the page in a browser")] = True,
    device: Annotated[str, typer.Option(help="torch device")] = "auto",
) -> None:
    """Serve a page on which one drops a clip, switches modalities, and sees predictions and what the student is given.

    It needs no network, and Ctrl-C ends it:

    karmma app                                  the latest student

    karmma app runs/student-0123abcd --port 8000 --no-browser
    """
    folder = RunFolder.open(run) if run else latest_run(settings.data.runs, "student")
    from .distill.app import App

    tell(f"Run: {folder.path}")
    ended = threading.Event()

    def end(_signal: int, _frame: FrameType | None) -> None:
        ended.set()

    before = {}
    try:
        with App(host, port) as served:
            from .distill.predictor import load

            address = served.show(load(folder.path, device, settings.data.flow_weights), folder.path.name)
            # Until all is closed: whoever presses Ctrl-C twice is not to leave files behind.
            before = {each: signal.signal(each, end) for each in ENDS}
            typer.echo(f"{address} is up. Ctrl-C ends it.")
            if browser:
                webbrowser.open(address)
            ended.wait()
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    tell("Closed. What was uploaded is deleted.")
