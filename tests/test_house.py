"""The house style of the notebooks (CONTRIBUTING.md), one check a function: notebook -> list of complaints, each naming its cell."""
import ast
import functools
import re
import subprocess

import pytest
from IPython.core.inputtransformer2 import TransformerManager
from notebooks import PATHS, ROOT, Cell, Notebook, label, read

WINGS = {"data": ("phantom", "", "sets")}     # of a room, in reading order; "" is the room itself
ROOMS = ("core", "data", "encoders", "objectives", "methods", "train", "evaluate", "analyse", "widgets", "exchange", "studies", "cli")
LONGEST = 40  # lines of an exported function, without docstrings, comments and blank lines
LONGEST_CLASS = 85  # of a class: several short methods
LONGER = {"_Trainer": 100}  # a training run is one page, read from top to bottom
BANNED = {"told", "known", "there"}     # say what the thing is: metrics, manifest, rows, existing ...
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
NOTEBOOKS = {path: read(path) for path in PATHS}
MODULES = {notebook.module: notebook.name for notebook in NOTEBOOKS.values() if notebook.module}


@functools.cache
def parse(source: str) -> ast.Module:
    "Syntax tree of a code cell, magics turned into calls as IPython does."
    source = re.sub(r"\A(\s*#\|.*\n)*%%(time|capture|timeit)\b.*\n", "", source)  # these run the lines below them as Python
    return ast.parse(TransformerManager().transform_cell(source))


def code(notebook: Notebook, exported: bool | None = None) -> list[tuple[Cell, ast.Module]]:
    return [(cell, parse(cell.source)) for cell in notebook.cells if cell.kind == "code" and exported in (None, cell.exported)]


def say(cell: Cell, complaint: str) -> str:
    return f"cell {cell.number}: {complaint}"


def imported(node: ast.AST) -> list[str]:
    "Dotted names that an import statement asks for: `from a.b import c` asks for a.b.c."
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return ["." * node.level + ".".join(filter(None, (node.module, alias.name))) for alias in node.names]
    return []


def title_and_question(notebook: Notebook) -> list[str]:
    prose = [cell for cell in notebook.cells if cell.kind == "markdown"]
    if prose and re.match(r"# \S.*\n+> \S", prose[0].source):
        return []
    return ["the first prose cell must be a title, `# ...`, and under it the question that the notebook answers, `> ...`"]


def one_module_of_its_room(notebook: Notebook) -> list[str]:
    if "/" not in notebook.name:
        return []
    if notebook.cells[0].kind != "markdown":
        return ["the title stands first, before `#| default_exp`"]
    named = [cell for cell in notebook.cells if "default_exp" in cell.directives]
    if len(named) != 1 or parse(named[0].source).body or named[0] is not next(cell for cell in notebook.cells if cell.kind == "code"):
        return ["exactly one cell, the first code cell and otherwise empty, says `#| default_exp room.module`"]
    found = [] if re.match(r"\d\d_", notebook.name.split("/")[-1]) else ["the file's name must begin with its number, `02_`"]
    if notebook.module.split(".")[:-1] != notebook.name.split("/")[:-1]:
        found.append(say(named[0], f"module {notebook.module} does not belong to the room of {notebook.name}"))
    if MODULES.get(notebook.module, notebook.name) != notebook.name:
        found.append(say(named[0], f"module {notebook.module} is also made by {MODULES[notebook.module]}"))
    return found


def lines_of_code(cell: Cell, definition: ast.AST) -> int:
    "Lines of a definition that hold code: no blank lines, no comments, no docstrings (of functions, classes or fields)."
    docstrings = set()
    for node in ast.walk(definition):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings |= set(range(node.lineno, node.end_lineno + 1))
    lines = list(enumerate(cell.source.splitlines(), 1))[definition.lineno - 1:definition.end_lineno]
    return sum(bool(line.strip()) and not line.strip().startswith("#") and number not in docstrings for number, line in lines)


