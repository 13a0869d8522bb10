"""HTML pages escape every value and refuse unknown variables; the browser check finds faults in a page."""

from __future__ import annotations

from pathlib import Path

import jinja2
import pytest

from data_sharding.common.html.render import Cell, Table, render_page

TEMPLATE = """{% extends "base.html.j2" %}
{% from "parts.html.j2" import section, table with context %}
{% block title %}{{ title }}{% endblock %}
{% block content %}
{% call section("First part") %}<p>{{ text }}</p>{% endcall %}
{% call section("Second") %}{{ table(rows) }}{% endcall %}
{% endblock %}
"""
ROWS = Table(
    head=["name", "<i>n</i>"],
    rows=[["a", 1234], ["<b>", Cell(text="5 <s>", is_number=True)], ["c", None]],
    total=["all", 1239.5],
    limit=2,
)


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "page.html.j2"
    path.write_text(TEMPLATE)
    return path


def test_values_are_escaped_and_sections_are_linked(template: Path) -> None:
    page = render_page(template, title="<u>", text="<script>alert(1)</script>", rows=ROWS)
    assert "<script" not in page and "&lt;script&gt;" in page and page.count("&lt;u&gt;") == 2
    assert '<a href="#first-part">First part</a>' in page and '<section id="second">' in page
    assert '<th class="number">&lt;i&gt;n&lt;/i&gt;</th>' in page and "5 &lt;s&gt;" in page and "1,234" in page
    assert "... and 1 more." in page and ">c<" not in page and '<tr class="total">' in page


def test_unknown_template_variable_is_an_error(template: Path) -> None:
    with pytest.raises(jinja2.UndefinedError, match="text"):
        render_page(template, title="t", rows=ROWS)


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ('<img alt="lost" src="data:image/png;base64,AAAA">', "lost"),
        ('<div style="width: 800px">wide</div>', "wider than its window"),
        ("<script>undefinedFunction()</script>", "undefinedFunction"),
        ("<script>console.error('broken')</script>", "broken"),
    ],
)
def test_browser_check_finds_faults(body: str, fault: str, tmp_path: Path, open_in_browser) -> None:
    (tmp_path / "page.html").write_text(f"<!doctype html><html><head><title>t</title></head><body>{body}</body></html>")
    with pytest.raises(AssertionError, match=fault):
        open_in_browser(tmp_path / "page.html")
