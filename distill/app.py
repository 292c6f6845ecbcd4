"""The page on which a student is tried, served to browsers: clips in, predictions and inputs out."""

import os
import socket
import tempfile
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ..data.errors import ConfigError, InstallationError, KarmmaError
from ..data.modality import LETTERS
from ..data.readers import ReaderPool
from . import page
from .page import Shown
from .predictor import Predictor
from .visits import Visits

if TYPE_CHECKING:
    from gradio import Request

LOOPBACK = ("127.0.0.1", "localhost", "::1")
BEGIN = "Drop a clip, and its classes appear here."
DROP = "A video or a sound file; with it, if you like, its boxes (.json) or its sound as files of their own."
# Whatever Gradio would do of its own accord: report its use, look for news, read settings of others.
QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_SHARE": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
# The browser is told to fetch nothing from anywhere else, whatever a part of Gradio may ask for.
POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'"
# Ways to files of this machine and to other machines. The page needs none: its pictures are part of it.
CLOSED = ("/gradio_api/file", "/gradio_api/proxy", "/gradio_api/stream", "/monitoring")
Messages = Callable[..., Awaitable[Any]]


class App:
    """A server of one page in a `with` block, one a process; nothing is served before `show`.

    Everything that visitors upload lies in a temporary folder, which is deleted in the end.  Entering raises
    ConfigError if the address is taken or not of this machine, InstallationError if Gradio is not installed.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 7860) -> None:
        self.host, self.port = host, port
        self._open = ExitStack()

    def __enter__(self) -> Self:
        _require_free(self.host, self.port)
        with ExitStack() as opened:
            folder = opened.enter_context(tempfile.TemporaryDirectory(prefix="karmma-app-"))
            os.environ.update(QUIET | {"GRADIO_TEMP_DIR": folder})  # read as Gradio is imported
            try:
                import gradio  # noqa: F401  # with what it reads as it is imported; later it is there
            except ImportError as error:
                raise InstallationError(
                    f"The page needs {error.name}. Install it: pip install 'karmma[app]'."
                ) from None
            self._open = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def show(self, predictor: Predictor, title: str) -> str:
        """Put up the page of a student, and return its address."""
        from gradio.themes import Default

        pool = self._open.enter_context(ReaderPool(1, predictor.data))
        blocks = build(predictor, title, Visits(predictor, pool))
        self._open.callback(partial(blocks.close, verbose=False))
        theme = Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
        host = f"[{self.host}]" if ":" in self.host else self.host
        guard = partial(_Guard, hosts=LOOPBACK if self.host in LOOPBACK else ())
        try:
            _, address, _ = blocks.launch(
                server_name=host, server_port=self.port, share=False, inbrowser=False, prevent_thread_lock=True,
                quiet=True, enable_monitoring=False, ssr_mode=False, pwa=False, mcp_server=False, footer_links=[],
                run_history=False, allowed_paths=[], app_kwargs={"middleware": [(guard, (), {})]},
                theme=theme, css=page.style(),
            )  # fmt: skip
        except OSError as error:
            raise _taken(self.host, self.port, error) from None
        return address


def _require_free(host: str, port: int) -> None:
    """Raise ConfigError if nothing can be served at an address: sooner than Gradio, which takes seconds to load."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(address)
    except OSError as error:
        raise _taken(host, port, error) from None


def _taken(host: str, port: int, error: OSError) -> ConfigError:
    said = error.strerror or str(error)
    return ConfigError(f"{host}:{port}: nothing can be served there: {said}. Choose another --port or --host.")


