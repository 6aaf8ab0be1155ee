"""What a comparison found, as one HTML page that needs nothing beside it."""

from __future__ import annotations

from wda.report.contents import ReportContents
from wda.report.notebook import notebook_html
from wda.report.page import check_installed, write_report

__all__ = ["ReportContents", "check_installed", "notebook_html", "write_report"]
