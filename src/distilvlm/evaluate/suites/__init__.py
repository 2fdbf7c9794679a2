"""Published tests of vision-language models, asked and scored as their authors do. Read `suite.py` first, then
`catalogue.py` and one reader; `asking.py` asks."""

from distilvlm.evaluate.suites.asking import Asking, ask_suite, weigh_suite
from distilvlm.evaluate.suites.catalogue import MEASURES, SUITES, TEXT_SUITES, TextSuite, suite_named
from distilvlm.evaluate.suites.compared import Compared, compared
from distilvlm.evaluate.suites.own import SuiteFile, own_suite
from distilvlm.evaluate.suites.suite import Opened, Sources, Suite

__all__ = [
    "MEASURES",
    "SUITES",
    "TEXT_SUITES",
    "Asking",
    "Compared",
    "Opened",
    "Sources",
    "Suite",
    "SuiteFile",
    "TextSuite",
    "ask_suite",
    "compared",
    "own_suite",
    "suite_named",
    "weigh_suite",
]
