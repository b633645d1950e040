"""A method is asked, never recognised: one that no registry knows is measured and drawn by its own answers, and no module asks for a class."""
import ast
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import medvis
from medvis.analyse.alignment import alignment_distances, draw_alignment
from medvis.analyse.maps import draw_correspondence
from medvis.analyse.represent import aligned_studies, image_features
from medvis.analyse.spread import draw_spread, spread_table
from medvis.data.pairs import Pairs, read_batch
from medvis.data.prepare import PhantomConfig, prepare_phantom
from medvis.methods import METHODS, Correspondence, Method
from medvis.methods.settings import SETTINGS
from medvis.methods.method import NoCorrespondence, add_up, cosine_correspondence, cross_attend, phantom_tokenizer
from medvis.objectives.contrastive import clip_loss, l2_normalize
from medvis.studies.figures import Shown
from medvis.studies.lovt_figures import _weight_map, _weights
from medvis.studies.mgca_figures import _pair_embeddings, _word_map_rows
from medvis.train.diagnostics import alignment, _attention_entropy, _dead_prototypes, diagnose, spread
from medvis.widgets.embedding import study_points
from medvis.widgets.study import Studies

TINY = {"tiny": (dict(image="tiny_resnet", image_weights=None, text="tiny-bert", dim=16), dict(lr=1e-3, max_tokens=128))}


class Silent(Method):
    "Says nothing of itself. It embeds no vectors, and its scores are logits."

    presets = TINY

    def __init__(self, config, tokenizer=None):
        super().__init__(config, tokenizer)
        self.see, self.say = (nn.Linear(width, config.dim) for width in (self.image_encoder.region_dim, self.text_encoder.dim))

    def forward(self, batch):
        image, text = self.encode(batch)
        return add_up(mine=clip_loss(self.see(image.regions).mean(1), self.say(text.whole), 0.2))

    def correspondence(self, batch):
        image, text = self.encode(batch)
        regions = self.see(image.regions)
        scores = (regions @ self.say(x).mT for x in (text.words, text.sentences))
        return Correspondence(*scores, text.word_mask, text.sentence_mask, image.grid)

    def embed_image(self, image):
        return self.see(self.image_encoder(image).regions)

    def embed_text(self, batch):
        return self.say(self.read(batch).whole)


class Own(Silent):
    "Learned attention pooling, cosines at a temperature of its own, prototypes."

    def __init__(self, config, tokenizer=None):
        super().__init__(config, tokenizer)
        self.ask = nn.Linear(self.image_encoder.region_dim, 1)
        self.prototypes = nn.Parameter(torch.randn(7, config.dim))

    def pool_image(self, features):
        shares = (40 * self.ask(features.regions)[..., 0]).softmax(1)
        return (shares[:, None] @ features.regions)[:, 0], shares

    def embed_image(self, image):
        return self.see(self.pool_image(self.image_encoder(image))[0])

    def correspondence(self, batch):
        image, text = self.encode(batch)
        regions, words, sentences = self.see(image.regions), self.say(text.words), self.say(text.sentences)
        return cosine_correspondence(regions, words, sentences, text, image.grid, temperature=0.2, learned=("sentences",))

    def align(self, batch):
        image, text = self.encode(batch)
        return cross_attend(self.see(image.regions), self.say(text.sentences), text.sentence_mask, image.grid, 0.2)


class Apart(Own):
    "Its images and texts have vectors of one width in two spaces."

    shared_space = False


@pytest.fixture(scope="module")
def words():
    return phantom_tokenizer(60)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_phantom(PhantomConfig(out=tmp_path_factory.mktemp("pack") / "p", studies=40, size=64, seed=5, progress=False))


@pytest.fixture(scope="module")
def make(words, data):
    "A method of a kind in evaluation mode, its pairs, and their first batch."
    def make(kind, **changes):
        torch.manual_seed(0)
        method = kind.from_preset("tiny", words, **changes).eval().requires_grad_(False)
        pairs = Pairs(data, method.tokenizer, method.preprocessing, replace(method.sampling, sentences="all"))
        return method, pairs, read_batch(pairs, range(12))
    return make


def entropy(scores, mask, temperature):
    return float(_attention_entropy((scores / temperature).softmax(1).mT[mask]).mean())


