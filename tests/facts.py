"""What a figure, a page or a table contains, as plain facts that can be kept in a file and compared: nothing depends on fonts, layout or last bits."""
import re
from collections.abc import Mapping
from functools import singledispatch

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.collections import Collection
from matplotlib.colors import to_hex, to_rgba_array
from matplotlib.figure import Figure, FigureBase
from matplotlib.image import AxesImage
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Annotation, Text
from matplotlib.ticker import FixedLocator


def rounded(value, digits: int = 4):
    "A number to some digits; what is not finite, in words."
    value = float(value)
    return float(f"{value:.{digits}g}") if np.isfinite(value) else str(value)


def colours(values) -> list[str]:
    return [to_hex(shade, keep_alpha=True) for shade in to_rgba_array(values)]     # of "none", nothing


def lean(found: dict) -> dict:
    "Without what is not there; labels that matplotlib gave are none."
    found = {name: None if isinstance(value, str) and value.startswith("_") else value for name, value in found.items()}
    return {name: value for name, value in found.items() if value not in (None, [], {}) and not (isinstance(value, list) and all(one in (None, []) for one in value))}


@singledispatch
def facts(thing):
    "Plain facts of a thing: dicts, lists, texts and numbers."
    return thing if thing is None or isinstance(thing, str) else str(thing)


@facts.register
def _number(thing: bool | int | float | np.number | np.bool_):
    return bool(thing) if isinstance(thing, bool | np.bool_) else int(thing) if isinstance(thing, int | np.integer) else rounded(thing)


@facts.register
def _text(thing: str):
    "Markup is cut at its tags; embedded pictures are left out."
    thing = re.sub(r"(data:[\w/+.-]+;base64,)[\w+/=]+", r"\1…", thing)
    return re.split(r"(?=<(?!/))", thing) if thing.startswith("<") else thing


@facts.register
def _mapping(thing: Mapping):
    return {str(name): facts(value) for name, value in thing.items()}


@facts.register
def _sequence(thing: list | tuple):
    return [facts(value) for value in thing]


@facts.register
def _table(thing: pd.DataFrame):
    return {**({} if thing.index.name is None else {"index": facts(thing.index.tolist())}), **{str(name): facts(thing[name].tolist()) for name in thing}}


