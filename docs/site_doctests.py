"""For the page of the API: doctests in docstrings become its "Examples" sections, which the parser expects under that heading."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Doctests(griffe.Extension):
    """Puts a heading above doctests and indents them."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each object with its docstring."""
        if obj.docstring is None or "Examples:" in obj.docstring.value:
            return
        text, found, examples = obj.docstring.value.partition("\n>>> ")
        if found:
            indented = re.sub("^(?=.)", "    ", f">>> {examples}", flags=re.MULTILINE)
            obj.docstring.value = f"{text.rstrip()}\n\nExamples:\n{indented}"