def test_diagnostics_take_a_method_at_its_word(make):
    method, _, batch = make(Own)
    told, seen = diagnose(method, [batch]), method.image_encoder(batch.image)
    shares = (40 * method.ask(seen.regions)[..., 0]).softmax(1)
    whole = torch.einsum("bn,bnd->bd", shares, seen.regions)
    image, text = method.see(whole), method.say(method.read(batch).whole)
    assert told["whole_std"] == pytest.approx(spread(whole)["total"], rel=1e-4) != spread(seen.whole)["total"]
    assert told["image_std"] == pytest.approx(spread(image)["total"], rel=1e-4)
    assert told["alignment"] == pytest.approx(float(alignment(image, text)), rel=1e-4)
    found = method.correspondence(batch)
    assert told["attention_entropy"] == pytest.approx(entropy(found.sentences, found.sentence_mask, 0.2), rel=1e-5)
    assert abs(told["attention_entropy"] - entropy(found.sentences, found.sentence_mask, 1.0)) > 0.01
    assert (told["dead_prototypes"], told["dead_by_chance"]) == _dead_prototypes(torch.cat([image, text]), method.prototypes)


def test_defaults_hold_where_a_method_says_nothing(make):
    method, pairs, batch = make(Silent)
    told, found = diagnose(method, [batch]), method.correspondence(batch)
    assert set(told) == {"whole_std", "attention_entropy", *(f"region_std_{name}" for name in ("total", "per_sample", "centroids"))}
    assert told["attention_entropy"] == pytest.approx(entropy(found.sentences, found.sentence_mask, 1.0), rel=1e-5)
    assert told["whole_std"] == pytest.approx(spread(method.image_encoder(batch.image).whole)["total"], rel=1e-5)
    assert found.learned == () and method.pair_vectors(batch) is None and method.prototypes is None
    assert image_features(method, pairs, range(3)).weights is None
    with pytest.raises(TypeError, match="Silent, as it is configured, has no space"):
        aligned_studies(method, pairs, range(3))


def test_vectors_in_two_spaces_have_no_distance(make):
    method, _, batch = make(Apart)
    assert "alignment" not in diagnose(method, [batch]) and "image_rank" in diagnose(method, [batch])


def test_no_vectors_no_dead_prototypes(make):
    method, _, batch = make(Silent)
    method.prototypes = torch.eye(16)
    assert "dead_prototypes" not in diagnose(method, [batch])


@pytest.mark.parametrize("name, changes, says", [("mgca", dict(token_weight=0.0), "layer4"), ("global-mi", dict(layer="layer3"), "last layer")])
def test_a_method_without_maps_is_diagnosed_all_the_same(name, changes, says, make):
    method, pairs, batch = make(METHODS[name], **changes)
    told = diagnose(method, [batch])
    assert "attention_entropy" not in told and {"image_std", "text_rank", "region_std_total"} <= set(told)
    with pytest.raises(NoCorrespondence, match=says):
        method.correspondence(batch)
    with pytest.raises(ValueError, match=says):     # which the command line turns into a line
        Studies(method, pairs.pack)[0]
    with pytest.raises(TypeError, match="no space"):
        aligned_studies(method, pairs, range(2))


def test_the_figures_of_a_method_of_ones_own(make):
    method, pairs, batch = make(Own)
    seen, shares = image_features(method, pairs, range(12), batch_size=5), method.pool_image(method.image_encoder(batch.image))[1]
    torch.testing.assert_close(seen.weights, shares, rtol=1e-4, atol=1e-5)
    met, pair = aligned_studies(method, pairs, range(12), batch_size=5), method.pair_vectors(batch)
    scores = method.correspondence(batch).sentences
    torch.testing.assert_close((met.regions @ met.texts.mT).mT[met.mask], scores.mT[met.mask], rtol=1e-3, atol=1e-4)
    for k in range(12):    # what a sentence gathers, by hand
        by_hand = l2_normalize((scores[k] / 0.2).softmax(0).T @ met.regions[k])
        torch.testing.assert_close(met.from_image[k][met.mask[k]], by_hand[met.mask[k]], rtol=1e-3, atol=1e-4)
    drawn = Shown(None, method, pairs, 12)
    assert np.allclose(_weight_map(drawn).weights.item(), image_features(method, pairs).weights.mean(0), atol=1e-5) and 0 < _weights(drawn).in_lungs.item() < 1
    images, texts = _pair_embeddings(method, pairs)
    assert np.allclose(images[:12], pair[0], atol=1e-4) and texts.shape == images.shape == (len(pairs), 16)
    figures = [draw_spread(spread_table({"own": seen})), draw_alignment({"own": alignment_distances(met)}),
               draw_correspondence(batch.image[0], method.correspondence(batch), 0, pairs.report(0).words)]
    assert all(isinstance(figure, Figure) for figure in figures)


