"""Fold the comments beside arguments and fields into the docstrings of the exported modules, in NumPy style: what a notebook shows beside an
argument, help() and an editor show below the sentence. Errors and sources stay in the sentence. Long heads of modules are wrapped. Runs after
nbdev_export; twice is as once."""
import ast
import io
import sys
import textwrap
import tokenize
from collections.abc import Iterator
from pathlib import Path

WIDTH = 120
PARAMETERS, RETURNS = "Parameters\n----------\n", "Returns\n-------\n"


def read_tokens(source: str) -> tuple[dict[int, str], list[int]]:
    "The comment of each line that has one, at its end or in a line of its own above it; and the lines in which a statement ends."
    tokens, comments = list(tokenize.generate_tokens(io.StringIO(source).readline)), {}
    for token in tokens:
        if token.type == tokenize.COMMENT:
            above = token.start[1] > 0 and token.line.lstrip().startswith("#")
            comments[token.start[0] + above] = token.string.lstrip("# ")
    return comments, [token.start[0] for token in tokens if token.type == tokenize.NEWLINE]


def entry(head: str, text: str = "") -> str:
    "A line, and what is said of it below."
    return head + "\n" + textwrap.fill(text, WIDTH - 8, initial_indent="    ", subsequent_indent="    ") if text else head


def parameter(name: str, kind: ast.expr | None, default: ast.expr | None, text: str) -> str:
    "`name : type, default: value` and what is said of it."
    facts = [before + ast.unparse(node) for before, node in (("", kind), ("default: ", default)) if node]
    return entry(f"{name} : {', '.join(facts)}" if facts else name, text)


def function_sections(node: ast.FunctionDef, comments: dict[int, str], last: int) -> list[str]:
    "A comment belongs to the last argument of its line; in the line that ends the signature, to the result."
    args = node.args
    plain, keywords = [*args.posonlyargs, *args.args], [*args.kwonlyargs]
    rows = [(one.arg, one, default) for one, default in zip(plain, [None] * (len(plain) - len(args.defaults)) + args.defaults)]
    rows += [(f"*{args.vararg.arg}", args.vararg, None)] if args.vararg else []
    rows += [(one.arg, one, default) for one, default in zip(keywords, args.kw_defaults)]
    rows += [(f"**{args.kwarg.arg}", args.kwarg, None)] if args.kwarg else []
    owners = {(default or one).end_lineno: name for name, one, default in rows}
    texts = {name: comments[line] for line, name in owners.items() if line in comments and line != last}
    shown = "\n".join(parameter(name, one.annotation, default, texts.get(name, "")) for name, one, default in rows if name not in ("self", "cls"))
    result = comments.get(last) and (entry(ast.unparse(node.returns), comments[last]) if node.returns else comments[last])
    return [PARAMETERS + shown] * bool(texts) + [RETURNS + str(result)] * bool(result)


def class_sections(node: ast.ClassDef, comments: dict[int, str]) -> list[str]:
    "The fields of a record."
    fields = [(one.target.id, one.annotation, one.value, comments.get(one.end_lineno, "")) for one in node.body if isinstance(one, ast.AnnAssign)]
    return [PARAMETERS + "\n".join(parameter(*field) for field in fields)] * any(text for *_, text in fields)


def documented(body: list[ast.stmt]) -> Iterator[tuple[ast.stmt, ast.stmt]]:
    "What is public, and what tells its arguments: for a class with an `__init__` that."
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            made = [one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"] if isinstance(node, ast.ClassDef) else []
            yield node, (made or [node])[0]
            yield from documented(node.body) if isinstance(node, ast.ClassDef) else ()


def fold(source: str) -> str:
    "The module with sections in its docstrings; nothing else of it is changed."
    (comments, ends), lines = read_tokens(source), source.splitlines(keepends=True)
    for node, teller in reversed(list(documented(ast.parse(source).body))):
        last = next(line for line in ends if line >= teller.lineno)
        sections = class_sections(teller, comments) if isinstance(teller, ast.ClassDef) else function_sections(teller, comments, last)
        sections = [one for one in sections if node is teller or one.startswith(PARAMETERS)]     # nobody asks what __init__ returns
        first, old = node.body[0], ast.get_docstring(node) or ""
        if not sections or PARAMETERS in old or RETURNS in old or first.lineno == node.lineno:
            continue
        text = "\n\n".join([old] * bool(old) + sections).replace("\\", "\\\\").replace('"""', '\\"""')
        made = textwrap.indent(f'"""{text}\n"""\n', " " * first.col_offset, lambda line: line.strip())
        lines[first.lineno - 1:first.end_lineno if old else first.lineno - 1] = [made]
    return "".join(lines)


def narrow_head(source: str) -> str:
    "The module with its question, and the list of names that nbdev writes, in lines of at most WIDTH."
    body, lines = ast.parse(source).body, source.splitlines(keepends=True)
    names = [node for node in body[:2] if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"]
    for node in reversed(names):
        text = textwrap.fill(ast.unparse(node), WIDTH, subsequent_indent=" " * len("__all__ = ["), break_long_words=False)
        lines[node.lineno - 1:node.end_lineno] = [text + "\n"]
    if body and lines[0].startswith('"""') and len(lines[0]) > WIDTH + 1 and body[0].end_lineno == 1:
        lines[0] = textwrap.fill(lines[0], WIDTH) + "\n"
    return "".join(lines)


if __name__ == "__main__":
    for path in sorted(Path(sys.argv[1]).rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        if (folded := fold(narrow_head(source) if "AUTOGENERATED" in source else source)) != source:
            path.write_text(folded, encoding="utf-8")
