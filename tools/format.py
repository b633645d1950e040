"""Format the exported cells of the notebooks with ruff (`--check`: only say which are not). The other cells are laid out by hand."""
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").rglob("[!._]*.ipynb"))


def exported(notebook: dict) -> list[dict]:
    "The cells that go into a module."
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code" and "".join(cell["source"]).startswith("#| export")]


def formatted(sources: list[str]) -> list[str]:
    "Each source as ruff lays it out."
    with TemporaryDirectory(dir=ROOT) as folder:
        paths = [Path(folder) / f"{index}.py" for index in range(len(sources))]
        for path, source in zip(paths, sources):
            path.write_text(source, encoding="utf-8")
        subprocess.run(["ruff", "format", "--quiet", folder], check=True)
        return [path.read_text(encoding="utf-8").rstrip("\n") for path in paths]


if __name__ == "__main__":
    notebooks = [json.loads(path.read_text(encoding="utf-8")) for path in NOTEBOOKS]
    cells = [(path, cell) for path, notebook in zip(NOTEBOOKS, notebooks) for cell in exported(notebook)]
    changed = []
    for (path, cell), source in zip(cells, formatted(["".join(cell["source"]) for _, cell in cells])):
        if source != "".join(cell["source"]):
            cell["source"], changed = source.splitlines(keepends=True), [*changed, path]
    for path in dict.fromkeys(changed):
        print(f"{path.relative_to(ROOT)}: {changed.count(path)} cells are not laid out as ruff format does")
    if "--check" in sys.argv:
        sys.exit(bool(changed))
    for path, notebook in zip(NOTEBOOKS, notebooks):
        if path in changed:
            path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
