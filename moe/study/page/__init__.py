"""The routing study as one HTML file."""

from moe.study.page.page import write_page

__all__ = ["write_page"]