def test_word_maps_have_the_methods_own_temperature(make):
    method, pairs, _ = make(Own)
    rows = _word_map_rows(method, pairs, list(range(6)))
    names = pairs.pack.studies["study_id"].astype(str).tolist()
    for row in rows.itertuples():
        found = method.correspondence(read_batch(pairs, [names.index(row.study)]))
        share = (found.words[0, :, row.word] / 0.2).softmax(0)
        assert np.allclose(np.asarray(row.map, np.float32), share, atol=1e-3)
    assert len(rows)


def test_the_widgets_show_a_method_of_ones_own(make, data):
    method, pairs, _ = make(Own)
    silent, *_ = make(Silent)
    studies = Studies({"own": method, "silent": silent}, data)
    view = studies[0]
    assert (view.runs["own"].temperature, view.runs["silent"].temperature) == (0.2, 1.0)
    found = method.correspondence(read_batch(studies.pairs["own"], [0]))
    assert np.allclose(view.runs["own"].scores["words"], found.words[0, :, found.word_mask[0]].T, atol=1e-5)
    assert list(Studies(method, data).runs) == ["Own"]
    points, _ = study_points(method, data, count=4, regions=4)
    assert set(points.point) == {"region", "sentence"}
    with pytest.raises(TypeError, match="no space"):
        study_points(silent, data, count=2)


HOUSE = {name: kind for name, kind in METHODS.items() if kind.__module__.startswith("medvis.")}  # another test may register its own

# What the methods of the house say: temperature, grains that are learned, one space, grain of what aligns.
SAYS = [
    ("convirt", {}, 0.1, (), True, "sentence"),
    ("convirt", dict(whole_image="attention", temperature=0.3), 0.3, (), True, "sentence"),
    ("clip", {}, 0.1, (), True, "sentence"),
    ("vse", {}, 0.1, (), True, "sentence"),
    ("dsve", {}, 1.0, (), True, "sentence"),
    ("gloria", {}, 0.25, ("words",), True, "word"),
    ("gloria", dict(local_weight=0.0), 0.25, (), True, "word"),
    ("lovt", {}, 1.0, ("sentences",), True, "sentence"),
    ("lovt", dict(local_image_weight=0.0, local_report_weight=0.0, temperature=0.2), 0.2, (), True, None),
    ("lovt", dict(global_weight=0.0, local_weights=False), 1.0, ("sentences",), False, "sentence"),
    ("mgca", {}, 0.07, ("words",), True, "word"),
    ("mgca", dict(learned_attention=True), 1.0, ("words",), True, "word"),
    ("mgca", dict(token_weight=0.0, layer="layer4", tau_instance=0.4), 0.4, (), True, "word"),
    ("global-mi", {}, 1.0, (), False, None),
    ("contrastive-binary", {}, 1.0, (), False, None),
    ("caption-lstm", {}, 1.0, ("words",), False, None),
    ("caption-transformer", {}, 1.0, ("words",), False, None),
    ("caption-transformer", dict(shown=0), 1.0, ("words",), False, None),
    ("local-mi", {}, 1.0, ("sentences",), False, None),
    ("mixture-mi", {}, 0.1, ("sentences",), True, "sentence"),
]


@pytest.mark.parametrize("name, changes, temperature, learned, shared, grain", SAYS, ids=lambda value: value if isinstance(value, str) else "")
def test_what_a_method_says_of_itself(name, changes, temperature, learned, shared, grain, make):
    method, pairs, batch = make(METHODS[name], **changes)
    found, met = method.correspondence(batch), method.align(batch)
    assert (found.temperature, found.learned, method.shared_space) == (temperature, learned, shared)
    assert (None if met is None else met.grain) == grain
    assert (method.prototypes is not None) == (name == "mgca")
    image, text = method.pair_vectors(batch)
    assert image.ndim == text.ndim == 2 and len(image) == len(text) == 12 and (not shared or image.shape == text.shape)
    pooled, shares = method.pool_image(method.image_encoder(batch.image))
    assert pooled.ndim == 2 and (shares is not None) == (name in ("clip", "dsve") or "attention" in changes.values() or name == "lovt" and "global_weight" not in changes)
    assert shares is None or torch.allclose(shares.sum(1), torch.ones(12), atol=1e-5)


