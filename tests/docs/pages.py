"""The commands and files that the README and the pages of docs/ name."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^( *)(`{3,})([\w-]*)[^\n]*\n(.*?)^\1\2 *$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
MESSAGE = re.compile(r"^#### `.*", re.MULTILINE)
"""Of errors.md: no command."""
SEPARATORS = {"|", "||", "&&", ";", "&"}


@dataclass(frozen=True)
class Command:
    """One command of a page, as a shell would take it apart."""

    page: str
    line: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {shlex.join(self.words)}"

    @property
    def arguments(self) -> tuple[str, ...] | None:
        """What follows `distilvlm`, also behind a launcher; None where another program is called."""
        names = [Path(word).name for word in self.words]
        launched = names[0] in ("torchrun", "accelerate", "srun")
        if "distilvlm" not in (names if launched else names[:1]):
            return None
        return self.words[names.index("distilvlm") + 1 :]


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: str
    line: int
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        body = re.sub(rf"^{match[1]}", "", match[4], flags=re.MULTILINE)
        found.append(Block(str(page.relative_to(ROOT)), text.count("\n", 0, match.start()) + 2, match[3], body))
    return found


def commands(page: Path) -> Iterator[Command]:
    """Of `bash` blocks every line, of `console` blocks those behind `$`; a backslash continues a line."""
    for block in blocks(page):
        if block.language not in ("bash", "console"):
            continue
        lines = block.text.split("\n")
        number = 0
        while number < len(lines):
            first, line = number, lines[number]
            number += 1
            while line.endswith("\\"):
                line = line[:-1] + lines[number]
                number += 1
            if block.language == "console":
                if not line.startswith("$ "):
                    continue
                line = line[2:]
            for words in shell(line):
                yield Command(block.page, block.line + first, words)


def shell(line: str) -> Iterator[tuple[str, ...]]:
    """The commands of a line, without what they assign, redirect or say behind #."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    words: list[str] = []
    redirected = False
    for word in [*lexer, ";"]:
        if word in SEPARATORS:
            if words:
                yield tuple(words)
            words = []
        elif redirected or set(word) <= {"<", ">"}:
            redirected = not redirected
        elif words or not re.match(r"^[A-Z_]+=", word):
            words.append(word)


def mentioned(page: Path) -> Iterator[Command]:
    """Commands in the running text: `distilvlm ...`, perhaps without all of its arguments."""
    prose = MESSAGE.sub("", FENCE.sub("", page.read_text(encoding="utf-8")))
    for text in INLINE.findall(prose):
        if "distilvlm" in text.split():
            for words in shell(text):
                if (command := Command(page.name, 0, words)).arguments is not None:
                    yield command
