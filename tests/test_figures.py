"""Figures, parts of pages and tables hold what they held: their contents as plain facts (`facts.py`), made from planted inputs, beside `golden/figures.json`.

Where a figure is changed on purpose, write the file anew with `python tests/test_figures.py`, and read its difference in git."""
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from facts import differences, facts
from matplotlib.figure import Figure

from medvis.analyse import page
from medvis.analyse.alignment import alignment_distances, alignment_numbers, draw_alignment, _other_samples
from medvis.analyse.embed import as_units, draw_kinds, draw_values, embedding_table
from medvis.analyse.information import draw_information, information_curve
from medvis.analyse.live import diagnostic_figures, diagnostics_table, draw_diagnostics
from medvis.analyse.maps import as_picture, common_limits, draw_correspondence, draw_map, _heat_colours, pick_words
from medvis.analyse.prototypes import draw_diseases_and_prototypes, draw_usage, prototype_usage
from medvis.analyse.regions import choice_numbers, chosen_regions, draw_choice, draw_mean_weights, mirror_symmetry, region_overlap, weight_numbers
from medvis.analyse.represent import Aligned
from medvis.analyse.spread import draw_spread, spread_table
from medvis.data.pairs import Report
from medvis.data.phantom import Finding, PhantomStudy
from medvis.data.phantom.report import Sentence
from medvis.data.preprocessing import Preprocessing
from medvis.encoders.features import ImageFeatures
from medvis.evaluate.ground import Target
from medvis.methods.method import Correspondence
from medvis.studies.config import DemoConfig
from medvis.studies.demo import _demo_command, probe_lines
from medvis.studies.downstream import compare_families, draw_families
from medvis.studies.grounding import draw_examples, draw_findings, draw_summary, _pointing_means, _subject_table
from medvis.studies.lovt_figures import _KINDS, _draw_local, _draw_overlap
from medvis.studies.mgca_figures import _draw_word_maps, _word_numbers
from medvis.studies.show import _diagnostics_section, _how_to_repeat, pick_targets, _run_title, _top_numbers
from medvis.widgets import augmentation, embedding, phantom, shell
from medvis.widgets import correspondence as widget
from medvis.widgets.study import Outline, RunScores, StudyView, _fitting_rows, places_in, _visible_frame, word_spans

KEPT = Path(__file__).parent / "golden" / "figures.json"


def waves(*shape: int, phase: float = 0.0) -> np.ndarray:
    "Numbers in 0..1 that repeat nowhere."
    return (np.sin(1.7 * np.arange(np.prod(shape)) + phase).reshape(shape) + 1) / 2