def test_every_method_of_the_house_is_asked():
    assert {name for name, *_ in SAYS} == {name for name, kind in HOUSE.items() if kind.reads_text} == HOUSE.keys() - {"simclr", "byol", "pixelpro", "supervised"}


def test_an_image_option_that_is_not_set_stays_away():
    for kind in HOUSE.values():
        options = kind.Config(**kind.presets["tiny"][0]).image_options
        assert None not in options.values() and set(options) <= {"layer", "upsample", "local_grid"}
    assert METHODS["local-mi"].Config().image_options == {"local_grid": "4x4x512"}
    assert METHODS["gloria"].Config().image_options == {"layer": "layer3", "upsample": 299}


# Nobody asks what class a method is.
ROOMS = ("train", "evaluate", "analyse", "widgets", "exchange", "studies")
KINDS = {kind.__name__ for kind in HOUSE.values()}
HOMES = {kind.__module__.rpartition(".")[2] for kind in HOUSE.values()}


def names(node: ast.AST) -> set[str]:
    return {one.id for one in ast.walk(node) if isinstance(one, ast.Name)} | {one.attr for one in ast.walk(node) if isinstance(one, ast.Attribute)}


def class_questions(source: str) -> list[str]:
    "Lines of a module that ask, in one way or another, what class a method is."
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            home = (node.module or "").split(".")
            if "methods" in home and (set(home) & HOMES or {alias.name for alias in node.names} & (KINDS | HOMES)):
                found.append((node.lineno, "imports a method's class"))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
            if node.func.id in ("isinstance", "issubclass") and names(node.args[1]) & (KINDS | {"Method", "METHODS"}):
                found.append((node.lineno, "asks for a method's class"))
            if node.func.id in ("getattr", "hasattr") and ast.unparse(node.args[0]).rpartition(".")[2] == "method":
                found.append((node.lineno, "asks what attributes a method has"))
        elif isinstance(node, ast.FunctionDef) and node.args.args and node.args.args[0].annotation is not None:
            dispatches = any(names(one) & {"singledispatch", "register"} for one in node.decorator_list)
            if dispatches and names(node.args.args[0].annotation) & (KINDS | {"Method"}):
                found.append((node.lineno, "is chosen by a method's class"))
    return [f"line {number}: {complaint}" for number, complaint in sorted(found)]


@pytest.mark.parametrize("path", [path for room in ROOMS for path in sorted((Path(medvis.__file__).parent / room).glob("*.py"))],
                         ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_no_module_asks_what_class_a_method_is(path):
    assert class_questions(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("source", [
    "from ..methods import LoVT, Method", "from medvis.methods.mgca import token_heads", "from ..methods import mgca",
    "isinstance(method, LoVT)", "isinstance(run, Method)", "isinstance(x, A | methods.GLoRIA)", "isinstance(m, METHODS['lovt'])",
    "getattr(method, 'image_pool', None)", "hasattr(self.method, 'pool')", "@singledispatch\ndef align(method: Method, batch): pass",
    "@align.register\ndef _(method: LoVT, batch): pass"])
def test_questions_are_found(source):
    assert len(class_questions(source)) == 1


@pytest.mark.parametrize("source", [
    "from ..methods import METHODS, Method", "from ..core.choices import check_choice", "isinstance(run, str | Path)",
    "getattr(method.config, 'lr')", "@singledispatch\ndef render(part: object): pass"])
def test_other_questions_are_none_of_our_business(source):
    assert class_questions(source) == []


@pytest.mark.parametrize("name, setting", [(name, setting) for name, (config, _) in SETTINGS.items() for setting, field in config.__dataclass_fields__.items() if field.type is None])
def test_a_setting_without_a_meaning_is_refused(name, setting):
    "As the command line does, which takes None alone."
    with pytest.raises(ValueError, match=f"{setting} is 5, but has no meaning for {METHODS[name].__name__}"):
        METHODS[name].from_preset("tiny", **{setting: 5})
