"""The README's Python snippets run, in their order, as one program."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def anchors(page: str) -> list[str]:
    """What the headings of a page are called in links."""
    headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_snippets_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    assert len(snippets("python")) >= 5
    for snippet in snippets("python"):
        exec(compile(snippet, "README.md", "exec"), scope)
    assert len(scope["optimizer"].history) == 0
    assert (tmp_path / "run.jsonl").exists()


def test_commands_are_named():
    text = README.read_text()
    assert "make demo" in text
    assert "make test" in text


@pytest.mark.parametrize("page", ["README.md", "benchmarks/README.md", "recipes/README.md"])
def test_links_lead_somewhere(page):
    path = README.parent / page
    for link in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        file, _, section = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        assert not section or section in anchors(target.read_text()), link
