"""Take live widgets out of the notebooks: views and states carry random ids, and nbdev_clean leaves them in."""
from pathlib import Path

from execnb.nbio import read_nb, write_nb

VIEW = "application/vnd.jupyter.widget-view+json"

for path in sorted((Path(__file__).resolve().parents[1] / "nbs").rglob("[!._]*.ipynb")):
    notebook = read_nb(path)
    changed = notebook["metadata"].pop("widgets", None) is not None
    for cell in notebook["cells"]:
        kept = [output for output in cell.get("outputs", []) if VIEW not in output.get("data", {})]
        if len(kept) < len(cell.get("outputs", [])):
            cell["outputs"], changed = kept, True
    if changed:
        write_nb(notebook, path)
        print(f"{path.name}: took out widget views or states")