def square(x0: int, y0: int, x1: int, y1: int, side: int = 32) -> np.ndarray:
    mask = np.zeros((side, side), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def axes(draw, *args, **settings) -> Figure:
    "A figure with one axes that `draw` has drawn in."
    figure = Figure(figsize=(3, 3))
    draw(figure.subplots(), *args, **settings)
    return figure


IMAGE = (np.add.outer(np.arange(32), 3 * np.arange(32)) + 20).astype(np.uint8)
WORDS = "Small nodule in the left lung".split()
REPORT = Report([], [], [], ["Small nodule in the <left> lung.", "No effusion, no fracture."],
                [(0, 0, 5), (0, 6, 12), (0, 13, 15), (0, 16, 19), (0, 21, 25), (0, 27, 31), (1, 0, 2), (1, 3, 11)])


def correspondence(words: int = 8, grid: tuple[int, int] = (4, 4)) -> Correspondence:
    scores = torch.tensor(waves(1, grid[0] * grid[1], words), dtype=torch.float32) * torch.arange(1, words + 1)
    mask = torch.ones(1, words, dtype=torch.bool)
    return Correspondence(scores, scores[..., :2], mask, mask[:, :2], grid)


# ---------------------------------------------------------------- analyse
METRICS = pd.DataFrame({"step": [1, 2, 3, 3, 5, 4, 6, 6], "split": ["train"] * 3 + ["validate"] + ["train"] * 3 + ["validate"], "epoch": 0, "lr": 0.1,
                        "loss": [3.0, 2.5, 2.25, 2.4, 1.5, 2.0, 1.0, 2.2], "local_image_and_its_very_long_name": [1.0, 0.5, 0.25, 0.4, np.nan, 0.2, 0.1, 0.6]})
PROBE = pd.DataFrame([
    {"encoder": encoder, "finding": finding, "fraction": fraction, "auroc": rate + shift - (0.05 if fraction < 1 else 0), "low": rate + shift - 0.1, "high": rate + shift + 0.08,
     "n": 30 if fraction < 1 else 300}
    for encoder, shift in (("mine", 0.1), ("random-init", 0.0), ("other", 0.05)) for fraction in (1.0, 0.01)
    for finding, rate in (("Edema", 0.6), ("Pneumonia & its very long name", 0.7), ("macro", 0.65))])
GAINS = pd.DataFrame({"encoder": ["mine", "mine"], "fraction": [0.01, 1.0], "gain": [0.1, 0.08], "low": [0.05, -0.02], "high": [0.15, 0.12]})
POINTING = pd.DataFrame({"finding": ["Nodule", "all", "Edema"], "hit_rate": [0.2, 0.4, 0.6], "low": [0.1, 0.3, 0.45], "high": [0.3, 0.5, 0.75], "chance": [0.02, 0.1, 0.2],
                         "targets": [5, 20, 15]})
DIAGNOSTICS = pd.DataFrame({"step": [10, 20, 30], "epoch": [0, 1, 2], "image_std": [0.5, 0.4, 0.01], "text_std": [0.6, 0.7, 0.8], "region_std_total": [0.2, 0.3, 0.4],
                            "image_uniformity": [-1.0, -2.0, -0.5], "alignment": [1.0, 0.8, 0.6], "image_rank": [1.2, 4.0, 9.0], "attention_entropy": [0.999, 0.9, 0.8],
                            "dead_prototypes": [0.1, 0.2, 0.95], "dead_by_chance": [0.05, 0.05, 0.05]})
POINTS = pd.DataFrame({"x": waves(14), "y": waves(14, phase=1), "kind": list("aaaabbbcdefghi"), "overlap": np.r_[0, 0, 0, waves(11)]})
FEATURES = {name: ImageFeatures(torch.tensor(waves(5, 4, 6, phase=phase)), torch.tensor(waves(5, 6, phase=phase + 1)), (2, 2)) for name, phase in (("one", 0.3), ("two", 2.0))}
ALIGNED = Aligned(*(torch.tensor(waves(4, 4, 3, phase=phase)) for phase in range(4)),
                  torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool), (2, 2))
CURVES = {"mine": pd.DataFrame({"step": [1, 2, 3, 3, 4, 5], "split": ["train", "train", "train", "validate", "train", "validate"], "nats": [0.1, 0.2, 0.5, 0.3, 0.6, 0.4]}),
          "other": pd.DataFrame({"step": [1, 2], "split": ["train", "validate"], "nats": [0.3, 0.2]})}
USAGE = (waves(9, 3), waves(9, 3, phase=2), waves(4, 3, phase=1))


def usage() -> list:
    table, numbers = prototype_usage(*USAGE)
    return [table, numbers, draw_usage(table, numbers)]


def diseases() -> Figure:
    points = POINTS.assign(disease=POINTS.kind, prototype=[1, 1, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11])
    return draw_diseases_and_prototypes(points, {"nmi": 0.5, "nmi_shuffled": 0.25, "ami": 0.125})


def choices() -> list:
    table = chosen_regions(correspondence(), [7])
    many = pd.DataFrame({"sentence": [0, 1, 2, 3, 4, 5], "region": [5, 5, 0, 3, 9, 11]})
    return [table, draw_choice(IMAGE, (4, 4), table, REPORT.sentences), draw_choice(IMAGE, (3, 4), many, [f"Sentence {k}." for k in range(6)], square(4, 6, 20, 22))]


