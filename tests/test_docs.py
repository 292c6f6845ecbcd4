"""The pages: links lead somewhere, commands and settings are real, and what looks like a whole example runs.

A block of code with a title is a file of that name.  One with the title "on the sample data" is a list of commands that
are given in a folder with these files and the sample data, one after another.
"""

import ast
import importlib
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
import unicodedata
from collections import defaultdict
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import typer
import yaml
from karmma.cli import app
from karmma.cli_options import SECTIONS
from karmma.data.annotations import RATES, SOURCES
from karmma.data.clips import read_rows
from karmma.data.config import DataConfig
from karmma.data.errors import ConfigError
from karmma.data.sample import write_sample
from karmma.data.settings import assigned, read_preset, resolve
from karmma.data.stores import LogitStore, TokenStore
from karmma.extract.backbones import build_backbone
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
DRAWN = ROOT / "docs/reproduction"  # by `make reproduce`, once what they show is finished
ROOMS = ("data", "extract", "fuse", "distill")
ON_SAMPLE = "on the sample data"
COLUMNS = {"clip_id", "video", "video_id", "start_s", "stop_s", "split", "participant", *SOURCES, *RATES}
# Words before `karmma` of a line that does not run it.
OTHERS = {"pip", "cd", "source", "conda"}

COMMAND = typer.main.get_command(app)


@dataclass(frozen=True)
class Block:
    """A block of code: where it stands, its language, its title and its text."""

    page: str
    line: int
    language: str
    title: str
    text: str


def parsed(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text())


def found_language(text: str) -> str:
    """Say what an indented block holds, which cannot name it."""
    if re.search(r"^\[\w+\]$", text, re.M) and not text.startswith("cat "):
        return "toml"
    if text.startswith("clip_id,"):
        return "csv"
    return "bash" if re.match(r"(karmma|make|torchrun|cat) ", text) else "text"


def blocks(page: Path) -> list[Block]:
    found = []
    for token in parsed(page):
        if token.type in ("fence", "code_block"):
            language, _, options = token.info.partition(" ")
            title = re.fullmatch(r'title="(.*)"', options.strip())
            assert title or not options, f"{page.name}: {token.info}"
            language = language or ("" if token.type == "fence" else found_language(token.content))
            assert language, f"{page.name}:{token.map[0] + 1}: a block of code without a language"
            where = str(page.relative_to(ROOT)), token.map[0] + 1
            found.append(Block(*where, language, title[1] if title else "", token.content))
    return found


def inline(page: Path, kind: str) -> list[Token]:
    return [child for token in parsed(page) for child in token.children or () if child.type == kind]


BLOCKS = [block for page in PAGES for block in blocks(page)]


