"""`karmma app`: a page in the browser on which a student is tried."""

import signal
import threading
import webbrowser
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from .cli_options import Answer, Settings, chosen_student, out, tell, with_options, would
from .data.runs import RunFolder

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
) -> Answer:
    """Serve a page on which one drops a clip, switches modalities, and sees predictions and what the student is given.

    It needs no network, and Ctrl-C ends it.

    \b
    Examples:
      karmma app
      karmma app runs/student-0123abcd --port 8000 --no-browser
    """
    folder = chosen_student(settings, run)
    if settings.dry_run:
        return would(f"Would serve {folder.path} at {host}, port {port}", run=folder.path)
    address = _serve_until_ended(folder, settings, (host, port), browser, device)
    tell("Closed. What was uploaded is deleted.")
    return Answer({"run": folder.path, "address": address})


def _serve_until_ended(
    folder: RunFolder, settings: Settings, where: tuple[str, int], browser: bool, device: str
) -> str:
    """Serve the page until a signal ends it; return its address."""
    from .distill.app import App

    ended = threading.Event()
    before: dict[signal.Signals, Any] = {}

    def end(_signal: int, _frame: FrameType | None) -> None:
        ended.set()

    try:
        with App(*where) as served:
            from .distill.predictor import load

            address = served.show(load(folder.path, device, settings.data.flow_weights), folder.path.name)
            # Until all is closed: whoever presses Ctrl-C twice is not to leave files behind.
            before |= {each: signal.signal(each, end) for each in ENDS}
            line = f"{address} is up. Ctrl-C ends it."
            tell(line) if out.quiet else out.print(line, soft_wrap=True, markup=False, highlight=False)
            if browser:
                webbrowser.open(address)
            ended.wait()
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    return address
