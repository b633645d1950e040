"""What help() and an editor say of an argument is what stands beside it in the notebook (tools/docstrings.py)."""
import ast
import importlib
import inspect
import pkgutil
import re
import sys

import pytest
from fastcore.docments import docments
from notebooks import ROOT

import medvis

sys.path.insert(0, str(ROOT / "tools"))
from docstrings import fold  # noqa: E402

SOURCE = '''\
def scale(
    x: Tensor, y=None,   # (B, N) features; "\\d" and \\alpha
    *rest: int,
    factor: float = 0.5,  # per cm
    **others,             # see resize
) -> Tensor:              # (B, N)
    "Scale. ValueError for none."
    def inner(a):  # not told
        return a   # nor this
    return x


@dataclass
class Box:
    """A box.

    Corners are exclusive."""
    x0: int     # in pixels
    x1: int = 3
    both: ClassVar = 2


class Net(nn.Module):
    def __init__(self,
        width: int,  # channels
    ):               # nobody asks
        super().__init__()

    def forward(self, x):  # (B, C)
        return x

    def _hidden(self, x):  # (B, C)
        return x


def plain(x): return x  # as it was
'''


def docs(source: str) -> dict[str, str]:
    "Docstrings by name, of whatever has one."
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return {node.name: doc for node in nodes if (doc := ast.get_docstring(node))}


def test_sections():
    assert docs(fold(SOURCE)) == {
        "scale": """\
Scale. ValueError for none.

Parameters
----------
x : Tensor
y : default: None
    (B, N) features; "\\d" and \\alpha
*rest : int
factor : float, default: 0.5
    per cm
**others
    see resize

Returns
-------
Tensor
    (B, N)""",
        "Box": "A box.\n\nCorners are exclusive.\n\nParameters\n----------\nx0 : int\n    in pixels\nx1 : int, default: 3\nboth : ClassVar, default: 2",
        "Net": "Parameters\n----------\nwidth : int\n    channels",
        "forward": "Returns\n-------\n(B, C)"}


def without_docstrings(source: str) -> str:
    "The code of a module as Python reads it."
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            del node.body[0]
    return ast.dump(tree)


def test_nothing_else_changes_and_twice_is_as_once():
    folded = fold(SOURCE)
    assert without_docstrings(folded) == without_docstrings(SOURCE) and fold(folded) == folded != SOURCE
    assert [line for line in SOURCE.splitlines() if "#" in line and line not in folded.splitlines()] == []


def doors() -> list:
    "The public functions and classes of medvis' rooms, each once, by the name of its door."
    rooms = [medvis, *(importlib.import_module(room.name) for room in pkgutil.iter_modules(medvis.__path__, "medvis.") if room.ispkg)]
    things = {getattr(room, name): f"{room.__name__}.{name}" for room in rooms for name in getattr(room, "__all__", ()) if callable(getattr(room, name))}
    return [pytest.param(thing, id=name) for thing, name in things.items()]


@pytest.mark.parametrize("thing", doors())
def test_help_tells_of_every_argument_what_the_notebook_tells(thing):
    record = "__dataclass_fields__" in vars(thing)
    teller = thing.__init__ if inspect.isclass(thing) and "__init__" in vars(thing) and not record else thing
    doc = " ".join(inspect.getdoc(thing).split())
    comments = {name: " ".join(comment.split()) for name, comment in docments(teller, full=False).items() if comment}
    if teller is not thing:
        comments.pop("return", None)      # nobody asks what __init__ returns
    missing = [name for name, comment in comments.items() if comment not in doc or name != "return" and not re.search(rf" [*]{{0,2}}{name} ", doc)]
    assert not missing, f"help({thing.__name__}) does not tell {missing}: run `make export`"
