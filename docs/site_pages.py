"""Pages of the site that are no file of docs/: the READMEs, the walks out of their notebooks, and the Python interface.

A hook of mkdocs (https://www.mkdocs.org/user-guide/configuration/#hooks). Links are written for readers of the
repository; here they are turned to the pages of the site, and to the repository's own page where a file is no page.
"""

from __future__ import annotations

import inspect
import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = "https://github.com/fedvfm/fedvfm/blob/main"
PAGES = {
    "README.md": "index.md",
    "server/README.md": "server.README.md",
    "client/README.md": "client.README.md",
    "simulations/README.md": "simulations.README.md",
    "benchmarks/README.md": "benchmarks.README.md",
    "findings/README.md": "findings.README.md",
    "SECURITY.md": "SECURITY.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "docs/README.md": "index.md",
}
"""File of the repository -> page of the site, for what does not lie in docs/."""
LINK = re.compile(r"(\]\()([^)\s]+)(\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    for path, page in PAGES.items():
        if path != "docs/README.md":
            files.append(File.generated(config, page, content=turned((ROOT / path).read_text("utf-8"), path)))
    for path in sorted((ROOT / "docs" / "tutorials").glob("*.ipynb")):
        if (shown := files.get_file_from_path(f"tutorials/{path.name}")) is not None:
            files.remove(shown)
        name = f"docs/tutorials/{path.name}"
        files.append(
            File.generated(config, f"tutorials/{path.stem}.md", content=turned(notebook(path.read_text("utf-8")), name))
        )
    files.append(File.generated(config, "api.md", content=interface()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links of a page that is a file of docs/."""
    made = page.file.generated_by is not None
    return markdown if made else turned(markdown, f"docs/{page.file.src_uri}")


def turned(text: str, path: str) -> str:
    """The Markdown of a file with its links as the site has them.

    Args:
        text: of the file.
        path: where it lies in the repository.
    """
    return LINK.sub(lambda found: found[1] + link(found[2], path) + found[3], text)


def link(target: str, path: str) -> str:
    """One link: outside ones stay, pages go to their place, other files to the repository's page."""
    if re.match(r"[a-z]+:|#", target):
        return target
    place, _, part = target.partition("#")
    aim = posixpath.normpath(posixpath.join(posixpath.dirname(path), place))
    suffix = f"#{part}" if part else ""
    page = page_of(aim)
    if page is None:
        return f"{REPOSITORY}/{aim}{suffix}"
    return posixpath.relpath(page, posixpath.dirname(page_of(path) or "") or ".") + suffix


def page_of(path: str) -> str | None:
    """The page of a file of the repository; None where it has none."""
    if path in PAGES:
        return PAGES[path]
    own = path.removeprefix("docs/")
    if own == path or not (ROOT / path).is_file() or own.endswith((".py", ".json")):
        return None
    return own.removesuffix(".ipynb") + ".md" if own.endswith(".ipynb") else own


def notebook(content: str) -> str:
    """A notebook as Markdown: texts as they stand, code in blocks; what it printed is not kept in the file."""
    parts = []
    for cell in json.loads(content)["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    return "\n\n".join(parts) + "\n"


def interface() -> str:
    """The names that ``dir(fedvfm)`` shows, each with its form and what it says of itself."""
    import fedvfm

    parts = ["# Python", "What `import fedvfm` offers; examples: [guide](guide.md#from-python)."]
    for name in sorted(fedvfm.__all__):
        value: Any = getattr(fedvfm, name)
        if not callable(value):
            continue
        says = inspect.cleandoc(value.__doc__ or "")
        parts += [f"## fedvfm.{name}", f"```python\n{name}{signature(value)}\n```", f"```text\n{says}\n```"]
    return "\n\n".join(parts) + "\n"


def signature(value: Any) -> str:
    """Arguments and result, a line each where they are many; nothing where there are none to see."""
    try:
        shown = inspect.signature(value)
    except (TypeError, ValueError):
        return ""
    text = str(shown)
    if len(text) <= 80:
        return text
    inner = "".join(f"    {parameter},\n" for parameter in shown.parameters.values())
    return f"(\n{inner})"