ANALYSE = {
    "looks": lambda: [page.STYLE, page._DARK, page.SERIES, page.MARKS, page._ABOUT, page._CSS],
    "heat": lambda: [_heat_colours(waves(12), (3, 4)), _heat_colours(waves(12), (3, 4), (0.25, 0.5)), _heat_colours(waves(12), (3, 4), (0.5, 0.5), 0.5), as_picture(torch.tensor(waves(3, 4, 5)))],
    "map": lambda: [axes(draw_map, IMAGE, waves(12), (3, 4), square(4, 6, 20, 22), "a $title"), axes(draw_map, IMAGE), axes(draw_map, IMAGE[:24], waves(16), (4, 4), None, "", (0, 2))],
    "words": lambda: [pick_words(correspondence(), 0), draw_correspondence(IMAGE, correspondence(), 0, WORDS, masks={1: square(0, 0, 16, 32), 4: square(16, 0, 32, 32), 9: None}),
                      draw_correspondence(IMAGE, correspondence(), 0, WORDS, [0, 5], width=1.5, limits=(0, 10)), common_limits(waves(3, 4))],
    "curves": lambda: [page._curve_names(METRICS), page.curves_figure(METRICS), page.curves_figure(METRICS[:0], ["loss"])],
    "long curve": lambda: page.curves_figure(pd.DataFrame({"step": np.arange(160), "split": "train", "loss": waves(160)})),
    "probe": lambda: [page._finding_order(PROBE), page.probe_figure(PROBE), page.probe_figure(PROBE.assign(low=0.2), [0.01]), page._probe_summary(PROBE)],
    "pointing": lambda: [page.pointing_figure(page._pointing_order(POINTING)), page.pointing_figure(POINTING[:1].assign(high=0.1)), page._pointing_summary(POINTING)],
    "markup": lambda: [page.to_html("two\n\nparts <b>"), page.to_html(pd.DataFrame({"a": [1.23456, np.nan], "b": ["short", "<b>"]})),
                       page.to_html(pd.DataFrame({"a": [1], "b": ["a sentence that is longer than thirty letters"]})), page.to_html({"a": {"b": Path("c")}, "d": "é<"}),
                       page.to_html(["one", {"two": 2}]), page.to_html(page.probe_figure(PROBE, [1.0])), page.to_html(Figure()), page.short("x" * 22), page.short("x" * 23),
                       page._marked_text(REPORT, [7, 1, 4]), page.headlines([("0.9", "what <it> is", "how sure"), ("1", "2", "3")]), page._colour_bar((-0.5, 2))],
    "svg": lambda: page._themed_svg(page.pointing_figure(POINTING)).partition("<defs>")[0].rpartition("<style>")[2],
    "card": lambda: [page.tile(IMAGE, caption="a & b", note="note"), page.tile(IMAGE, waves(16), (4, 4), square(1, 1, 9, 9), "a"),
                     page.correspondence_card(IMAGE, correspondence(), 0, REPORT, masks={1: square(0, 0, 16, 32), 4: square(16, 0, 32, 32)}, title="study <1>"),
                     page.correspondence_card(IMAGE, correspondence(), 0, REPORT, [2], show_text=False)],
    "page": lambda: [page._page("<title>", [page.Section("open", ["text"]), page.Section("shut", [{"a": 1}], folded=True)], "below", page.headlines([("1", "2", "3")]),
                               page.Live("live", "about", page.Html("<p>here</p>"), "let a = 1;")), page._page("plain", [])],
    "sections": lambda: [{"title": one.title, "folded": one.folded, "parts": [part if isinstance(part, str | pd.DataFrame) else [type(part).__name__, len(part)] for part in one.parts]}
                         for one in page.run_sections(METRICS, PROBE, POINTING, [page.Html("<p>card</p>")], {"Settings": {"a": 1}})],
    "exact": lambda: [page.exact_for({"processor": "Zen", "cpu_capability": "AVX2", "threads": 1}), page.exact_for({"platform": "Linux", "threads": 2, "gpu": "A100"}, 3), page.exact_for({})],
    "spread": lambda: [spread_table(FEATURES), draw_spread(spread_table(FEATURES), {"two": "Two"})],
    "alignment": lambda: [_other_samples(ALIGNED.texts, ALIGNED.mask), alignment_distances(ALIGNED), alignment_numbers({"a": alignment_distances(ALIGNED)}),
                          draw_alignment({"a": alignment_distances(ALIGNED), "b": alignment_distances(ALIGNED).assign(distance=1.0)})],
    "kinds": lambda: [axes(draw_kinds, POINTS, "kind"), axes(draw_kinds, POINTS, "kind", ["b", "a"], size=4), axes(draw_values, POINTS, "overlap", 0.8), as_units([[3, 4], [0, 0]]),
                      embedding_table(waves(2, 2), [[1.0, 2], [3, 4]], study=[5, 6])],
    "weights": lambda: [draw_mean_weights(waves(16), (4, 4), IMAGE, square(4, 6, 20, 22), "weight"), draw_mean_weights(waves(12) ** 9, (2, 6), waves(1, 20, 30)), draw_mean_weights(waves(81), (9, 9), IMAGE),
                        region_overlap([square(4, 6, 20, 22)], (4, 4)), mirror_symmetry(waves(16), (4, 4)), weight_numbers(waves(2, 16), [square(0, 0, 9, 20)] * 2, (4, 4))],
    "choice": lambda: [*choices(), choice_numbers([0, 5, 5, 9], (4, 4)), choice_numbers([0, 5, 5], (4, 4), [square(0, 0, 9, 9), square(8, 8, 16, 16), square(0, 0, 8, 8)])],
    "prototypes": lambda: [*usage(), diseases()],
    "information": lambda: [draw_information(CURVES, 64), draw_information({"long": pd.DataFrame({"step": np.arange(90), "split": "train", "nats": waves(90)})}),
                            information_curve(SimpleNamespace(metrics=pd.DataFrame({"step": [1, 2], "split": ["train", "train"], "mutual_information": [-0.5, np.nan]}), path=Path("x")))],
    "diagnostics": lambda: [draw_diagnostics(DIAGNOSTICS), draw_diagnostics(DIAGNOSTICS[:2]), diagnostic_figures(DIAGNOSTICS), diagnostics_table(DIAGNOSTICS.assign(text_rank=np.nan))],
}


