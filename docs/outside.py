"""A hook of mkdocs: files outside docs/ that its pages link to join the site; links stay as a code host reads them.

Pages write `../SECURITY.md`, and SECURITY.md writes `docs/cache.md`.  In the site both lie in one folder.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
OUT, IN = re.compile(r"(\]\()\.\./"), re.compile(r"(\]\()docs/")
DRAWING = re.compile(r"!\[(.*?)\]\((\S+\.svg)\)")


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages of the root, and whatever else a page of docs/ links to outside it."""
    wanted = {*PAGES}
    for page in files.documentation_pages():
        wanted |= {*re.findall(r"\]\(\.\./([^)#\s]+)", page.content_string)}
    for name in sorted(wanted):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, *, page: Any, files: Files, **_: Any) -> str:
    """Point links out of docs/, or into it, at the one folder of the site; leave out what is not drawn yet."""
    markdown = (IN if page.file.src_uri in PAGES else OUT).sub(r"\1", markdown)
    return DRAWING.sub(lambda found: found[0] if files.get_file_from_path(found[2]) else f"({found[1]})", markdown)
