"""Hooks of `make docs`: README, notebook and the pages outside `docs/` join the site, and formulas become MathML.

Links in the pages are those of the repository (`../experiments/compare/pruning.md`), so that they also lead somewhere where the
files are read without a site. MathML needs no script in the browser.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
CODE = r"(?P<code>```.*?```|`[^`\n]*`)"
INLINE = r"(?<![\w$])\$(?P<inline>[^$\n]+(?:\n[^$\n]+)?)\$"
FORMULA = re.compile(rf"{CODE}|\$\$(?P<block>.+?)\$\$|{INLINE}", re.DOTALL)
_formulas: dict[str, list[str]] = {}


def on_files(files: Files, *, config: Any) -> Files:
    """Add result pages, their pictures and CONTRIBUTING.md."""
    pages = [path for ending in ("md", "png") for path in sorted((ROOT / "experiments").rglob(f"*.{ending}"))]
    for path in (*pages, ROOT / "CONTRIBUTING.md"):
        name = path.relative_to(ROOT).as_posix()
        files.append(File(name, str(ROOT), config["site_dir"], config["use_directory_urls"]))
    files.append(File.generated(config, "notebook.md", content=notebook(ROOT / "docs" / "spectra.ipynb")))
    return files


def notebook(path: Path) -> str:
    """A notebook as Markdown: its texts, its code, and what it printed and drew when it was saved."""
    parts = []
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/png" in data:
                parts.append(f"![What the cell draws](data:image/png;base64,{''.join(data['image/png'].split())})")
            else:
                parts.append(f"```text\n{''.join(data['text/plain']).rstrip()}\n```")
    return "\n\n".join(parts)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Put the README in the place of the start page, mend links, and take formulas out."""
    name = page.file.src_uri
    if name == "index.md":
        markdown = (ROOT / "README.md").read_text("utf-8")
        markdown = re.sub(r'(\]\(|srcset="|src=")docs/', r"\1", markdown)
        markdown = markdown.replace("[`examples/`](examples)", "`examples/`")
    markdown = markdown.replace("](spectra.ipynb)", "](notebook.md)")
    up = "../" * name.count("/")
    markdown = markdown.replace("](../experiments/", f"]({up}experiments/") if "/" not in name else markdown
    found = _formulas[name] = []

    def take(match: re.Match[str]) -> str:
        if match["code"]:
            return match[0]
        kind = "block" if match["block"] else "inline"
        found.append(convert(match["block"] or match["inline"], display=kind))
        return f"FORMULA{len(found) - 1}END"

    return FORMULA.sub(take, markdown) if name == "how-it-works.md" else markdown


def on_page_content(html: str, *, page: Any, **_: Any) -> str:
    """Put the formulas back."""
    found = _formulas.get(page.file.src_uri, [])
    return re.sub(r"FORMULA(\d+)END", lambda match: found[int(match[1])], html)
