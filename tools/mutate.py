"""Would a test notice? Change random lines of medvis, one at a time, and run the tests that touch them; print what survives.

    python tools/mutate.py --seed 7 --number 20
    python tools/mutate.py --seed 7 --number 20 --module evaluate/stats --jobs 2

Every mutant is made in a scratch copy of the tree. First the notebook of the module is replayed against it, then come the
test files that import the module or what it exports. A run without the change comes before the first use of each test, so
that a test which fails anyway kills nobody. Ends with 1 if mutants survive: look at each; some are equivalent."""
import argparse
import ast
import copy
import difflib
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = {"_modidx.py", "__init__.py", "__main__.py"}
COMPARISONS = {ast.Eq: ast.NotEq, ast.Lt: ast.LtE, ast.Gt: ast.GtE, ast.In: ast.NotIn, ast.Is: ast.IsNot}
COMPARISONS |= {other: one for one, other in COMPARISONS.items()}
ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult}
LOGIC = {ast.And: ast.Or, ast.Or: ast.And}


@dataclass(frozen=True)
class Mutant:
    path: str       # below the root
    line: int
    what: str       # was done
    begin: int      # bytes of the module that are replaced ...
    end: int
    text: str       # ... by this

    def of(self, source: str) -> str:
        "The module, changed."
        raw = source.encode()
        return (raw[: self.begin] + self.text.encode() + raw[self.end :]).decode()

    def diff(self, source: str) -> str:
        changed = difflib.unified_diff(source.splitlines(), self.of(source).splitlines(), lineterm="", n=0)
        return "\n".join(line for line in changed if not line.startswith(("---", "+++", "@@")))


def altered(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    "What can be made of one node: (what was done, another node)."
    def change(what, **fields):
        other = copy.copy(node)
        for name, value in fields.items():
            setattr(other, name, value)
        return what, other

    match node:
        case ast.Compare():
            for place, op in enumerate(node.ops):
                ops = list(node.ops)
                ops[place] = COMPARISONS[type(op)]()
                yield change(f"{type(op).__name__} -> {type(ops[place]).__name__}", ops=ops)
        case ast.BoolOp():
            yield change(f"{type(node.op).__name__} flipped", op=LOGIC[type(node.op)]())
        case ast.BinOp() if type(node.op) in ARITHMETIC:
            yield change(f"{type(node.op).__name__} -> {ARITHMETIC[type(node.op)].__name__}", op=ARITHMETIC[type(node.op)]())
        case ast.UnaryOp(op=ast.Not()):
            yield "not dropped", node.operand
        case ast.UnaryOp(op=ast.USub()) if not isinstance(node.operand, ast.Constant):
            yield "minus dropped", node.operand
        case ast.Constant(value=bool()):
            yield change("constant flipped", value=not node.value)
        case ast.Constant(value=int() | float()):
            value = node.value + 1 if isinstance(node.value, int) else node.value * 2 or 1.0
            yield change(f"{node.value} -> {value}", value=value)
        case ast.IfExp():
            yield change("branches swapped", body=node.orelse, orelse=node.body)
        case ast.AugAssign() | ast.Expr(value=ast.Call()) | ast.Raise():
            yield "statement dropped", ast.Pass()
        case ast.Return() if node.value is not None:
            yield change("returns None", value=ast.Constant(None))
        case ast.If() | ast.While():
            yield change("condition negated", test=ast.UnaryOp(ast.Not(), node.test))


def candidates(tree: ast.AST) -> Iterator[ast.AST]:
    "Nodes that may be changed: no annotations, no texts, no words of an error, no imports."
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns", "exc", "msg") or isinstance(tree, ast.JoinedStr):
            continue
        for node in value if isinstance(value, list) else [value]:
            if isinstance(node, ast.AST):
                yield node
                yield from candidates(node)


def mutants(source: str, path: str = "") -> Iterator[Mutant]:
    "All mutants of a module. The text around the changed node stays as it is."
    starts = list(accumulate((len(line) for line in source.encode().splitlines(keepends=True)), initial=0))
    for node in candidates(ast.parse(source)):
        for what, new in altered(node):
            old, new = (node.test, new.test) if isinstance(node, ast.If | ast.While) else (node, new)
            text = ast.unparse(ast.fix_missing_locations(new))
            text = f"({text})" if isinstance(new, ast.expr) and not isinstance(new, ast.Constant) else text
            yield Mutant(path, old.lineno, what, starts[old.lineno - 1] + old.col_offset, starts[old.end_lineno - 1] + old.end_col_offset, text)


def is_python(source: str) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:     # where a node cannot stand in brackets
        return False
    return True


def draw(paths: list[Path], number: int, seed: int) -> list[Mutant]:
    "Mutants of random lines, one a line; the same for the same seed and sources."
    rng, sources, by_line = random.Random(seed), {}, {}
    for path in sorted(paths):
        name = path.relative_to(ROOT).as_posix()
        sources[name] = path.read_text(encoding="utf-8")
        for mutant in mutants(sources[name], name):
            by_line.setdefault((name, mutant.line), []).append(mutant)
    drawn = []
    for line in rng.sample(sorted(by_line), len(by_line)):
        made = rng.choice(by_line[line])
        if len(drawn) == number:
            break
        if is_python(made.of(sources[made.path])):
            drawn.append(made)
    return drawn


def imports(source: str) -> set[str]:
    "Dotted names of medvis that a test file imports: `from a.b import c` asks for a.b and a.b.c, `import medvis`, and nothing by name, for all."
    whole = {"medvis" for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import) and node.names[0].name == "medvis"}
    asked = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("medvis")]
    return {name for node in asked for alias in node.names for name in (node.module, f"{node.module}.{alias.name}")} or whole


