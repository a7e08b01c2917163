"""A run's history as a page, a table or a picture. May import everything but the other edges."""

from evolvenet.report.page import ReportError, draw, summary_rows, summary_table, write_report

__all__ = ["ReportError", "draw", "summary_rows", "summary_table", "write_report"]
