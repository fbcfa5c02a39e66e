"""What the README shows is true: its example runs as it stands."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def example() -> str:
    return re.search(r"```python\n(.*?)```", README.read_text(), re.S)[1]


def test_the_example_runs_on_a_tiny_model(folder_of, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = example().replace("[11]", "[1]").replace('"smollm2-135m"', repr(str(folder_of("llama"))))
    exec(compile(code.replace("[42]", "[2]"), "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "Expansion by 3 multiplies the soft rank" in printed and "silu 3.0" in printed
    assert (tmp_path / "ranks.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_example_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(example(), "README.md", "exec"), {})
    assert "silu 2.6666" in capsys.readouterr().out


def test_every_link_and_image_of_the_readme_is_there():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