# ---------------------------------------------------------------- studies
FOUND = [Finding("Nodule", "left", "upper", 1, square(20, 4, 26, 10), (20, 4, 26, 10)), Finding("Pleural Effusion", "right", "none", 3, square(0, 24, 12, 32), (0, 24, 12, 32)),
         Finding("Support Devices", "none", "none", 2, square(2, 0, 5, 3), (2, 0, 5, 3), "pacemaker")]
SAID = [Sentence("There is a small nodule.", 0, [(0, 5, None), (6, 8, None), (9, 10, None), (11, 16, 0), (17, 23, 0)]),
        Sentence("A large & right effusion below.", 1, [(0, 1, None), (2, 7, 1), (10, 15, 1), (16, 24, 1), (25, 30, None)]),
        Sentence("Nodule .", 0, [(0, 6, 0)], "impression")]
STUDY = PhantomStudy(IMAGE, "report", "p", "phantom-0000003", "PA", {}, {}, FOUND, SAID)


class Planted(dict):
    "A phantom of few studies, by number or by id."

    def study(self, study_id):
        return self[int(study_id.rpartition("-")[2])]


PLANTED = Planted({3: STUDY, 5: PhantomStudy(IMAGE.T, "report", "p", "phantom-0000005", "PA", {}, {}, FOUND[:1], SAID[:1])})
WORD_MAPS = pd.DataFrame([
    {"study": f"phantom-{study:07d}", "word": word, "text": text, "finding": finding, "side": 4, "inside": 0.25 + 0.1 * word, "area": 0.125, "hit": word % 2,
     "map": (waves(16, phase=word + study) * 0.1 * (word + 1)).astype(np.float16)}
    for study, word, text, finding in ((3, 0, "nodule", "Nodule"), (3, 1, "effusion", "Pleural Effusion"), (3, 2, "nodule", "Nodule"), (5, 3, "nodule", "Nodule"))])