def small_exports(notebook: Notebook) -> list[str]:
    found = []
    for cell, body in code(notebook, exported=True):
        definitions = [node for node in body.body if isinstance(node, DEFINITIONS)]
        public = [node.name for node in definitions if not node.name.startswith("_")]
        if len(public) > 1:     # private ones share the cell of what they serve
            found.append(say(cell, f"exports {len(public)} public definitions ({', '.join(public)}); give each its cell and its test"))
        for node in definitions:
            most = LONGER.get(node.name, LONGEST_CLASS) if isinstance(node, ast.ClassDef) else LONGEST
            if (count := lines_of_code(cell, node)) > most:
                found.append(say(cell, f"{node.name} has {count} lines of code; at most {most}"))
    return found


def imports_alone(notebook: Notebook) -> list[str]:
    return [say(cell, "imports and other code share the cell; imports stand alone (they are not replayed against the module)")
            for cell, body in code(notebook) if not cell.shown_only
            if 0 < sum(is_import(node) for node in body.body) < sum(not is_magic(node) for node in body.body)]


def is_import(node: ast.AST) -> bool:
    "An import, or imports for type checkers alone."
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return all(map(is_import, node.body))
    return bool(imported(node))


def is_magic(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and ast.unparse(node).startswith("get_ipython()")


def plain_exports(notebook: Notebook) -> list[str]:
    found = []
    for cell, body in code(notebook, exported=True):
        for node in ast.walk(body):
            for name in imported(node):
                if name.split(".")[0] in ("nbdev", "fastcore", "execnb", "IPython"):
                    found.append(say(cell, f"imports {name}: notebook tools stay out of exported cells"))
                if name.endswith(".*"):
                    found.append(say(cell, f"star import of {name[:-2]}: name what is needed"))
            if isinstance(node, ast.Global):
                found.append(say(cell, f"changes the global {', '.join(node.names)}"))
            if is_magic(node):
                found.append(say(cell, "a magic in an exported cell: nbdev drops it from the module"))
    return found


def imports_look_left(notebook: Notebook) -> list[str]:
    if notebook.module is None:
        return []
    room, _, module = notebook.module.partition(".")
    found = []
    for cell, body in code(notebook, exported=True):
        for name in (name for node in ast.walk(body) for name in imported(node)):
            target = name.split(".")[1] if name.startswith("medvis.") else None
            if name.startswith("."):
                found.append(say(cell, f"relative import {name}: write `from medvis...` (nbdev makes it relative)"))
            elif target in ROOMS and room in ROOMS and ROOMS.index(target) > ROOMS.index(room):       # a page of no room may import all
                found.append(say(cell, f"imports {name}, but {target} stands to the right of {room} in {' -> '.join(ROOMS)}"))
            elif target == room and not module.endswith("__init__") and not earlier(name, notebook):
                found.append(say(cell, f"imports {name}, which no lower-numbered notebook of {room} makes"))
    return found


def earlier(name: str, notebook: Notebook) -> bool:
    "Whether `medvis.room.module[.name]` is made by a notebook that comes before this one in its room."
    parts = name.split(".")[1:]
    made_by = next((made for length in (3, 2) if (made := MODULES.get(".".join(parts[:length])) or MODULES.get(".".join([*parts[:length], "__init__"])))), None)
    return made_by is not None and reading_order(made_by) < reading_order(notebook.name)


def reading_order(name: str) -> tuple:
    "Room, wing, number."
    room, *wing, file = name.split("/")
    return room, WINGS.get(room, ("",)).index("".join(wing)), file


def used_names(body: ast.AST) -> set[str]:
    "Names a cell mentions as code, those inside a line magic (`%time f(x)`) included."
    names = {node.id for node in ast.walk(body) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(body) if isinstance(node, ast.Attribute)}
    return names | {word for node in ast.iter_child_nodes(body) if is_magic(node) for word in re.findall(r"\w+", ast.unparse(node))}


def exports_are_used(notebook: Notebook) -> list[str]:
    """A definition without a later unexported cell that uses it has no lesson and no test. Cells that never run do not count.
    A class (a record, a configuration) may also be used through a definition that speaks of it and is itself used."""
    later = [(cell.number, used_names(body)) for cell, body in code(notebook, exported=False) if not cell.shown_only]
    definitions = [(cell, node) for cell, body in code(notebook, exported=True) for node in body.body if isinstance(node, DEFINITIONS)]

    def used(cell: Cell, node: ast.AST) -> bool:
        return any(node.name in names for number, names in later if number > cell.number)

    def used_through(record: ast.ClassDef) -> bool:
        return any(record.name in used_names(node) and used(cell, node) for cell, node in definitions if node is not record)

    return [say(cell, f"{node.name} is exported, but no later cell uses it") for cell, node in definitions
            if not node.name.startswith("_") and not used(cell, node) and not (isinstance(node, ast.ClassDef) and used_through(node))]


def no_stored_errors(notebook: Notebook) -> list[str]:
    return [say(cell, f"a stored {output['ename']}; an expected error is caught and shown")
            for cell in notebook.cells for output in cell.outputs if output["output_type"] == "error"]


def text_of(output: dict) -> str:
    "What an output says where no picture and no table can be shown."
    text = output.get("text", output.get("data", {}).get("text/plain", ""))
    return text if isinstance(text, str) else "".join(text)


def rich(output: dict) -> bool:
    "A picture or a table. Beside it stands a text for where neither can be shown, such as `<Figure size ...>`."
    return any(kind.startswith("image/") or kind == "text/html" for kind in output.get("data", {}))


def shown(output: dict) -> bool:
    "A picture, a table, or at least two lines of text; the name of an object (`<Axes: ...>`) shows nothing."
    lines = text_of(output).strip().splitlines() if output.get("name") != "stderr" else []
    return rich(output) or (len(lines) >= 2 and not lines[0].startswith("<"))


def something_to_see(notebook: Notebook) -> list[str]:
    last = max((cell.number for cell, _ in code(notebook, exported=True)), default=0)
    if not last or any(shown(output) for cell in notebook.cells if cell.number > last for output in cell.outputs):
        return []
    return [f"shows nothing after the last export (cell {last}): end with a figure or a table of what it makes, and keep the output in the file"]


def telling_names(notebook: Notebook) -> list[str]:
    "No exported cell gives anything a name that could be anything."
    found = []
    for cell, body in code(notebook, exported=True):
        names = {node.id for node in ast.walk(body) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        names |= {node.arg for node in ast.walk(body) if isinstance(node, ast.arg)}
        names |= {node.name for node in ast.walk(body) if isinstance(node, DEFINITIONS)}
        found += [say(cell, f"{name} says too little: name what it is") for name in sorted(names & BANNED)]
    return found


def figures_are_pictures(notebook: Notebook) -> list[str]:
    return [say(cell, "a figure is kept as text, `<Figure size ...>`: run the cell where figures are shown (`%matplotlib inline`)")
            for cell in notebook.cells for output in cell.outputs if "<Figure size" in text_of(output) and not rich(output)]


CHECKS = (title_and_question, one_module_of_its_room, small_exports, imports_alone, plain_exports, imports_look_left,
          exports_are_used, no_stored_errors, something_to_see, figures_are_pictures, telling_names)


@pytest.mark.parametrize("path", PATHS, ids=label)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_house_style(check, path):
    notebook = NOTEBOOKS[path]
    if complaints := check(notebook):
        pytest.fail(f"nbs/{notebook.name}\n" + "\n".join(complaints), pytrace=False)


# What no other file uses begins with `_`.
OPEN_NAMES = {"main", "cli"}      # entry points
OPEN_ROOMS = ("encoders", "testing")    # classes of encoders are part of saved hashes; testing is for the tests of others


def defined(tree: ast.Module) -> dict[str, ast.stmt]:
    "Public names that a module defines at its top."
    names = {node.name: node for node in tree.body if isinstance(node, DEFINITIONS)}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        names |= {name.id: node for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return {name: node for name, node in names.items() if not name.startswith("_")}


def mentioned(tree: ast.AST) -> set[str]:
    "Names that a file fetches from elsewhere: imports, attributes, `medvis.room.module:name`."
    nodes = list(ast.walk(tree))
    names = {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    texts = (node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return names | {match[1] for text in texts if (match := re.fullmatch(r"medvis[\w.]*[.:](\w+)", text))}


def signature(node: ast.stmt) -> set[str]:
    "Names in the annotations of arguments, results and fields of a definition, and its bases."
    parts = [*node.bases] if isinstance(node, ast.ClassDef) else []
    for one in ast.walk(node) if isinstance(node, DEFINITIONS) else ():
        parts += [one.annotation] if isinstance(one, ast.arg | ast.AnnAssign) else [one.returns] if isinstance(one, ast.FunctionDef) else []
    leaves = [leaf for part in parts if part for leaf in ast.walk(part)]
    return {leaf.id for leaf in leaves if isinstance(leaf, ast.Name)} | {
        word for leaf in leaves if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str) for word in re.findall(r"\w+", leaf.value)}


def unused_names(modules: dict[str, ast.Module], others: dict[str, set[str]]) -> list[str]:
    """Public definitions of modules that no other file uses and no signature of one that is used mentions. A table `X` that is compiled
    as `_X` keeps its name. `others`: the names that each file mentions, by module for notebooks that make one, else by path."""
    found = []
    for module, tree in modules.items():
        names, used = defined(tree), set().union(OPEN_NAMES, *(words for file, words in others.items() if file != module))
        public = set(names) & used
        while more := {word for name in public for word in signature(names[name])} & set(names) - public:
            public |= more
        private = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        found += [f"{module}: {name} is used by no other file: call it _{name}" for name in sorted(set(names) - public) if f"_{name}" not in private]
    return found


@functools.cache
def package_modules() -> dict[str, ast.Module]:
    "The modules of the package without doors, by their names without `medvis.`"
    paths = [path for path in (ROOT / "medvis").rglob("*.py") if path.name not in ("__init__.py", "_modidx.py")]
    return {".".join(path.relative_to(ROOT / "medvis").with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def test_public_names_are_used():
    modules = package_modules()
    others = {name: mentioned(tree) for name, tree in modules.items()}
    for path in (*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "tools").glob("*.py"), ROOT / "setup.py", *(ROOT / "medvis").rglob("__init__.py")):
        others[str(path)] = mentioned(ast.parse(path.read_text(encoding="utf-8")))
    for notebook in NOTEBOOKS.values():
        words = set().union(*(mentioned(body) for _, body in code(notebook)))
        others[notebook.module or notebook.name] = others.get(notebook.module, set()) | words
    words = set(re.findall(r"\w+", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")))
    others["CONTRIBUTING.md"] = words
    checked = {name: tree for name, tree in modules.items() if name.split(".")[0] not in OPEN_ROOMS}
    assert not (found := unused_names(checked, others)), "\n".join(found)


def test_an_unused_public_name_is_found():
    module = ast.parse("class Row: pass\ndef rows() -> list[Row]: pass\ndef alone(): pass\n_PRIVATE = 1")
    assert unused_names({"a.b": module}, {"a.b": {"alone"}, "a.c": {"rows"}}) == ["a.b: alone is used by no other file: call it _alone"]


def repeated_names(modules: dict[str, ast.Module]) -> list[str]:
    "Public names that two modules define. A command may bear the name of the function that it calls."
    places: dict[str, list[str]] = {}
    for module, tree in modules.items():
        for name in set(defined(tree)) - OPEN_NAMES if module != "cli.commands" else ():
            places.setdefault(name, []).append(module)
    return [f"{' and '.join(rooms)} define {name}: rename one" for name, rooms in sorted(places.items()) if len(rooms) > 1]


def test_a_public_name_means_one_thing():
    assert not (found := repeated_names(package_modules())), "\n".join(found)


def test_a_name_with_two_meanings_is_found():
    modules = {"a.b": ast.parse("SIZE = 1\n_OWN = 2"), "a.c": ast.parse("SIZE = 3\n_OWN = 4\ndef fit(): pass"), "cli.commands": ast.parse("def fit(): pass")}
    assert repeated_names(modules) == ["a.b and a.c define SIZE: rename one"]


# Paths of one machine, in anything that is or would be committed.
MACHINE_PATH = re.compile(r"(?<![\w.~$}])/(work|root|home/\w+|Users/\w+|tmp|var/folders)(/[\w.-]+|\b(?!/))")


def machine_paths(text: str) -> list[str]:
    return [f"line {number}: {found.group()}" for number, line in enumerate(text.splitlines(), 1)
            for found in MACHINE_PATH.finditer(line)]


def test_no_paths_of_one_machine():
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True,
                            text=True, check=True).stdout.split("\0")
    found = []
    for path in (ROOT / name for name in listed if name):
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):  # a binary file, or one deleted and not yet committed
            continue
        found += [f"{path.relative_to(ROOT)} {line}" for line in machine_paths(text)]
    assert not found, "\n".join(found)


# The checks can fail: each meets a notebook with its fault, and a sound notebook pleases them all.
SOUND = ("# Rows\n\n> How long is a row?", "#| default_exp encoders.zzz", "#| export\nimport torch\n\nfrom medvis.data.pairs import Batch",
         "#| export\ndef unit(x):\n    'Scale to length one.'\n    return x / x.norm()", "%time unit(torch.ones(3))")


TABLE = {"output_type": "execute_result", "data": {"text/plain": ["   x"], "text/html": ["<table></table>"]}}


def notebook_of(*sources: str, name: str = "encoders/99_zzz.ipynb", outputs: tuple[dict, ...] = (TABLE,)) -> Notebook:
    "A notebook whose prose cells are those that begin with a title; the last cell has the outputs."
    cells = [Cell(number, "markdown" if source.startswith("# ") else "code", source) for number, source in enumerate(sources, 1)]
    cells[-1].outputs = list(outputs)
    return Notebook(name, cells)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_sound_notebook_passes(check):
    assert check(notebook_of(*SOUND)) == []


LONG = "#| export\ndef long(x):\n    '''One.\n\n    Two.'''\n" + "    # a remark\n\n    x += 1\n" * LONGEST
FAULTS = [
    (title_and_question, "# Rows\n\nNo question.", "question"),
    (one_module_of_its_room, "#| default_exp encoders.other", "exactly one cell"),
    (small_exports, "#| export\ndef f(): pass\ndef _g(): pass\nclass H: pass", "2 public definitions (f, H)"),
    (small_exports, LONG, f"{LONGEST + 1} lines"),
    (small_exports, LONG.replace("def long", "def short(x): pass\n\n\ndef _long"), f"_long has {LONGEST + 1} lines"),
    (imports_alone, "import os\nos.getcwd()", "share the cell"),
    (plain_exports, "#| export\nfrom math import *", "star import of math"),
    (plain_exports, "#| export\nfrom fastcore.basics import patch", "fastcore.basics.patch"),
    (plain_exports, "#| export\ndef f():\n    global g", "changes the global g"),
    (plain_exports, "#| export\n%matplotlib inline", "a magic"),
    (imports_look_left, "#| export\nfrom medvis.methods.method import Method", "methods stands to the right of encoders"),
    (imports_look_left, "#| export\ndef f():\n    import medvis.cli", "cli stands to the right of encoders"),
    (imports_look_left, "#| export\nfrom medvis.encoders import ImageFeatures", "no lower-numbered notebook"),
    (imports_look_left, "#| export\nfrom .heads import Head", "relative import .heads.Head"),
    (exports_are_used, "#| export\ndef alone(): pass", "alone is exported"),
    (telling_names, "#| export\ndef _f(known): pass", "known says too little"),
    (telling_names, "#| export\n_one, told = 1, 2", "told says too little"),
]


@pytest.mark.parametrize("check, fault, complaint", FAULTS, ids=[check.__name__ for check, *_ in FAULTS])
def test_fault_is_found(check, fault, complaint):
    cells = (fault, *SOUND[2:]) if fault.startswith("# ") else (*SOUND, fault)
    found = check(notebook_of(*cells))
    assert len(found) == 1 and complaint in found[0], found


def test_a_title_that_comes_second_is_found():
    assert one_module_of_its_room(notebook_of(SOUND[1], SOUND[0], *SOUND[2:])) == ["the title stands first, before `#| default_exp`"]


def test_wings_are_read_in_their_order(monkeypatch):
    monkeypatch.setattr(f"{__name__}.MODULES", {"data.phantom.__init__": "data/phantom/00_doors.ipynb", "data.sets.rsna": "data/sets/08_rsna.ipynb"})
    cells = ("# Packs\n\n> What is in a Pack?", "#| default_exp data.zzz")
    assert imports_look_left(notebook_of(*cells, "#| export\nfrom medvis.data.phantom import Phantom", name="data/01_zzz.ipynb")) == []
    assert len(imports_look_left(notebook_of(*cells, "#| export\nfrom medvis.data.sets.rsna import RSNA", name="data/99_zzz.ipynb"))) == 1


FIGURE = {"output_type": "display_data", "data": {"text/plain": "<Figure size 640x480 with 1 Axes>"}}
PICTURE = {"output_type": "display_data", "data": FIGURE["data"] | {"image/png": "iVBORw0KGgo="}}
LINES = {"output_type": "stream", "name": "stdout", "text": ["one\n", "two\n", "three\n"]}
OUTPUT_FAULTS = [
    (no_stored_errors, {"output_type": "error", "ename": "KeyError"}, "a stored KeyError"),
    (something_to_see, {"output_type": "execute_result", "data": {"text/plain": "<Axes: >\n\n\n"}}, "shows nothing"),
    (something_to_see, {"output_type": "stream", "name": "stdout", "text": ["200\n"]}, "shows nothing"),
    (something_to_see, LINES | {"name": "stderr"}, "shows nothing"),
    (figures_are_pictures, FIGURE, "kept as text"),
    (figures_are_pictures, LINES | {"text": "one\ntwo\n<Figure size 640x480 with 1 Axes>\n"}, "kept as text"),
]


@pytest.mark.parametrize("check, output, complaint", OUTPUT_FAULTS)
def test_fault_of_an_output_is_found(check, output, complaint):
    found = check(notebook_of(*SOUND, outputs=(output,)))
    assert len(found) == 1 and complaint in found[0], found


def test_the_last_export_is_shown():
    notebook = notebook_of(*SOUND, "#| export\nTWO = 2")
    notebook.cells[-2].outputs, notebook.cells[-1].outputs = [TABLE], []
    assert something_to_see(notebook) != [] == something_to_see(notebook_of(*SOUND, "#| export\nTWO = 2", "TWO"))


def test_what_can_be_seen():
    assert all(something_to_see(notebook_of(*SOUND, outputs=(output,))) == [] for output in (TABLE, PICTURE, LINES))
    assert len(something_to_see(notebook_of(*SOUND, outputs=()))) == 1 and figures_are_pictures(notebook_of(*SOUND, outputs=(PICTURE,))) == []
    assert something_to_see(notebook_of("# A page\n\n> What?", "1 + 1", outputs=())) == []       # it makes nothing


def test_a_use_before_the_definition_does_not_count():
    notebook = notebook_of("f()", "#| export\ndef f(): pass", "#| eval: false\nf()")
    assert exports_are_used(notebook) == ["cell 2: f is exported, but no later cell uses it"]


def test_a_record_may_be_used_through_its_maker():
    record, maker = "#| export\nclass Record: pass", "#| export\ndef make() -> Record: pass"
    assert exports_are_used(notebook_of(record, maker, "make()")) == []
    assert len(exports_are_used(notebook_of(record, maker))) == 2


def test_lower_numbered_neighbours_may_be_imported(monkeypatch):
    monkeypatch.setattr(f"{__name__}.MODULES", {"encoders.features": "encoders/01_features.ipynb"})
    source = "#| export\nfrom medvis.encoders.features import ImageFeatures"
    ahead = ("#| default_exp encoders.aaa", source)
    assert imports_look_left(notebook_of(*SOUND, source)) == []
    assert imports_look_left(notebook_of(*ahead, name="encoders/00_aaa.ipynb")) != []


def test_machine_paths_are_found():
    for folder in ("work/main", "root", "tmp/x", "home/ann/x"):
        assert machine_paths(f"see '/{folder}'"), folder
    assert not machine_paths("runs/tmp/x ../work ~/root https://a.b/work/ $TMPDIR/tmp/x")
