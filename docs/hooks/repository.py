"""Links that leave docs/ (a recipe, a source file, figures of a benchmark) lead to pages that show these files.

In the repository they are ordinary relative links. A link to a file that is not there is a warning, as any other.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

LOG = logging.getLogger("mkdocs.hooks.repository")
LINK = re.compile(r"(?<=\]\()(\.\./[^)#\s]+)")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".toml": "toml", ".json": "json"}


def on_files(files: Files, config: Any, **_: Any) -> None:
    docs = Path(config.docs_dir)
    shown: dict[str, File] = {}
    for page in files.documentation_pages():
        for target in LINK.findall(page.content_string):
            name = outside(page.src_uri, target)
            if name is None or page_of(name) in shown:
                continue
            path = docs.parent / name
            if not path.is_file():
                LOG.warning("%s: links to %s, which is no file of the repository", page.src_uri, name)
                continue
            shown[page_of(name)] = File.generated(
                config, page_of(name), content=showing(name, path), inclusion=InclusionLevel.NOT_IN_NAV
            )
    for file in shown.values():
        files.append(file)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    here = page.file.src_uri

    def led(match: re.Match[str]) -> str:
        name = outside(here, match[1])
        return match[1] if name is None else os.path.relpath(page_of(name), PurePosixPath(here).parent)

    return LINK.sub(led, markdown)


def outside(page: str, target: str) -> str | None:
    """A file of the repository that a link on `page` leads to; None where the link stays in docs/."""
    whole = os.path.normpath(PurePosixPath("docs", page).parent / target)
    return None if whole.startswith("docs/") else whole


def page_of(name: str) -> str:
    return f"files/{name}.md"


def showing(name: str, path: Path) -> str:
    language = LANGUAGES.get(path.suffix, "text")
    return f"---\nsearch: {{exclude: true}}\n---\n\n# `{name}`\n\n`````{language}\n{path.read_text()}\n`````\n"
