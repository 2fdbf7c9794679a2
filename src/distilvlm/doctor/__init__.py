"""Is this recipe fit to run? In seconds, before the first step: every finding says how it stands, or names the fix.

`examine` looks at what a run has at hand; `doctor` gets it all from a recipe file first.
"""

from .examination import examine
from .finding import Finding
from .preparation import doctor
from .screen import print_findings

__all__ = ["Finding", "doctor", "examine", "print_findings"]