EXAMPLES = pd.DataFrame([{"study": "phantom-0000003", "text": finding.lower(), "finding": finding, "scores": (scale * waves(16, phase=seed + scale)).tolist(), "side": 4, "subject": subject, "seed": seed}
                         for seed in (1, 0) for subject, scale in (("mine", 1.0), ("random-init", 0.1)) for finding in ("Nodule", "Pleural Effusion")])
HITS = pd.DataFrame([
    {"subject": subject, "seed": seed, "grain": grain, "finding": finding, "hit_rate": rate + 0.05 * seed + shift, "chance": 0.1 + 0.3 * rate, "other_image": rate - 0.1 * seed,
     "best_fixed_point": rate, "cnr": 2 * rate, "targets": 10 + 5 * place}
    for subject, shift in (("clip", 0.1), ("random-init", -0.1), ("lovt", 0.4)) for seed in (0, 1) for grain in ("word", "sentence")
    for place, (finding, rate) in enumerate((("Nodule", 0.2), ("Edema", 0.3), ("Pleural Effusion", 0.4), ("all", 0.3)))])
PROBES = pd.DataFrame([{"subject": subject, "seed": seed, "fraction": fraction, "encoder": encoder, "finding": "macro", "auroc": 0.5 + 0.1 * seed + 0.1 * fraction + 0.05 * (encoder != "random-init")}
                       for subject in ("clip", "random-init", "lovt") for seed in (0, 1) for fraction in (0.1, 1.0) for encoder in (f"{subject}-{seed}", "random-init")])
RESULTS = pd.DataFrame([{"family": family, "protocol": family, "fraction": fraction, "metric": "Dice", "encoder": encoder, "seed": seed, "value": 0.3 + shift + 0.01 * seed + 0.1 * fraction}
                        for family in ("detection", "grounding") for fraction in (0.02, 1.0) for encoder, shift in (("pre-trained", 0.2), ("random-init", 0.0)) for seed in range(4)])
LOCAL = pd.DataFrame({"x": waves(8), "y": waves(8, phase=2), "kind": np.repeat(_KINDS, 2)})
RUN = SimpleNamespace(path=Path("runs/a b"), config={"method": "lovt", "preset": "tiny"}, diagnostics=DIAGNOSTICS,
                      manifest={"data": {"path": "pack"}, "seed": 3, "packages": {"torch": "2", "timm": None, "numpy": "1"}, "python": "3.11", "processor": "Zen", "threads": 1})
DATA = {kind: SimpleNamespace(studies=pd.DataFrame({"split": ["train"] * 1200 + ["test"]}), manifest={"source": {"kind": kind, "size": 64, "seed": 0}}, path=Path("packs/mine")) for kind in ("phantom", "folder")}


class Rates:
    "A pointing game of planted rates."

    def __init__(self, shift: float):
        self.shift = shift

    def rate(self, grain: str):
        value = 0.5 + self.shift + 0.1 * (grain == "word")
        return SimpleNamespace(hit_rate=SimpleNamespace(value=value, low=value - 0.1, high=value + 0.2), chance=SimpleNamespace(value=0.125))


def target(item: int, finding: str, role: str = "name") -> Target:
    fields = {name: None for name in Target.__dataclass_fields__} | {"item": item, "finding": finding, "role": role}
    return Target(**fields)


def rare_first() -> dict:
    targets = [target(0, "Edema"), target(1, "Edema"), target(1, "Nodule"), target(2, "Nodule", "side"), target(3, "Edema"), target(4, "Fracture"), target(1, "Fracture"), target(5, "Mass")]
    return {count: {item: [one.finding for one in found] for item, found in pick_targets(targets, count).items()} for count in (2, 4)}


def well(folder: Path) -> list:
    "Whether the section tells what is wrong; a run has it when its file is there."
    (folder / "diagnostics.jsonl").write_text("")
    ill, = _diagnostics_section(SimpleNamespace(path=folder, diagnostics=DIAGNOSTICS))
    fine, = _diagnostics_section(SimpleNamespace(path=folder, diagnostics=DIAGNOSTICS[:2]))
    return [ill.title, ill.parts[0], len(ill.parts[1]), ill.parts[2], fine.parts[0], _diagnostics_section(RUN)]