def build(predictor: Predictor, title: str, visits: Visits) -> Any:
    """Return the page: files and a switch a modality on the left, predictions beside, what is given below."""
    import gradio

    names, switches, given = predictor.modalities, [], []
    with gradio.Blocks(title=f"KARMMA: {title}", analytics_enabled=False) as blocks:
        gradio.HTML(page.head(title, names, predictor.classes))
        with gradio.Row():
            with gradio.Column(scale=2, min_width=300):
                files = gradio.File(file_count="multiple", label="Clip", height=150, elem_id="files")
                gradio.HTML(page.aside(DROP))
                for name in names:
                    label, place = _label(name), f"switch-{name}"
                    switches.append(gradio.Checkbox(True, label=label, elem_id=place, interactive=False))
            with gradio.Column(scale=3, min_width=300):
                answer = gradio.HTML(page.hint(BEGIN), elem_id="answer")
        for name in names:
            given.append(gradio.HTML("", elem_id=f"given-{name}", elem_classes=["k-input"]))
        _connect(blocks, visits, (files, switches, answer, given))
    return blocks


def _label(name: str) -> str:
    return f"{name} ({LETTERS[name]})"  # the bare names are keys of Gradio's own translations


def _connect(blocks: Any, visits: Visits, parts: tuple[Any, list[Any], Any, list[Any]]) -> None:
    """Have the parts of the page answer to what is dropped and switched."""
    import gradio

    files, switches, answer, given = parts
    names = visits.predictor.modalities

    def take(request: gradio.Request, paths: list[str] | None) -> list[Any]:
        if not paths:
            visits.end(_visitor(request))
            return _blank(names, page.hint(BEGIN))
        try:
            visit = visits.begin(_visitor(request), [Path(path) for path in paths])
        except KarmmaError as error:
            return _blank(names, page.error(str(error)))
        shown, missing = Shown(visit.readings, visit.times, visits.predictor.data), visit.missing
        on = [gradio.update(value=n not in missing, interactive=n not in missing, info=missing.get(n)) for n in names]
        pictures = [gradio.update(value=shown.html(name), elem_classes=["k-input"]) for name in names]
        return [page.answer(visit.whole, visit.whole), *on, *pictures]

    def switch(request: gradio.Request, *states: bool) -> list[Any]:
        on = [name for name, is_on in zip(names, states, strict=True) if is_on]
        classes = [["k-input"] if name in on else ["k-input", "k-off"] for name in names]
        return [visits.answer(_visitor(request), on), *(gradio.update(elem_classes=own) for own in classes)]

    def leave(request: gradio.Request) -> None:
        visits.end(_visitor(request))

    # One at a time: the student's memory is that of one clip, and answers come in the order of the questions.
    how: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "student", "api_visibility": "private"}
    files.change(take, files, [answer, *switches, *given], show_progress_on=answer, **how)
    # All switches in one, so that the last answer is that of the last click, whichever switch it was.
    clicks = [each.input for each in switches]
    gradio.on(clicks, switch, switches, [answer, *given], trigger_mode="always_last", show_progress="hidden", **how)
    blocks.unload(leave)


def _visitor(request: "Request") -> str:
    assert request.session_hash is not None  # of all that a page asks for
    return request.session_hash


def _blank(names: tuple[str, ...], said: str) -> list[Any]:
    """Return the parts of a page without a clip."""
    import gradio

    off = gradio.update(value=True, interactive=False, info=None)
    return [said, *(off for _ in names), *(gradio.update(value="", elem_classes=["k-input"]) for _ in names)]


class _Guard:
    """Stands before all that Gradio serves: closes ways that the page does not need, and keeps the browser here.

    hosts: names under which the page may be asked for, so that no page from elsewhere can pose as this one; any if
    empty.
    """

    def __init__(self, app: Messages, hosts: tuple[str, ...]) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: MutableMapping[str, Any], receive: Messages, send: Messages) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "http" and not self._is_allowed(scope):
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})
            return

        async def guarded(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"content-security-policy", POLICY)]
            await send(message)

        await self.app(scope, receive, guarded)

    def _is_allowed(self, scope: MutableMapping[str, Any]) -> bool:
        asked = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        name = asked.rpartition(":")[0] if asked.rpartition(":")[2].isdecimal() else asked
        is_known = not self.hosts or name.strip("[]") in self.hosts
        return is_known and not scope["path"].startswith(CLOSED)
