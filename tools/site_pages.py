"""Build the site: `python tools/site_pages.py [--out _docs] [--only ROOM ...] [--widgets]`.

The sources are put together in a folder (docs/, the notebooks without nbdev's directives, a page of reference for each module), and Sphinx makes
pages of them. Nothing is fetched, and no notebook is run: nbdev_test does that."""
import argparse
import ast
import importlib
import inspect
import json
import pprint
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "nbs"
DIRECTIVE = re.compile(r"^#\|.*\n?", re.MULTILINE)
ROOMS = {  # in reading order, with what a reader finds there
    "": "The front door",
    "core": "Files, names, randomness",
    "data": "Radiographs and reports",
    "data/phantom": "Radiographs drawn by a formula",
    "data/sets": "Public data sets",
    "encoders": "Networks",
    "objectives": "Losses",
    "methods": "Methods",
    "train": "Training",
    "evaluate": "Measuring",
    "analyse": "Looking inside",
    "widgets": "Widgets",
    "exchange": "Other people's models",
    "studies": "Studies",
    "cli": "The command line",
}
FRAMES = {  # notebook -> the widget that is alive on its page
    "widgets/03_correspondence.ipynb": "correspondence",
    "widgets/06_embedding.ipynb": "embedding",
    "widgets/07_tour.ipynb": "correspondence",
}


def read_notebook(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def source_of(cell: dict) -> str:
    return "".join(cell["source"])


def module_of(notebook: dict) -> str | None:
    "`medvis.data.reports`, or None for a notebook that exports nothing; a door is its package."
    for cell in notebook["cells"]:
        if found := re.match(r"#\| *default_exp +(\S+)", source_of(cell)):
            return f"medvis.{found[1]}".removesuffix(".__init__")
    return None


def is_exported(cell: dict) -> bool:
    return cell["cell_type"] == "code" and bool(re.search(r"^#\| *export", source_of(cell), re.MULTILINE))


def shown_notebook(notebook: dict, name: str) -> dict:
    "A notebook as the site shows it: without directives and hidden cells, and with a line that says which module it makes."
    cells = []
    for cell in notebook["cells"]:
        source = source_of(cell)
        if re.search(r"^#\| *hide\b", source, re.MULTILINE):
            continue
        if cell["cell_type"] == "code":
            source = DIRECTIVE.sub("", source).strip("\n")
        if source:
            cells.append({**cell, "source": source})
    module = module_of(notebook)
    made = f"Exports [{module}](/reference/{module}.rst)" if module else "Exports nothing"
    note = f"*{made}. This page is `nbs/{name}`: run it, change it, and its cells are its tests.*"
    if name in FRAMES:
        up = "../" * (name.count("/") + 1)
        note += f'\n\nLive, with a small model of the phantom:\n\n<iframe class="widget" title="The widget" src="{up}_static/{FRAMES[name]}.html"></iframe>'
    cells.insert(1, {"cell_type": "markdown", "metadata": {}, "source": note})
    return {**notebook, "cells": cells, "metadata": {"language_info": {"name": "python", "pygments_lexer": "ipython3"}}}


def notebook_paths() -> list[Path]:
    "All notebooks but that of the README, whose place the landing page takes."
    paths = sorted(path for path in NOTEBOOKS.rglob("[!._]*.ipynb") if not any(part[0] in "._" for part in path.relative_to(ROOT).parts))
    return [path for path in paths if path != NOTEBOOKS / "index.ipynb"]


def own_method() -> str:
    "The method that CONTRIBUTING.md adds as an example."
    return re.search(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)[1]


def room_of(path: Path) -> str:
    return path.parent.relative_to(NOTEBOOKS).as_posix().removeprefix(".")


def naming(name: str) -> re.Pattern:
    "Finds a name in code, but not as an attribute of something."
    return re.compile(rf"(?<![\w.]){re.escape(name)}\b")


def cell_with(name: str, cells: list[dict], made_in: int) -> str | None:
    "The first cell after a definition that uses it: what the notebook shows and tests it with."
    for cell in cells[made_in + 1:]:
        source = DIRECTIVE.sub("", source_of(cell)).strip()
        if cell["cell_type"] == "code" and not is_exported(cell) and naming(name).search(source):
            return source
    return None


def example_of(name: str, cells: list[dict], made_in: int) -> str | None:
    "A cell that uses a name, else one that uses what is made of it: a class that nobody calls is what some function takes or gives."
    if shown := cell_with(name, cells, made_in):
        return shown
    users = [user for user, number in definitions({"cells": cells}) if number >= made_in and user != name and naming(name).search(source_of(cells[number]))]
    return next(filter(None, (cell_with(user, cells, made_in) for user in users)), None)


def definitions(notebook: dict) -> Iterator[tuple[str, int]]:
    "Names that a notebook defines, and the number of the cell."
    for number, cell in enumerate(notebook["cells"]):
        for node in ast.parse(source_of(cell)).body if is_exported(cell) else ():
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                yield node.name, number
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                yield from ((alias.asname or alias.name, number) for alias in node.names)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                yield from ((name.id, number) for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))


