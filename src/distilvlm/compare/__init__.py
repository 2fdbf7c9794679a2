"""Several runs on several seeds, asked the same questions: read `schema.py` first, then `execute.py`. Models that are
there already, and what they were asked: `given.py`, `gathered.py`."""

from .execute import compare
from .gathered import gather
from .schema import Comparison, load_comparison
from .table import Results

__all__ = ["Comparison", "Results", "compare", "gather", "load_comparison"]