STUDIES = {
    "word maps": lambda: [_draw_word_maps(WORD_MAPS, PLANTED), _word_numbers(WORD_MAPS)],
    "local": lambda: _draw_local(LOCAL, {"regions_purity": 0.5, "sentences_purity": 0.75}),
    "overlap": lambda: _draw_overlap({"a": POINTS, "b": POINTS.assign(overlap=POINTS.overlap / 2)}, {name: {"auroc": 0.9, "purity": 0.5, "purity_by_chance": 0.1} for name in "ab"}),
    "grounding": lambda: [_pointing_means(HITS), _pointing_means(HITS, ("Nodule", "Edema"), "sentence"), _subject_table(HITS, PROBES)],
    "grounding, drawn": lambda: [draw_summary(HITS), draw_findings(HITS, "sentence"), draw_examples(EXAMPLES, ["mine", "random-init"], ("Nodule", "Pleural Effusion"), PLANTED)],
    "families": lambda: [compare_families(RESULTS), draw_families(compare_families(RESULTS))],
    "demo": lambda: [probe_lines(PROBE.assign(constant=np.where(PROBE.encoder == "other", 2, 0), probes=6), GAINS), _demo_command(DemoConfig()), _demo_command(DemoConfig(out=Path("a b"), epochs=2))],
    "show": lambda: [rare_first(), _top_numbers(PROBE, GAINS, Rates(0.1), Rates(0)), _top_numbers(None, GAINS, Rates(0)), _top_numbers(PROBE, None, None), _run_title(RUN, DATA["phantom"]),
                     _run_title(RUN, DATA["folder"]), _how_to_repeat(RUN).html(), _how_to_repeat(RUN, "make & run").html()],
}


# ---------------------------------------------------------------- widgets
SENTENCES = ["Small nodule in the left upper zone.", "No effusion.", "Heart size is normal."]
SPANS = word_spans(SENTENCES)


def scores_of(grid: tuple[int, int], frame=(0.0, 0.0, 1.0, 1.0), unread: int = 0) -> RunScores:
    words, sentences = (waves(count, grid[0] * grid[1], phase=count).astype(np.float32) for count in (len(SPANS), 3))
    words[len(SPANS) - unread:] = np.nan
    return RunScores(grid, frame, {"words": words, "sentences": sentences, "prototypes": waves(2, grid[0] * grid[1]).astype(np.float32)}, [4, 7], 0.1, 9 if unread else None)


RUNS = {"mine": scores_of((4, 4)), "with a name that is far too long for its picture": scores_of((3, 4), (0.125, 0.25, 0.875, 1.0), unread=2)}
OUTLINES = [Outline("Nodule", square(20, 4, 26, 10), (1, 4), (0,)), Outline("Mass", square(0, 24, 12, 32))]
VIEW = StudyView(2, "study-2", "p", "test", IMAGE, SENTENCES, SPANS, {"Nodule": 1.0, "Edema": 0.0, "Mass": np.nan}, OUTLINES, RUNS,
                 {name: waves(2, run.grid[0] * run.grid[1], phase=k) > 0.5 for k, (name, run) in enumerate(RUNS.items())},
                 {name: np.array([True, True]) for name in RUNS}, ["report"] * 3)
PINS = {"words": [1, 3], "sentences": [1], "prototypes": [0], "boxes": [[0.25, 0.5, 0.75, 1.0]]}
STATE = {"window": (128, 200), "selection": PINS, "scale": "common", "colours": "magma", "opacity": 0.5, "threshold": 0.25, "smooth": True, "outlines": True, "hidden": []}
TABLE = POINTS.rename(columns={"kind": "letter"}).assign(
    text=[f"sentence {k} of a report that goes on and on, and then on again, to its very end" for k in range(14)], picture=[0, 1, -1, *[0] * 11], x0=0.25, y0=0.0, x1=0.75, y1=0.5,
    rare=["none"] * 10 + ["–"] * 4, many=[f"name {k % 12}" for k in range(14)], value=[np.inf, np.nan, *np.arange(12.0)])
PICTURES = [IMAGE, IMAGE[:20]]


