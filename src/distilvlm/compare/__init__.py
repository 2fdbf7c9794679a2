"""Several runs on several seeds, asked the same questions. Read `schema.py` first, then `execute.py`."""

from .execute import compare
from .schema import Comparison, load_comparison
from .table import Results

__all__ = ["Comparison", "Results", "compare", "load_comparison"]
