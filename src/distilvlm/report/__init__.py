"""A run or a comparison as one self-contained page. Read `page.py` first."""

from distilvlm.report.page import write_report
from distilvlm.report.read import ReportError

__all__ = ["ReportError", "write_report"]
