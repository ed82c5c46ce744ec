"""transformers is what we are compared with, so nothing of ours may lean on it."""

import ast
from pathlib import Path

import moe

PACKAGE = Path(moe.__file__).parent
# It reads published checkpoints for the study and runs in the bench as a peer (optional extras), and that is all.
LEANING = {PACKAGE / "study" / "imported.py", *(PACKAGE / "bench").glob("*.py")}
SOURCES = sorted(set(PACKAGE.rglob("*.py")) - LEANING)


def imported_packages(source: Path) -> set[str]:
    """The outermost package of every import statement of a file, wherever it stands."""
    packages = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            packages.add((node.module or "").split(".")[0])
    return packages


def test_nothing_of_transformers_is_imported() -> None:
    imported = {package: source for source in SOURCES for package in imported_packages(source)}

    assert "torch" in imported, "the files are read"
    assert "transformers" not in imported
