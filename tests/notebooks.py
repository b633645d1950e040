"""The notebooks as the house's checks see them: cells with their directives, and the module they export to."""
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from execnb.nbio import mk_cell
from nbdev.process import extract_directives

ROOT = Path(__file__).resolve().parents[1]
PATHS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if not any(p[0] in "._" for p in path.relative_to(ROOT).parts))


@dataclass
class Cell:
    number: int  # counted from 1, markdown cells included, as nbdev_test and JupyterLab's reader count
    kind: str  # "markdown", "code" or "raw"
    source: str
    outputs: list = field(default_factory=list)

    @cached_property
    def directives(self) -> dict[str, list[str]]:
        "`#| name values` lines at the head of a code cell, as nbdev reads them; a Quarto name keeps its colon (`eval:`)."
        return extract_directives(mk_cell(self.source), remove=False) if self.kind == "code" else {}

    @property
    def exported(self) -> bool:
        return bool({"export", "exports", "exporti"} & self.directives.keys())

    @property
    def shown_only(self) -> bool:
        "Code that is never run, `#| eval: false`."
        return self.directives.get("eval:") == ["false"]

    @property
    def tested(self) -> bool:
        "Whether nbdev_test runs the cell (tst_flags in settings.ini)."
        return self.kind == "code" and not self.shown_only and not {"slow", "notest"} & self.directives.keys()


@dataclass
class Notebook:
    name: str  # path below nbs/, "data/02_reports.ipynb"
    cells: list[Cell]

    @property
    def module(self) -> str | None:
        "The exported module below medvis: `data.reports`, or `data.__init__` for a room's door; None for a page."
        return next((cell.directives["default_exp"][0] for cell in self.cells if "default_exp" in cell.directives), None)


def read(path: Path) -> Notebook:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return Notebook(path.relative_to(ROOT / "nbs").as_posix(), [
        Cell(number, cell["cell_type"], "".join(cell["source"]), cell.get("outputs", []))
        for number, cell in enumerate(cells, 1)])


def label(path: Path) -> str:
    return path.relative_to(ROOT / "nbs").with_suffix("").as_posix()
