"""Whether the documentation names everything public, and whether its links lead somewhere.

That its code blocks do what they show is a doctest: ``pytest --doctest-glob='*.md' docs``.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest

import jaxlrp

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
NAV = re.compile(r"^\s*- (?:[^:]+: )?(\S+\.md)$", re.MULTILINE)


def public_names() -> Iterator[str]:
    """The names that ``jaxlrp/__init__.py`` imports as themselves, which is how it lists what is public."""
    for name, alias in re.findall(r"^from \S+ import (\w+) as (\w+)$", Path(jaxlrp.__file__).read_text(), re.MULTILINE):
        assert name == alias
        yield name


def without_code(page: Path) -> str:
    """Drop fenced blocks and code spans, where brackets are no links."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", lambda code: re.sub(r"[\[\]()]", "", code[0]), text)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as Markdown's table of contents makes them."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", without_code(page), re.MULTILINE):
        ascii_only = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
        found.add(re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", ascii_only).strip().lower()))
    return found


def links() -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        for target in LINK.findall(without_code(page)):
            if "://" not in target:
                yield page, target


def test_there_are_pages_names_and_links() -> None:
    # The tests below would pass on nothing at all.
    assert len(PAGES) >= 8
    assert {"lrp", "Composite", "targets", "Ledger"} <= set(public_names())
    assert len(list(links())) > 10


@pytest.mark.parametrize("name", sorted(public_names()))
def test_the_reference_has_every_public_name(name: str) -> None:
    assert re.search(rf"^::: jaxlrp\.{name}$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)


def test_the_reference_has_no_other_names() -> None:
    listed = re.findall(r"^::: jaxlrp\.(\S+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted({*public_names(), "attributions"})


@pytest.mark.parametrize(("page", "target"), [pytest.param(*link, id=f"{link[0].name}-{link[1]}") for link in links()])
def test_a_link_leads_somewhere(page: Path, target: str) -> None:
    path, _, anchor = target.partition("#")
    there = (page.parent / path).resolve() if path else page
    assert there.is_file()
    assert there.is_relative_to(DOCS)  # a link out of the folder breaks on the built site
    assert not anchor or anchor in anchors(there)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_in_the_table_of_contents_once(page: Path) -> None:
    assert NAV.findall((ROOT / "mkdocs.yml").read_text(encoding="utf-8")).count(page.name) == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_starts_with_its_title(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert not re.search(r"(?<![\w.])/(work|home|root|tmp|usr)/", text)  # no path of anybody's machine