def of(*languages: str) -> pytest.MarkDecorator:
    """Parametrize a test over the blocks of some languages."""
    wanted = [block for block in BLOCKS if block.language in languages]
    return pytest.mark.parametrize("block", wanted, ids=lambda block: f"{block.page}:{block.line}")


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings that a code host and the site agree on."""
    tokens = parsed(page)
    texts = [
        "".join(child.content for child in inner.children)
        for opened, inner in pairwise(tokens)
        if opened.type == "heading_open"
    ]
    host = {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in texts}
    ascii_texts = [unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode() for text in texts]
    site = {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", text).strip().lower()) for text in ascii_texts}
    return host & site


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    links = [token.attrs["href"] for token in inline(page, "link_open")]
    for target in [*links, *(token.attrs["src"] for token in inline(page, "image"))]:
        parts = urlsplit(target)
        if parts.scheme:
            assert parts.scheme == "https", target
            assert re.fullmatch(r"[\w-]+(\.[\w-]+)+", parts.netloc), target
            continue
        there = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        assert there.is_relative_to(ROOT), target
        assert there.exists() or there.parent == DRAWN, target
        assert not parts.fragment or parts.fragment in anchors(there), target


def site() -> dict:
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def leaves(nav: object) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [leaf for part in (nav.values() if isinstance(nav, dict) else nav) for leaf in leaves(part)]


def test_navigation_names_every_page_once():
    named = leaves(site()["nav"])
    assert len(named) == len({*named})
    own = {str(page.relative_to(ROOT / "docs")) for page in PAGES if page.is_relative_to(ROOT / "docs")}
    assert {*named} == own | {page.name for page in PAGES if page.parent == ROOT} - {"README.md"}


@pytest.mark.slow
def test_site_builds_and_asks_for_nothing_elsewhere(tmp_path):
    pytest.importorskip("material", reason="needs pip install 'karmma[docs]'")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path)))
    pages = [*tmp_path.rglob("*.html")]
    assert len(pages) == len(leaves(site()["nav"])) + 1  # the one for what is not found
    for page in pages:
        assert not re.search(
            r"<(?:script|img)[^>]+src=\"?(?:https?:)?//|<link[^>]+href=\"?(?:https?:)?//", page.read_text()
        )


def commands(text: str) -> list[list[str]]:
    """Return the words of every command of a shell script, without comments and redirections."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split, words.commenters = True, "#"
        rest = [*words]
        while rest:
            end = next((at for at, word in enumerate(rest) if re.fullmatch(r"[;&|<>()]+", word)), len(rest))
            found.append(rest[:end])
            is_sent = end < len(rest) and re.search(r"[<>]", rest[end])  # to or from a file, whose name is no command
            rest = rest[end + 1 + bool(is_sent) :]
    return found


def options(command: Any) -> set[str]:
    return {opt for known in command.params for opt in (*known.opts, *known.secondary_opts)} | {"--help"}


def resolved(words: list[str]) -> tuple[Any, list[str]]:
    """Return the command that words behind `karmma` name, and the words for it."""
    command, rest = COMMAND, words
    while hasattr(command, "commands") and rest:
        if rest[0].startswith("-"):
            assert rest[0] in options(command), f"karmma {shlex.join(words)}: no {rest[0]}"
        else:
            assert rest[0] in command.commands, f"karmma {shlex.join(words)}: no command {rest[0]}"
            command = command.commands[rest[0]]
        rest = rest[1:]
    return command, rest


@of("bash")
def test_commands_of_a_script_parse(block):
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
    targets = {*re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)}
    for words in commands(block.text):
        if words and words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets
        if "karmma" not in words or words[0] in OTHERS:
            continue
        command, rest = resolved(words[words.index("karmma") + 1 :])
        if hasattr(command, "commands") or "--help" in rest:
            continue
        command.make_context("karmma", list(rest))  # raises what the command line would say
        require_settings(rest)


def require_settings(words: list[str]) -> None:
    """Raise ConfigError unless what follows each --set is a setting."""
    given = [after for word, after in pairwise(words) if word == "--set"]
    resolve(SECTIONS, ("preset", read_preset("tiny")), *(("--set", assigned(text)) for text in given))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_a_sentence_are_known(page):
    for token in inline(page, "code_inline"):
        if token.content.startswith("karmma "):
            command, rest = resolved([word for word in shlex.split(token.content)[1:] if not word.isupper()])
            unknown = {word.partition("=")[0] for word in rest if word.startswith("--")} - options(command)
            assert not unknown, token.content
            require_settings(rest)


@of("toml")
def test_settings_are_read(block):
    written = tomllib.loads(block.text)
    if block.title.endswith("pyproject.toml"):
        assert written["project"]["entry-points"]["karmma.backbones"]
        return
    preset = read_preset(written.pop("preset", "paper"))
    resolve(SECTIONS, ("preset", preset), (block.page, written))


@of("csv")
def test_tables_are_read(block, tmp_path):
    table = tmp_path / "clips.csv"
    table.write_text(block.text)
    heads = [name for name in block.text.partition("\n")[0].split(",") if name not in COLUMNS]
    found, bad = read_rows(DataConfig(table=table, heads=heads), tuple(heads))
    assert not bad
    assert found.n_clips == len(block.text.splitlines()) - 1