def public_names(module: str) -> list[str]:
    "What a module defines for others, in its own order, or a door offers."
    return list(getattr(importlib.import_module(module), "__all__", ()))


def listed(module: str) -> str:
    "The names of a door, each with its first sentence and a way to it."
    lines = []
    for name in public_names(module):
        thing = getattr(importlib.import_module(module), name)
        home = getattr(thing, "__module__", None)
        said = (inspect.getdoc(thing) or "").partition("\n")[0].replace("`", "``") if home else ""
        lines.append(f"* :py:obj:`{name} <{home}.{name}>` {said}" if home else f"* ``{name}``")
    return "\n".join(lines)


def said_of(name: str, cells: list[dict], made_in: int) -> str:
    "What is said of a constant: the comment beside it, or the prose above its cell."
    if comment := re.search(rf"^{name}\b.*?#  ?(.+)$", source_of(cells[made_in]), re.MULTILINE):
        return comment[1]
    prose = (source_of(cell).splitlines() for cell in reversed(cells[:made_in]) if cell["cell_type"] == "markdown")
    return next(filter(None, (" ".join(line.lstrip("> ") for line in lines if line and line[0] not in "#|$`-") for lines in prose)), "")


def value_entry(module: str, name: str, said: str) -> list[str]:
    "A constant: what is said of it, and the beginning of what it is."
    value = pprint.pformat(getattr(importlib.import_module(module), name), width=100, compact=True, sort_dicts=False).splitlines()
    value = [line[:200] for line in value[:12]] + ["..."] * (len(value) > 12)
    return [f".. py:data:: {module}.{name}", "", f"   {plain(said)}", "", "   .. code-block:: text", "", *(f"      {line}" for line in value)]


def plain(text: str) -> str:
    "Markdown prose as reStructuredText: code stays code, nothing else means anything."
    parts = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text).split("`")
    parts[::2] = [re.sub(r"([*|_\\])", r"\\\1", part) for part in parts[::2]]
    return "``".join(parts)


def entry(module: str, name: str, said: str, example: str | None) -> str:
    "One public name of the reference: what autodoc knows of it, and the cell that shows it."
    thing = getattr(importlib.import_module(module), name)
    if inspect.isclass(thing):
        lines = [f".. autoclass:: {module}.{name}", "   :members:", "   :member-order: bysource"]
    elif inspect.isroutine(thing):
        lines = [f".. autofunction:: {module}.{name}"]
    else:
        lines = value_entry(module, name, said)
    if example:
        shown = [f"      {line}".rstrip() for line in example.splitlines()]
        lines += ["", ".. dropdown:: Example", "", "   .. code-block:: python", "", *shown]
    return "\n".join(lines) + "\n"


