"""A site that needs no network: whatever a built page loads by itself from elsewhere is a warning."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LOG = logging.getLogger("mkdocs.hooks.local")
LOADED = re.compile(
    r"""<(?:script|img|iframe|source|video|audio|embed)\b[^>]*?\bsrc=["']?((?:https?:)?//[^"'\s>]+)"""
    r"""|<link\b(?![^>]*rel=["']?(?:canonical|next|prev))[^>]*?\bhref=["']?((?:https?:)?//[^"'\s>]+)"""
    r"""|class=["'](mermaid)["']"""  # a diagram, for which Material fetches the library
)
STYLED = re.compile(r"""(?:@import\s+|url\()\s*["']?((?:https?:)?//[^"')\s]+)""")


def on_post_build(config: Any, **_: Any) -> None:
    for path in sorted(Path(config.site_dir).rglob("*")):
        if path.suffix in (".html", ".css"):
            for address in elsewhere(path.read_text(encoding="utf-8"), path.suffix):
                LOG.warning("%s: loads %s when it is opened", path.relative_to(config.site_dir), address)


def elsewhere(text: str, suffix: str) -> Iterator[str]:
    """Addresses on other machines that a browser would ask for without a click."""
    for found in (STYLED if suffix == ".css" else LOADED).finditer(text):
        yield next(filter(None, found.groups()))
