"""Take live widgets out of the notebooks: views and states carry random ids, and nbdev_clean leaves them in. A picture beside a view stays."""
from pathlib import Path

from execnb.nbio import read_nb, write_nb

VIEW = "application/vnd.jupyter.widget-view+json"


def still(output: dict) -> bool:
    "Take the view out of an output; whether a picture or anything but its name is left."
    data = output.get("data", {})
    return data.pop(VIEW, None) is None or bool(set(data) - {"text/plain"})


for path in sorted((Path(__file__).resolve().parents[1] / "nbs").rglob("[!._]*.ipynb")):
    notebook = read_nb(path)
    changed = notebook["metadata"].pop("widgets", None) is not None
    for cell in notebook["cells"]:
        views = any(VIEW in output.get("data", {}) for output in cell.get("outputs", []))
        if views:
            cell["outputs"], changed = [output for output in cell["outputs"] if still(output)], True
    if changed:
        write_nb(notebook, path)
        print(f"{path.name}: took out widget views or states")