@of("python")
def test_python_compiles(block):
    compile(block.text, f"{block.page}:{block.line}", "exec")


def examples() -> dict[str, list[Block]]:
    found = defaultdict(list)
    for block in BLOCKS:
        if block.title:
            found[block.page].append(block)
    return {page: of_page for page, of_page in found.items() if any(block.title == ON_SAMPLE for block in of_page)}


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    write_sample(folder / "karmma-sample", n_clips=24)
    return folder


def install(folder: Path) -> None:
    """Make a package and its entry points known to this process, as pip would; `folder` has to be on the path."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    about = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    about.mkdir()
    head = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (about / "METADATA").write_text(head)
    groups = [
        f"[{group}]\n" + "".join(f"{name} = {place}\n" for name, place in points.items())
        for group, points in project["entry-points"].items()
    ]
    (about / "entry_points.txt").write_text("\n".join(groups))
    importlib.invalidate_caches()


QUICK = ("check", "cache", "init")  # commands without torch


@pytest.fixture
def run_example(sample, tmp_path, monkeypatch, give):
    """Return a function that writes a page's files and gives its commands, all of them or only the quick ones."""
    shutil.copytree(sample, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)

    def one(program: str, *words: str) -> None:
        if program == "pip":
            monkeypatch.syspath_prepend(str(tmp_path / words[-1]))
            install(tmp_path / words[-1])
        elif program == "python":
            monkeypatch.setattr(sys, "argv", [*words])
            runpy.run_path(words[0], run_name="__main__")
        else:
            assert program == "karmma"
            found = [sorted(map(str, Path().glob(word))) if "*" in word else [word] for word in words]
            code, _, err = give(*(word for each in found for word in each))
            assert code == 0, err

    def run(page: str, quickly: bool = False) -> None:
        for block in examples()[page]:
            if block.title != ON_SAMPLE:
                file = tmp_path / block.title
                file.parent.mkdir(exist_ok=True)
                file.write_text(block.text)
                continue
            for words in filter(None, commands(block.text)):
                if not quickly or words[0] != "karmma" or words[1] in QUICK:
                    one(*words)

    yield run
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):  # others have packages of that name
            del sys.modules[name]


@pytest.mark.slow
@pytest.mark.parametrize("page", examples())
def test_examples_run_on_the_sample_data(page, run_example):
    run_example(page)


def test_backbone_of_the_page_is_found_and_trains(run_example):
    run_example("docs/backbones.md", quickly=True)
    backbone = build_backbone("frame_cells", "video", (4, 3, 32, 32))
    tokens = backbone(torch.randint(0, 256, (2, 4, 3, 32, 32), dtype=torch.uint8))
    assert tokens.shape == (2, backbone.n_tokens, backbone.width) == (2, 36, 64)
    tokens.square().sum().backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())
    with pytest.raises(ConfigError, match="frame_cells takes video or flow, not audio"):
        build_backbone("frame_cells", "audio", (4, 24, 32))


def test_modality_of_the_page_goes_into_the_cache(run_example):
    run_example("docs/modalities.md", quickly=True)
    (store,) = Path("cache/tokens/own_imu").glob("*.zarr")
    found = TokenStore.open(store)
    assert found.tokens.shape == (24, 1, 8, 12)
    assert np.isfinite(found.read(np.arange(3), 0)).all()


