"""The report as one HTML file: no script, no link, pictures inlined. Jinja escapes all that comes from runs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
from jinja2 import Environment
from matplotlib.figure import Figure

from drpo_megatron.study.tables import Table

_DPI = 100

_TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{{ page.title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: .5em 0 1.5em; font-size: 13px; display: block; overflow-x: auto }
th, td { border: 1px solid #ccc; padding: .25em .6em; text-align: left; vertical-align: top }
th { background: #f3f3f3 }
td.reproduced { background: #dff3e0 } td.not { background: #f8dede } td.undecided { background: #f6f0d4 }
img { max-width: 100% }
pre { background: #f7f7f7; padding: .8em; overflow-x: auto; font-size: 12px }
.note { color: #555 }
</style>
</head>
<body>
<h1>{{ page.title }}</h1>
{% for line in page.summary %}<p>{{ line }}</p>
{% endfor %}
{% macro table(t) %}
<h3>{{ t.title }}</h3>
{% if t.note %}<p class="note">{{ t.note }}</p>{% endif %}
<table>
<tr>{% for cell in t.header %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in t.rows %}<tr>{% for cell in row %}<td class="{{ cell.split(' ')[0] if cell in page.verdicts }}">{{ cell }}\
</td>{% endfor %}</tr>
{% endfor %}</table>
{% endmacro %}
<h2>What can't be concluded</h2>
<ul>
{% for text in page.reservations %}<li>{{ text }}</li>
{% else %}<li>Every run has ended, all by the same code and versions.</li>
{% endfor %}</ul>
<h2>Results</h2>
{% for t in page.tables %}{{ table(t) }}{% endfor %}
<h2>Pictures</h2>
{% for picture in page.pictures %}
<h3>{{ picture.title }}</h3>
<p class="note">{{ picture.caption }}</p>
<img alt="{{ picture.title }}" src="data:image/png;base64,{{ picture.png }}">
{% endfor %}
<h2>Configurations</h2>
{% for title, text in page.configurations %}
<details><summary>{{ title }}</summary><pre>{{ text }}</pre></details>
{% endfor %}
</body>
</html>
"""


@dataclass(frozen=True, slots=True)
class InlinedPicture:
    title: str
    caption: str
    png: str
    """Base64."""


@dataclass(frozen=True, slots=True)
class Page:
    title: str
    summary: Sequence[str]
    reservations: Sequence[str]
    tables: Sequence[Table]
    pictures: Sequence[InlinedPicture]
    configurations: Sequence[tuple[str, str]]
    verdicts: tuple[str, ...] = ("reproduced", "not reproduced", "undecided")
    """Cells of a table that are coloured."""


def as_html(page: Page) -> str:
    return Environment(autoescape=True).from_string(_TEMPLATE).render(page=page)


def as_markdown(page: Page) -> str:
    """Without pictures and configurations: to be pasted elsewhere."""
    parts = ["\n".join(page.summary), *(table.as_markdown() for table in page.tables)]
    if page.reservations:
        parts.append("What can't be concluded:\n\n" + "\n".join(f"- {text}" for text in page.reservations))
    return "\n\n".join(parts) + "\n"


def inline(title: str, caption: str, figure: Figure) -> InlinedPicture:
    """Closes the figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=_DPI, format="png")
    plt.close(figure)
    return InlinedPicture(title, caption, base64.b64encode(buffer.getvalue()).decode())
