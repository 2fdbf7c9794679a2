"""Data as people have it → LLaVA JSONL. One module per format, each a documented reader; `convert` does the rest."""

from distilvlm.data.convert.conversion import FORMATS, Converted, convert
from distilvlm.data.convert.items import Fault

__all__ = ["FORMATS", "Converted", "Fault", "convert"]
