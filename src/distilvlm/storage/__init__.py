"""Bytes wherever they lie: in files of this machine, in objects of a store (fsspec), and in parts of either."""

from distilvlm.storage.inside import Window, cell, digest, is_inside, member, opened, state
from distilvlm.storage.kept import Kept, found, keep
from distilvlm.storage.reader import Held, Reader, is_remote, matching, stand

__all__ = [
    "Held",
    "Kept",
    "Reader",
    "Window",
    "cell",
    "digest",
    "found",
    "is_inside",
    "is_remote",
    "keep",
    "matching",
    "member",
    "opened",
    "stand",
    "state",
]