@facts.register
def _array(thing: np.ndarray | torch.Tensor):
    "Small arrays as they are; of a large one its shape, range, mean, and how its rows and columns weigh."
    array = np.ma.filled(np.ma.asarray(thing, dtype=float), np.nan)
    if array.size <= 40:
        return facts(array.tolist())
    array = np.nan_to_num(array)
    moments = [np.average(array, axis=axis).ravel() @ np.sin(np.arange(array.size // array.shape[axis])) for axis in range(array.ndim)]
    return {"shape": list(array.shape), "range": facts([array.min(), array.max()]), "mean": rounded(array.mean()), "moments": facts(moments)}


@facts.register
def _legend(thing: Legend):
    return {"labels": [text.get_text() for text in thing.get_texts()], "columns": thing._ncols, "place": str(thing._loc_real), "size": rounded(thing._fontsize),
            "framed": thing.get_frame_on()}


@facts.register
def _line(thing: Line2D):
    return lean({"xy": facts(np.asarray(thing.get_xydata(), float).round(6)), "colour": colours(thing.get_color()), "style": thing.get_linestyle(), "width": facts(thing.get_linewidth()),
            "mark": [str(thing.get_marker()), facts(thing.get_markersize()), facts(thing.get_markeredgewidth()), *colours(thing.get_markerfacecolor()), *colours(thing.get_markeredgecolor())],
            "label": thing.get_label(), "alpha": facts(thing.get_alpha())})


@facts.register
def _image(thing: AxesImage):
    return lean({"of": facts(thing.get_array()), "extent": facts(thing.get_extent()), "limits": facts(thing.get_clim()), "colours": thing.get_cmap().name, "alpha": facts(thing.get_alpha()),
            "between": thing.get_interpolation()})


@facts.register
def _collection(thing: Collection):
    paths = [facts(path.vertices.round(3)) for path in thing.get_paths()]
    return lean({"kind": type(thing).__name__, "at": facts(np.asarray(thing.get_offsets())), "paths": paths, "sizes": facts(getattr(thing, "get_sizes", list)()),
            "fill": colours(thing.get_facecolor()), "edge": colours(thing.get_edgecolor()), "width": facts(np.asarray(thing.get_linewidth())),
            "values": facts(thing.get_array()), "limits": facts(thing.get_clim()) if thing.get_array() is not None else None, "colours": thing.get_cmap().name,
            "label": thing.get_label(), "rasterised": bool(thing.get_rasterized())})


@facts.register
def _patch(thing: Patch):
    vertices = thing.get_patch_transform().transform(thing.get_path().vertices)
    return lean({"corners": facts(vertices.round(4)), "fill": colours(thing.get_facecolor()) if thing.get_fill() else None, "edge": colours(thing.get_edgecolor()),
            "width": facts(thing.get_linewidth()), "label": thing.get_label()})


@facts.register
def _words(thing: Text):
    ground = thing.get_bbox_patch()
    extra = {"points to": facts(thing.xy), "offset": facts(thing.xyann)} if isinstance(thing, Annotation) else {}
    return lean({"text": thing.get_text(), "at": facts(thing.get_position()), "size": facts(thing.get_fontsize()), "weight": str(thing.get_weight()), "colour": colours(thing.get_color()),
            "aligned": [thing.get_ha(), thing.get_va()], "ground": None if ground is None else colours(ground.get_facecolor()), **extra})


def _ticks(axis) -> list | None:
    "Places and labels, where they were set by hand."
    locator = axis.get_major_locator()
    labels = [[text.get_text(), facts(text.get_fontsize()), text.get_rotation(), text.get_ha()] for text in axis.get_ticklabels()] if isinstance(locator, FixedLocator) else []
    return [facts(locator.locs), labels] if isinstance(locator, FixedLocator) else None


def _title(text: Text) -> list | None:
    return [text.get_text(), facts(text.get_fontsize()), str(text.get_weight()), *colours(text.get_color())] if text.get_text() else None


@facts.register
def _axes(thing: Axes):
    titles = [_title(text) for text in (thing._left_title, thing.title, thing._right_title, thing.xaxis.label, thing.yaxis.label)]
    parts = {name: facts(list(values)) for name, values in (("lines", thing.lines), ("images", thing.images), ("collections", thing.collections), ("patches", thing.patches),
                                                           ("texts", thing.texts), ("inside", thing.child_axes)) if len(values)}
    legend = thing.get_legend()
    return lean({"titles": titles, "shown": thing.axison, "limits": facts([*thing.get_xlim(), *thing.get_ylim()]), "ticks": [_ticks(axis) for axis in (thing.xaxis, thing.yaxis)],
            "grid": [bool(axis._major_tick_kw.get("gridOn")) for axis in (thing.xaxis, thing.yaxis)], "aspect": facts(thing.get_aspect()),
            "spines": [name for name, spine in thing.spines.items() if spine.get_visible()], "legend": None if legend is None else facts(legend), **parts})


@facts.register
def _figure(thing: FigureBase):
    named = [_title(text) for text in (thing._suptitle, thing._supxlabel, thing._supylabel) if text is not None]
    size = [facts(thing.get_size_inches().tolist()), facts(thing.dpi), type(thing.get_layout_engine()).__name__] if isinstance(thing, Figure) else None
    return lean({"size": size, "named": named, "legends": facts(list(thing.legends)), "axes": facts(list(thing._localaxes)), "parts": facts(list(thing.subfigs))})


def differences(kept, found, where: str = "") -> list[str]:
    "Where two facts differ; numbers may differ in the third digit."
    if isinstance(kept, float | int) and isinstance(found, float | int) and not isinstance(kept, bool):
        return [] if abs(kept - found) <= 2e-3 * max(1e-3, abs(kept)) + 2e-4 else [f"{where}: {found} instead of {kept}"]
    if isinstance(kept, dict) and isinstance(found, dict) and list(kept) == list(found):
        return [line for name in kept for line in differences(kept[name], found[name], f"{where}/{name}")]
    if isinstance(kept, list) and isinstance(found, list) and len(kept) == len(found):
        return [line for place, (one, other) in enumerate(zip(kept, found)) for line in differences(one, other, f"{where}/{place}")]
    return [] if kept == found else [f"{where}: {found!r:.300} instead of {kept!r:.300}"]