def unpacked(data: dict) -> dict:
    "The browser's data with its buffers as numbers."
    arrays = {name: np.frombuffer(data[name], kind) for name, kind in (("x", "f4"), ("y", "f4"), ("picture", "i4"), ("box", "f4"))}
    columns = [{**one, "of": np.frombuffer(one["of"], "i4" if "names" in one else "f4")} for one in data["columns"]]
    return {**arrays, "texts": data["texts"], "columns": columns, "pictures": len(data["ends"]) // 4}


def packed(masked: bool = False) -> list:
    head, (picture, *bodies) = widget.pack_study(VIEW, masked)
    return [head, len(picture), [np.frombuffer(body, "<f4") for body in bodies], widget.page_state({"findings": [["Nodule", 9], ["Edema", 9]], "query": "a"}, [(head, [])] * 2)]


def scales() -> list:
    run, scores = RUNS["mine"], RUNS["mine"].scores["words"][1]
    ends = {scale: widget._scale_ends(run, scores, PINS, scale) for scale in ("common", "normalised", "raw")}
    look = [widget._heat_picture(run, scores, ends["common"], "viridis", 0.5, 0.25, smooth) for smooth in (True, False)]
    return [ends, look, widget._heat_picture(run, scores, (1, 1), "viridis", 0.5, 0.0, True), widget._combined(run, PINS), widget._combined(run, {})]


def study_pictures() -> list:
    "Pictures and numbers, and the report's words, but not their places: those hang on fonts."
    out = []
    for selection in (PINS, widget._NOTHING, {**widget._NOTHING, "words": [1]}, {**widget._NOTHING, "sentences": [0]}):
        figure = widget._correspondence_figure(VIEW, list(RUNS), {**STATE, "selection": selection, "smooth": selection is PINS, "outlines": selection is not PINS})
        *films, text = figure.axes
        words = [[one.get_text(), one.get_color(), one.get_bbox_patch() is not None] for one in text.texts]
        out.append([facts(figure.get_size_inches().tolist()), [facts(film) for film in films], [facts(ax.get_position().bounds) for ax in figure.axes], words])
    return out


def explored() -> list[dict]:
    "The plane as it is, with a selection and a hidden kind, coloured by a number, and without text."
    views = [embedding.EmbeddingView(TABLE, PICTURES), embedding.EmbeddingView(TABLE, PICTURES, "value"), embedding.EmbeddingView(TABLE, PICTURES, show_text=False)]
    views[2].hidden, views[2].selection = ["a"], [6, 2]
    return [{"colour": view.colour, "shades": [facts(list(map(str, view.shades()[0]))), facts(view.shades()[1])], "figure": facts(view.to_figure()), "rows": view.selected.index.tolist()} for view in views]


def turned(degrees: float, mirrored: bool = False) -> torch.Tensor:
    "Places on the film of the pixels of a view, for `outline` and `motion`."
    y, x = torch.meshgrid(torch.arange(12.0), torch.arange(10.0), indexing="ij")
    angle, x = np.radians(degrees), -x if mirrored else x
    return torch.stack([x * np.cos(angle) - y * np.sin(angle) + 30, x * np.sin(angle) + y * np.cos(angle) + 20, (y > 1).float()])


WIDGETS = {
    "shell": lambda: [shell.themed("<p>", "explorers").partition("</style>")[2], shell.state_json({"a": b"\x00", "b": "</"}),
                      *shell.standalone("<t>", "SCRIPT", "STYLE", {"a": 1}).partition("</script>")[0:1]],
    "study": lambda: [VIEW.words, [VIEW.hits(name, grain) for name in RUNS for grain in ("words", "sentences")], [VIEW.misses(name) for name in RUNS], [VIEW.alignment(name) for name in RUNS],
                      OUTLINES[0].paths, places_in(REPORT, REPORT.sentences, word_spans(REPORT.sentences), False), _visible_frame(Preprocessing(size=64, crop=0.8)),
                      _fitting_rows(pd.DataFrame({"study_id": [1, 2], "sentences": [["A b."], ["b c."]]}), pd.DataFrame({"Edema": [1, 0]}), "B", "Edema")],
    "packed study": lambda: [packed(), packed(True)[0]["sentences"], widget._masked_text("No effusion, 2 cm."), widget._beyond(VIEW, list(RUNS)), widget._beyond(VIEW, [list(RUNS)[1]])],
    "scales": scales,
    "pictures of a study": study_pictures,
    "points": lambda: [unpacked(embedding._point_data(TABLE, PICTURES)), unpacked(embedding._point_data(TABLE[["x", "y", "text"]], show_text=False)), embedding._spread_examples(TABLE, "letter"),
                       embedding._spread_examples(TABLE, None), embedding._name_column(pd.Series([f"n{k}" for k in range(50)]))["colours"][:2]],
    "explored points": explored,
    "regions and texts": lambda: [[embedding._region_rows(VIEW, name) for name in RUNS], embedding._text_rows(VIEW, "mine", "words", [1, 2]), embedding._text_rows(VIEW, "mine", "sentences", [0, 2])],
    "films": lambda: [augmentation._picture_tile(IMAGE[:20], "alt <", "caption &", outlines={"#123456": np.array([[1, 2], [3.25, 4], [5, 6]])}), augmentation._picture_tile(IMAGE, "a", "b", "#654321"),
                      axes(augmentation._draw_film, IMAGE[:20], "title", "#123456"), axes(augmentation._draw_film, IMAGE, "$"), augmentation._grey_levels(torch.tensor(waves(2, 4, 4)), Preprocessing(mean=0.25, std=0.5)),
                      [augmentation._outline(turned(*how)) for how in ((0,), (10, True))], [augmentation._motion(turned(*how)) for how in ((0,), (12,), (-7, True))]],
    "phantom": lambda: [phantom._film_markup(STUDY), phantom._film_markup(PLANTED[5], False), [phantom._describe_finding(finding) for finding in FOUND], phantom._report_markup(STUDY),
                        [phantom.marked(sentence) for sentence in SAID], phantom._draw_study(STUDY)],
}

CASES = {**ANALYSE, **STUDIES, **WIDGETS}


def made(name: str):
    "A case's facts as they come back from a file."
    return json.loads(json.dumps(facts(CASES[name]())))


@pytest.fixture(scope="module")
def kept() -> dict:
    return json.loads(KEPT.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", CASES)
def test_it_holds_what_it_held(name, kept):
    assert (far := differences(kept[name], made(name))) == [], "\n".join(far[:20])


def test_nothing_else_is_kept(kept):
    assert list(kept) == list(CASES)


def test_diagnostics_are_shown_if_recorded(tmp_path):
    title, ill, charts, table, fine, nothing = well(tmp_path)
    assert title == "Is it well?" and charts == 7 and len(table) == 9 and nothing == []
    assert "images look alike" in ill and "No sign of collapse." in fine and "look alike" not in fine


def test_maps_of_one_drawing_share_a_scale():
    "A flat map beside one that points is pale, in a figure and in a page; the same scale stands below both."
    scores = torch.zeros(1, 16, 2)
    scores[0, 5] = torch.tensor([1.0, 0.1])
    correspondence = Correspondence(scores, scores, torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool), (4, 4))
    heats = [ax.images[1].get_array()[..., 3].max() for ax in draw_correspondence(IMAGE, correspondence, 0, ["sure", "unsure"], [0, 1]).axes[1:]]
    assert heats[0] > 0.6 and heats[1] < 0.02
    card = page.correspondence_card(IMAGE, correspondence, 0, REPORT, [0, 1])
    assert card.count(">0.00<i ") == 2 and card.count("</i>1.00<") == 2
    assert page.tile(IMAGE, scores[0, :, 1], (4, 4), None, "nodule", "", (0.0, 1.0)) in card


def written(cases: dict) -> str:
    "JSON with lists of numbers and short texts on one line each."
    return re.sub(r"\[\n([^\[\]{}]*?)\s+\]", lambda found: "[" + re.sub(r"\s*\n\s*", " ", found[1]).strip() + "]", json.dumps(cases, indent=1, ensure_ascii=False)) + "\n"


if __name__ == "__main__":
    KEPT.write_text(written({name: made(name) for name in CASES}), encoding="utf-8")
