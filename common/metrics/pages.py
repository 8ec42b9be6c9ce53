"""Templates of pages, and tables as Markdown and for terminals."""

from collections.abc import Sequence

from common.files import ROOT

from jinja2 import Environment, FileSystemLoader, select_autoescape

Cells = Sequence[str]


def environment() -> Environment:
    """The templates of `common/metrics`; those of Markdown have `markdown`, a table."""
    layouts = FileSystemLoader(ROOT / "common" / "metrics")
    pages = Environment(loader=layouts, autoescape=select_autoescape(), trim_blocks=True, keep_trailing_newline=True)
    pages.globals["markdown"] = markdown_table
    return pages


def markdown_table(rows: Sequence[Cells]) -> str:
    """A table of Markdown; the first row is the head."""
    head, *lines = ("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    return "\n".join([head, "| " + " | ".join("---" for _ in rows[0]) + " |", *lines])


def text_table(rows: Sequence[Cells]) -> str:
    """A table for a terminal; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
