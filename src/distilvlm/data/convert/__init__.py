"""Data as people have it → LLaVA JSONL (one module per format, each a documented reader; `convert` does the rest), and
rows of that form → others and back (`rewrite`)."""

from distilvlm.data.convert.conversion import FORMATS, Converted, convert
from distilvlm.data.convert.items import Fault
from distilvlm.data.convert.mixing import Mixed, by_name, mix, parts_of, recipe_section, weighted
from distilvlm.data.convert.rewriting import Rewritten, rewrite

__all__ = [
    "FORMATS",
    "Converted",
    "Fault",
    "Mixed",
    "Rewritten",
    "by_name",
    "convert",
    "mix",
    "parts_of",
    "recipe_section",
    "rewrite",
    "weighted",
]
