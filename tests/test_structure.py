"""The architecture, held by reading the imports: a file imports only from lower ranks."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ffnprobe

ROOT = Path(ffnprobe.__file__).parent
RANKS = (
    ("errors", "spectrum", "family", "scaling", "regression"),
    ("progress", "disk", "shipped", "ffn", "clustering", "statistics", "vocabulary", "backoff", "memory"),
    ("result", "figure", "taps", "hub", "lock", "tensors"),
    ("check", "manifest", "norms", "placement"),
    ("checkpoint",),
    ("models", "corpus", "executors"),
    ("forward", "fingerprint", "unembedding"),
    ("sinks",),
    ("stream",),
    ("shards", "intervene"),
    ("run", "attribution"),
    ("analyzers",),
    ("report",),
    ("options",),
    ("cli",),
)
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def part(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imported(path: Path) -> set[str]:
    """The parts of ffnprobe that a file imports, absolutely or relatively."""
    package = ("ffnprobe", *path.relative_to(ROOT).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = (*base, *(node.module or "").split(".")) if node.module else base
            names = [(*module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        else:
            continue
        found |= {name[1] for name in names if name[0] == "ffnprobe" and len(name) > 1}
    return found & RANK.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    mine = RANK[part(path)]
    above = {name for name in imported(path) if name != part(path) and RANK[name] >= mine}
    assert not above, f"{path.name} (rank {mine}) imports {above}"


def test_every_part_has_a_rank():
    assert {part(path) for path in FILES} == RANK.keys()


def test_models_alone_imports_transformer_lens():
    importers = {
        path.stem
        for path in FILES
        if "import transformer_lens" in (text := path.read_text()) or "from transformer_lens" in text
    }
    assert importers == {"models"}


def test_importing_the_package_imports_no_heavy_library():
    code = "import sys, ffnprobe.cli; print({'torch', 'transformers', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_every_public_name_is_there():
    for name in ffnprobe.__all__:
        assert getattr(ffnprobe, name) is not None
