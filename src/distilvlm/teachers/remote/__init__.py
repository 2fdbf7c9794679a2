"""A teacher behind HTTP: `distilvlm teach` (hidden rows), or a server that gives log-probabilities of prompts."""

from .hidden import RemoteTeacher
from .prompted import PromptedTeacher
from .server import TeachingServer

__all__ = ["PromptedTeacher", "RemoteTeacher", "TeachingServer"]
