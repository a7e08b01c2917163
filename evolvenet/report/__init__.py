"""A run's history as a page, a table or a picture. May import everything but the other edges."""

from evolvenet.report.page import write_report
from evolvenet.report.panels import draw_network, network_figure
from evolvenet.report.picture import draw
from evolvenet.report.summary import summary_rows, summary_table
from evolvenet.report.svg import ReportError

__all__ = ["ReportError", "draw", "draw_network", "network_figure", "summary_rows", "summary_table", "write_report"]
