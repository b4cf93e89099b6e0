"""The links and docstrings of the documentation site, as mkdocs needs them: mkdocs.yml names this file."""

import posixpath
import re
from typing import Any

import griffe

OUTSIDE = re.compile(r"\[([^\]]*)\]\((\.\./[^)\s]*)\)")
ROLE = re.compile(r":(?:mod|func|class|meth|attr|data):`(~?)\.?([\w.]+)`")
DOCTEST = re.compile(r"^( *)>>> .*(?:\n\1.+)*", re.MULTILINE)


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Lead links to files outside ``docs/`` to the repository, or leave their text alone where none is known."""

    def lead(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri), link[2]))
        if path.startswith("docs/"):
            return link[0]
        return f"[{link[1]}]({config.repo_url}/blob/main/{path})" if config.repo_url else link[1]

    return OUTSIDE.sub(lead, markdown)


class Docstrings(griffe.Extension):
    """Shows roles, ``:func:`~package.name```, as code, without the package after a tilde, and doctests as sessions."""

    def on_object(self, *, obj: griffe.Object, **others: Any) -> None:
        """Rewrite the docstring of an object that was loaded."""
        if obj.docstring:
            text = ROLE.sub(lambda role: f"`{role[2].rpartition('.')[2] if role[1] else role[2]}`", obj.docstring.value)
            obj.docstring.value = DOCTEST.sub(
                lambda session: f"{session[1]}```pycon\n{session[0]}\n{session[1]}```", text
            )
