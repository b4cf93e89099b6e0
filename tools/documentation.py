"""What the documentation site does beside its theme: mkdocs.yml names this file, and ``mkdocs build --strict`` runs it."""

import posixpath
import re
from typing import Any

import griffe

OUTSIDE = re.compile(r"\[([^\]]*)\]\((\.\./[^)\s]*)\)")
ROLE = re.compile(r":(?:mod|func|class|meth|attr|data):`(~?)([\w.]+)`")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Lead links to files outside ``docs/`` to the repository, or leave their text alone where none is known."""

    def lead(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri), link[2]))
        if path.startswith("docs/"):
            return link[0]
        return f"[{link[1]}]({config.repo_url}/blob/main/{path})" if config.repo_url else link[1]

    return OUTSIDE.sub(lead, markdown)


class Roles(griffe.Extension):
    """Shows roles of docstrings, ``:func:`~package.name```, as code: their names, without the package after a tilde."""

    def on_object(self, *, obj: griffe.Object, **others: Any) -> None:
        """Rewrite the docstring of an object that was loaded."""
        if obj.docstring:
            obj.docstring.value = ROLE.sub(
                lambda role: f"`{role[2].rpartition('.')[2] if role[1] else role[2].lstrip('.')}`", obj.docstring.value
            )