def reached(file: Path) -> set[str]:
    "What a test file imports of medvis, itself or by the helpers beside it (`from folders import folder_pack`)."
    source = file.read_text(encoding="utf-8")
    helpers = [file.with_name(f"{node.module}.py") for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    return imports(source).union(*(imports(one.read_text(encoding="utf-8")) for one in helpers if one.exists()))


def notebook(source: str) -> str:
    "The notebook that a module is exported from, below nbs/."
    return re.search(r"File to edit: (?:\.\./)+nbs/(.*)\.ipynb", source)[1]


def targets(path: str, source: str) -> list[str]:
    """What pytest is asked for: replays of the module's notebook and of those in its room whose modules import it; then the
    test files that import it or what it exports, themselves or by their helpers, or medvis as a whole, most names first."""
    own, dotted = ROOT / path, path.removesuffix(".py").replace("/", ".")
    room = dotted.rpartition(".")[0] + "."       # names are also imported from its door, and from its other modules
    exported = next(
        (ast.literal_eval(node.value) for node in ast.parse(source).body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"), [])
    beside = [other.read_text(encoding="utf-8") for other in sorted(own.parent.glob("*.py")) if other != own and other.name not in SKIPPED]
    books = [notebook(source), *(notebook(other) for other in beside if f"from .{own.stem} import" in other)]
    found = {}
    for file in sorted((ROOT / "tests").glob("test_*.py")):
        named = [name for name in reached(file) if name in (dotted, "medvis") or name.startswith(room) and name.rpartition(".")[2] in exported]
        if named:
            found[f"tests/{file.name}"] = len(named)
    return [*(f"tests/test_replay.py::test_replay[{book}]" for book in books), *sorted(found, key=lambda name: -found[name])]


class Tree:
    "A scratch copy of the repository, in which tests are run."

    def __init__(self, folder: Path, timeout: float):
        self.path, self.timeout = folder, timeout
        shutil.copytree(ROOT, folder, symlinks=True, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__", ".pytest_cache", "packs", "runs", "*.egg-info"))
        threads = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONDONTWRITEBYTECODE", "PYTEST_DISABLE_PLUGIN_AUTOLOAD", "HF_HUB_OFFLINE")}
        self.env = {**os.environ, **threads, "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(folder)}

    def passes(self, target: str) -> bool:
        "Whether the tests of a target pass in time; all that a late one started is ended with it."
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", target]
        with subprocess.Popen(command, cwd=self.path, env=self.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True) as running:
            try:
                return running.wait(self.timeout) in (0, 5)     # 5: all were left out
            except subprocess.TimeoutExpired:
                os.killpg(running.pid, 9)
                return False


class Judge:
    "Runs mutants in as many trees as there are jobs."

    def __init__(self, folder: Path, jobs: int, timeout: float):
        self.trees, self.sound, self.lock, self.asked = Queue(), {}, threading.Lock(), {}
        for place in range(jobs):
            self.trees.put(Tree(folder / str(place), timeout))

    def is_sound(self, target: str, tree: Tree) -> bool:
        "Whether a target passes without any change; asked once, while other jobs ask for other targets."
        with self.lock:
            asked = self.asked.setdefault(target, threading.Lock())
        with asked:
            if target not in self.sound:
                self.sound[target] = tree.passes(target)
                if not self.sound[target]:
                    print(f"{target} fails, or is late, without any change: left out", flush=True)
            return self.sound[target]

    def killer(self, mutant: Mutant) -> str | None:
        "The first target that fails, None for a survivor."
        tree = self.trees.get()
        file = tree.path / mutant.path
        source = file.read_text(encoding="utf-8")
        try:
            for target in targets(mutant.path, source):
                if not self.is_sound(target, tree):
                    continue
                file.write_text(mutant.of(source), encoding="utf-8")
                passed = tree.passes(target)
                file.write_text(source, encoding="utf-8")
                if not passed:
                    return target
            return None
        finally:
            file.write_text(source, encoding="utf-8")
            self.trees.put(tree)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="which lines are drawn")
    parser.add_argument("--number", type=int, default=20, help="mutants")
    parser.add_argument("--module", default="", help="part of a path below medvis/, e.g. evaluate or evaluate/stats; without, all")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one notebook or test file; a later one counts as failed")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    asked = parser.parse_args()
    paths = [path for path in (ROOT / "medvis").rglob("*.py") if path.name not in SKIPPED and asked.module in path.relative_to(ROOT / "medvis").as_posix()]
    drawn, survivors = draw(paths, asked.number, asked.seed), []
    if not drawn:
        parser.error(f"there is nothing to change in medvis/{asked.module}")

    def told(mutant: Mutant) -> str:
        return f"{mutant.path}:{mutant.line}  {mutant.what}\n{mutant.diff((ROOT / mutant.path).read_text(encoding='utf-8'))}"

    if asked.list:
        print("\n\n".join(map(told, drawn)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        judge = Judge(Path(folder), asked.jobs, asked.timeout)
        with ThreadPoolExecutor(asked.jobs) as pool:
            for mutant, killer in zip(drawn, pool.map(judge.killer, drawn)):
                print(f"{'SURVIVED' if killer is None else 'killed by ' + killer}  {mutant.path}:{mutant.line}  {mutant.what}", flush=True)
                survivors += [mutant] if killer is None else []
    print(f"\n{len(survivors)} of {len(drawn)} mutants survived (seed {asked.seed})")
    for mutant in survivors:
        print(f"\n{told(mutant)}")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main())
