"""A run or a comparison as one self-contained page. Read `page.py` first."""

from distilvlm.report.page import SAMPLES, write_report
from distilvlm.report.read import ReportError

__all__ = ["SAMPLES", "ReportError", "write_report"]
