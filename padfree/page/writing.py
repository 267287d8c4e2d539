"""The page itself: content, template and styles in one file."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from padfree.errors import PadfreeError
from padfree.files.writing import replacing
from padfree.page.content import Request, content
from padfree.page.pictures import gradient


def write_page(path: Path, request: Request) -> None:
    """Write a self-contained page about a conversion: no other file, no network.

    Raises:
        PadfreeError: jinja2 is missing, or something of `content` fails.
        FileError: the file cannot be written; what was there stays.
    """
    write_html(path, render(content(request)))


def write_html(path: Path, text: str) -> None:
    """Write a page whole or not at all.

    Raises:
        FileError: the file cannot be written; what was there stays.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # paths may be no text


def check_extra() -> None:
    """Refuse before any work where the extra `report` is not installed.

    Raises:
        PadfreeError: jinja2 is missing.
    """
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise PadfreeError("reports need jinja2: pip install 'padfree[report]'") from error


def render(data: dict[str, Any], template: str | None = None) -> str:
    """The page of a content; every string of it is escaped, since names are whatever a user chose.

    Args:
        data: what the template names, `title` among it.
        template: text that extends `base.html` and may import `parts.html`; by default the page of a conversion.

    Raises:
        PadfreeError: jinja2 is missing.
    """
    check_extra()
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(_text),
    )
    page = environment.from_string(_text("page.html") if template is None else template)
    css, script = Markup(_text("page.css")), Markup(_text("page.js"))  # ours, not anybody's data
    return page.render(**data, css=css, script=script, gradient=gradient())


def _text(name: str) -> str:
    return (resources.files("padfree.page") / name).read_text(encoding="utf-8")