def test_reader_of_the_format_reads_what_the_package_reads(sample, tmp_path, monkeypatch, give):
    """The reader of docs/format.md, and what the page says of names and digests, against a cache with a teacher."""
    shutil.copytree(sample, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    video = ("--modality", "audio", "--modality", "detections")
    assert give("extract", *video, "--set", "extract.shard_rows=10")[0] == 0
    assert give("train-teacher", *video, "--epochs", "1")[0] == 0
    (text,) = (block.text for block in BLOCKS if block.title == "read_cache.py")
    reader: dict[str, Any] = {}
    exec(compile(text, "read_cache.py", "exec"), reader)
    rows = pq.read_table("cache/clips.parquet").to_pydict()
    now = [sha256(json.dumps(source).encode()).hexdigest()[:8] for source in rows["sources"]]
    stores = [*Path("cache/tokens").glob("*/*.zarr")]
    for store in stores:
        tokens, state = reader["read_tokens"]("cache", store.parent.name, store.stem)
        there = np.flatnonzero(state == 1)
        assert 0 < len(there)
        np.testing.assert_array_equal(tokens[there], TokenStore.open(store).read(there, 0))
        assert np.isnan(tokens[state != 1]).all()
        identity = json.loads((store / "zarr.json").read_text())["attributes"]["identity"]
        text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
        assert sha256(text.encode()).hexdigest()[:16] == store.stem
        receipts = sorted(Path("cache/receipts/tokens", store.parent.name, store.stem, "view0").glob("*.json"))
        assert [digest for file in receipts for digest in json.loads(file.read_text())["rows"]] == now
    assert len(stores) == 2
    (found,) = Path("cache/logits").glob("*.zarr")
    raw = np.fromfile(found / "verb/c/0/0/0", "<f4").reshape(24, 1, 4)
    np.testing.assert_array_equal(raw, LogitStore.open(found).values("verb"))
    assert np.fromfile(found / "made_from/c/0", "<u4").tolist() == [int(digest, 16) for digest in now]


def messages() -> list[re.Pattern]:
    """Return what the source can say, a pattern for each text in it that is long enough to be told by."""
    found = []
    for file in [*ROOT.glob("cli*.py"), *(path for room in ROOMS for path in (ROOT / room).glob("*.py"))]:
        for node in ast.walk(ast.parse(file.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [part.value if isinstance(part, ast.Constant) else "%s" for part in parts]
            if all(isinstance(text, str) for text in texts):
                fixed = re.split("%[sd]", "".join(texts))
                if sum(map(len, fixed)) >= 15:
                    found.append(re.compile(".+".join(map(re.escape, fixed))))
    return found


def test_lines_of_troubleshooting_are_those_of_the_source():
    known = messages()
    lines = [
        line
        for block in BLOCKS
        if block.page == "docs/troubleshooting.md" and block.language == "text"
        for line in block.text.splitlines()
    ]
    assert len(lines) > 10
    assert [line for line in lines if not any(pattern.search(line) for pattern in known)] == []


PLAN = {"docs/epic.md": "EPIC-KITCHENS-100", "docs/ssv2.md": "Something-Something V2"}


@pytest.mark.parametrize("page", PLAN)
def test_what_a_data_set_needs_is_what_the_plan_says(page):
    """docs/planning.md is held against the program by tests/distill/test_needs.py."""
    plan = rows_of(ROOT / "docs/planning.md")
    column = plan[0].index(PLAN[page])
    wanted = {row[0]: row[column] for row in plan[1:]}
    told = {row[0]: row[1] for row in rows_of(ROOT / page) if row[0] in wanted}
    assert told == wanted


def rows_of(page: Path) -> list[list[str]]:
    """Return the cells of all tables of a page."""
    lines = [line.strip("|").split("|") for line in page.read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines]


def test_citation_names_software_and_paper():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0"
    for name in ("message", "title", "type", "version", "license", "authors"):
        assert cited[name], name
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (cited["version"], cited["license"]) == (project["version"], project["license"])
    paper = cited["preferred-citation"]
    assert paper["title"].endswith("Egocentric Action Recognition Robust to Missing Modalities")
    assert [author["family-names"] for author in paper["authors"]] == [
        "Santos-Villafranca", "Carrión-Ojeda", "Perez-Yus", "Bermudez-Cameo", "Guerrero", "Schaub-Meyer",
    ]  # fmt: skip
