"""The README's Python snippets run, in their order, as one program."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


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
