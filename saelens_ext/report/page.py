"""One self-contained HTML page: its template, style and scripts in one file that asks the network for nothing."""

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from saelens_ext import _files
from saelens_ext.report.format import visible

# Inside <script type="application/json"> the parser looks only for tags and comments, so without "<" nothing can end
# the block; the rest are escaped for readers other than a browser. Non-ASCII text, U+2028 and lone surrogates included,
# is already \u-escaped by json.dumps.
_JSON_ESCAPES = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026"}


def embed_json(value: Any) -> Markup:
    """JSON that is inert wherever it stands in an HTML page: no markup, no non-ASCII character, no NaN."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.translate(_JSON_ESCAPES))


def render_page(
    template: str,
    *,
    styles: Sequence[str],
    scripts: Sequence[str],
    allowed: str = "",
    packages: Sequence[str] = (),
    **values: Any,
) -> str:
    """Render ``template`` with the files of ``styles`` and ``scripts`` inlined, in their order, scripts as one module.

    The page carries a content security policy that names the hashes of its own style and script, so that nothing else
    runs in it and nothing is fetched, whatever text it shows, but for what ``allowed`` adds to the policy.
    Templates may lie in further ``packages``. The template gets ``style``, ``script``, ``policy`` and
    ``values``, all escaped unless Markup.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package) for package in ("saelens_ext.report", *packages)]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = (_join(environment, names) for names in (styles, scripts))
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        f"img-src data:; base-uri 'none'; form-action 'none'{allowed}"
    )
    return environment.get_template(template).render(
        style=Markup(style), script=Markup(script), policy=policy, **values
    )


def write_page(path: str | Path, template: str, *, title: str, **options: Any) -> Path:
    """Write a rendered page, which also says by which version it was made, as one file, replaced in one step.

    ``options`` are those of :func:`render_page`; missing directories are made.
    """
    page = render_page(template, title=visible(title), version=version("saelens-ext"), **options)
    _files.write_together({Path(path): lambda temporary: temporary.write_bytes(page.encode("utf-8"))})
    return Path(path)


def _join(environment: Environment, names: Sequence[str]) -> str:
    """The text of some template files, exactly as it will stand between two tags."""
    assert environment.loader is not None
    return "\n" + "\n".join(environment.loader.get_source(environment, name)[0].replace("\r\n", "\n") for name in names)


def _hash(text: str) -> str:
    """The name by which a content security policy allows one inline block."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
