"A table of a paper that is filled in seconds, for tests in other processes: they import it by name."
from pathlib import Path

from medvis.evaluate.claims import Claim
from medvis.studies.paper_tables import Column, PaperTable, Row, _phantom_study

ROWS = {"random-init": Row("clip", trained=False), "CLIP": Row("clip", None, {"epochs": 1})}
SAYS = Claim("CLIP helps", "nowhere", "AUROC, macro", {("CLIP", "findings"): 1.0, ("random-init", "findings"): -1.0}, 0.01)
TABLE = PaperTable("small", ROWS, {"findings": Column("tiny-linear", 1.0, head={"lrs": (0.1,), "epochs": 5})}, (0,), (SAYS,), rates=(1e-3,))


def make(out: Path, packs=None, scale="paper"):
    return _phantom_study(TABLE, Path(out), {"pairs": {"studies": 90, "size": 64, "seed": 5}})