def reference_page(path: Path, notebook: dict) -> str:
    "reStructuredText of a module's page."
    module, name = module_of(notebook), path.relative_to(NOTEBOOKS).with_suffix("").as_posix()
    made_in = dict(definitions(notebook))
    question = next((found[1] for cell in notebook["cells"] if (found := re.search(r"^> (.+)", source_of(cell), re.MULTILINE))), "")
    parts = [f"{module}\n{'=' * len(module)}", plain(question), f"Made by :doc:`/notebooks/{name}`.", f".. py:module:: {module}"]
    if hasattr(importlib.import_module(module), "__path__"):
        return "\n\n".join([*parts, listed(module)]) + "\n"
    for public in public_names(module):
        number = made_in[public]
        parts.append(entry(module, public, said_of(public, notebook["cells"], number), example_of(public, notebook["cells"], number)))
    return "\n\n".join(parts) + "\n"


def contents(title: str, pages: list[str], text: str = "") -> str:
    "A page that lists others."
    listed = "\n".join(pages)
    return f"# {title}\n\n{text}\n\n```{{toctree}}\n:maxdepth: 1\n\n{listed}\n```\n"


def page_of(kind: str, path: Path, left_out: bool) -> tuple[str, str] | None:
    "File below the sources, and text, of a notebook's own page or of its module's; one that is left out is a title."
    notebook, name = read_notebook(path), path.relative_to(NOTEBOOKS).as_posix()
    module = module_of(notebook)
    if kind == "notebooks":
        shown = {**notebook, "cells": notebook["cells"][:1]} if left_out else notebook
        return name, json.dumps(shown_notebook(shown, name), ensure_ascii=False)
    if module is None:
        return None
    return f"{module}.rst", f"{module}\n{'=' * len(module)}" if left_out else reference_page(path, notebook)


def put_together(source: Path, only: list[str] | None = None) -> None:
    "Write the sources of the site; with `only`, the pages of other rooms are left out: there is a title in their place."
    shutil.copytree(ROOT / "docs", source)
    for name in ("settings.ini", "DATA_USE.md", "CHANGELOG.md", "MODEL_CARD.md"):
        shutil.copy(ROOT / name, source)
    (source / "howto/siglip.py").write_text(own_method(), encoding="utf-8")
    for kind, title, index in (("notebooks", "All notebooks", "rooms"), ("reference", "Reference", "index")):
        listings = []
        for room, said in ROOMS.items():
            made = [page_of(kind, path, only is not None and room not in only) for path in notebook_paths() if room_of(path) == room]
            for file, text in filter(None, made):
                target = source / kind / file
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(text, encoding="utf-8")
            if any(made):
                listing = room.replace("/", "-") or "front"
                pages = [f"/{kind}/{file.rpartition('.')[0]}" for file, _ in filter(None, made)]
                (source / kind / f"{listing}.md").write_text(contents(said, pages), encoding="utf-8")
                listings.append(f"/{kind}/{listing}")
        (source / kind / f"{index}.md").write_text(contents(title, listings), encoding="utf-8")


def make_widgets(folder: Path) -> None:
    "The widgets of the small run that the notebooks show, each one file."
    import medvis as mv
    from medvis.testing import small_phantom
    from medvis.widgets import EmbeddingView, study_points

    run, pack = mv.load_run(NOTEBOOKS / "widgets/run"), small_phantom(36, seed=9)
    mv.CorrespondenceWidget(run.path, pack, split=None).to_html(folder / "correspondence.html")
    EmbeddingView(*study_points(run.method(), pack, split=None, count=36), colour="finding").to_html(folder / "embedding.html")


def build(out: Path, only: list[str] | None = None) -> None:
    "Put the sources together, and make pages of them. CalledProcessError for any warning."
    source = out / "source"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    put_together(source, only)
    make_widgets(source / "_static")
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-q", "-W", "--keep-going", "-j", "2", source, out / "html"]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "_docs")
    parser.add_argument("--only", nargs="*", help="rooms, for a quick look")
    arguments = parser.parse_args()
    build(arguments.out, arguments.only)
    print(f"Site: {arguments.out / 'html/index.html'}. Open it in a browser: it needs no server and no network.")
