"""Retrieval and zero-shot classification against enumeration, loops and scikit-learn, on ties and on degenerate input; the door of every method."""
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, balanced_accuracy_score, roc_auc_score, top_k_accuracy_score

from medvis.data.prepare import PhantomConfig, prepare_phantom
from medvis.evaluate import retrieve
from medvis.evaluate.retrieve import _DIRECTIONS, PairScores, _first_relevant
from medvis.methods import METHODS, LoVT
from medvis.methods.settings import methods_with_text
from medvis.methods.method import Method, phantom_tokenizer

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return prepare_phantom(PhantomConfig(out=tmp_path_factory.mktemp("phantom") / "pack", studies=150, size=64, progress=False))


@pytest.fixture(scope="module")
def tokenizer():
    return phantom_tokenizer(100)


# ---------------------------------------------------------------- ranks

def enumerate_orders(scores, relevant, ks):
    "Expected hits, precisions and rank over all orders of the candidates that respect the scores."
    found = []
    for order in itertools.permutations(range(len(scores))):
        if all(scores[a] >= scores[b] for a, b in zip(order, order[1:])):
            hit = [relevant[c] for c in order]
            found.append([any(hit[:k]) for k in ks] + [sum(hit[:k]) / k for k in ks] + [hit.index(True) + 1])
    return np.mean(found, axis=0)


@PROPERTY
@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=6).filter(lambda rows: any(r for _, r in rows)), st.integers(0, 10**6))
def test_shared_ties_are_the_mean_over_orders(rows, seed):
    scores, relevant = np.array([[float(s) for s, _ in rows]]), np.array([[r for _, r in rows]])
    ks = range(1, len(rows) + 1)
    def answer(scores, relevant):
        first = _first_relevant(scores, relevant)
        return np.concatenate([[retrieve._hit_at(k, *first)[0] for k in ks], [retrieve._precision_at(k, scores, relevant)[0] for k in ks],
                               retrieve._expected_rank(*first)])
    np.testing.assert_allclose(answer(scores, relevant), enumerate_orders(scores[0], relevant[0].tolist(), ks), atol=1e-9)
    order = np.random.default_rng(seed).permutation(len(rows))
    np.testing.assert_allclose(answer(scores[:, order], relevant[:, order]), answer(scores, relevant), atol=1e-12)
    np.testing.assert_allclose(answer(np.exp(scores) - 9, relevant), answer(scores, relevant), atol=1e-12)


def test_recall_without_ties_is_scikit_learns():
    scores = np.random.default_rng(0).normal(size=(60, 60)) + 2 * np.eye(60)
    table = retrieve._retrieval_metrics(scores, np.eye(60, dtype=bool), np.arange(60), (1, 5, 10), 10).set_index("metric")
    for k in (1, 5, 10):
        assert np.isclose(table.loc[f"hit@{k}", "value"], top_k_accuracy_score(np.arange(60), scores, k=k))
    ranks = [sorted(-row).index(-row[i]) + 1 for i, row in enumerate(scores)]
    assert table.loc["median rank", "value"] == np.median(ranks) and table.loc["median rank", "low"] <= np.median(ranks) <= table.loc["median rank", "high"]


@PROPERTY
@given(st.integers(1, 6), st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_chance_is_the_mean_over_blind_orders(candidates, counts):
    counts = np.minimum(counts, candidates)
    relevant = np.arange(candidates) < counts[:, None]
    table = retrieve._retrieval_metrics(np.random.default_rng(0).random(relevant.shape), relevant, np.arange(len(counts)), (1, 2, 3), 5).set_index("metric")
    ranks = [[min(order.index(i) for i in range(r)) + 1 for order in itertools.permutations(range(candidates))] for r in counts]
    for k in (1, 2, 3):
        assert np.isclose(table.loc[f"hit@{k}", "chance"], np.mean([np.mean(np.array(each) <= k) for each in ranks]))
        assert np.isclose(table.loc[f"precision@{k}", "chance"], np.mean(counts / candidates))
        assert np.isnan(table.loc[f"precision@{k}", "value"]) == (k > candidates)
    assert table.loc["median rank", "chance"] == np.median(np.concatenate(ranks))


def test_intervals_draw_patients():
    draw = np.random.default_rng(1)
    scores, patients = draw.normal(size=(40, 40)) + np.eye(40), np.arange(40) // 4
    table = retrieve._retrieval_metrics(scores, np.eye(40, dtype=bool), patients, (5,), 200).set_index("metric")
    single = retrieve._retrieval_metrics(scores, np.eye(40, dtype=bool), np.arange(40), (5,), 200).set_index("metric")
    assert (table["value"] == single["value"]).all() and table.loc["hit@5", "low"] < table.loc["hit@5", "value"] < table.loc["hit@5", "high"]
    nothing = retrieve._retrieval_metrics(scores, np.zeros((40, 40), bool), patients)
    assert nothing[["value", "low", "high", "chance"]].isna().all(axis=None) and (nothing["n"] == 0).all()
    one = retrieve._retrieval_metrics(np.zeros((1, 1)), np.ones((1, 1), bool), ["a"], (1, 5)).set_index("metric")
    assert one.loc["hit@5", "value"] == one.loc["median rank", "value"] == one.loc["hit@1", "chance"] == 1 and np.isnan(one.loc["precision@5", "value"])


# ---------------------------------------------------------------- tables of studies

def some_pairs(seed=0, images=12, texts=8) -> PairScores:
    draw = np.random.default_rng(seed)
    of = lambda n: pd.DataFrame({"study_id": [f"s{i}" for i in draw.integers(0, texts, n)], "patient_id": [f"p{i}" for i in draw.integers(0, 5, n)]})
    return PairScores(draw.integers(0, 4, (images, texts)).astype(np.float32), of(images).assign(image_id=[f"i{i}" for i in range(images)]),
                      of(texts).assign(study_id=[f"s{i}" for i in range(texts)]))


def test_both_notions_of_relevant_by_hand():
    for seed in range(3):
        pairs = some_pairs(seed)
        classes = {f"s{i}": ("", "Edema", "Nodule")[i % 3] for i in range(8)}
        table = retrieve.retrieval_table(pairs, classes, (1, 3), 10).set_index(["direction", "relevant", "metric"])
        for direction, scores, queries, candidates in ((_DIRECTIONS[0], pairs.scores, pairs.images, pairs.texts), (_DIRECTIONS[1], pairs.scores.T, pairs.texts, pairs.images)):
            hits, shares = [], []
            for row, study in zip(scores, queries["study_id"]):
                same = (candidates["study_id"] == study).tolist()
                if any(same):
                    hits.append(enumerate_top(row, same, 3)[0])
                kind = [classes[other] for other in candidates["study_id"]]
                kept = [place for place, one in enumerate(kind) if one]
                if classes[study] and any(kind[place] == classes[study] for place in kept):
                    shares.append(enumerate_top(row[kept], [kind[place] == classes[study] for place in kept], 3))
            found = table.loc[direction]
            assert np.isclose(found.loc[("same study", "R@3"), "value"], np.mean(hits)) and found.loc[("same study", "R@3"), "n"] == len(hits)
            np.testing.assert_allclose([found.loc[("same class", f"{name}@3"), "value"] for name in ("hit", "precision")], np.mean(shares, axis=0))
        assert ("same class", "median rank") not in found.index and ("same study", "precision@1") not in found.index


def enumerate_top(scores, relevant, k):
    "Hit and precision at k, tied candidates in all orders, by choosing which of those tied at the border get in."
    last = sorted(scores, reverse=True)[k - 1]
    above, tied = ([r for s, r in zip(scores, relevant) if test(s)] for test in (lambda s: s > last, lambda s: s == last))
    ways = [above + list(chosen) for chosen in itertools.combinations(tied, k - len(above))]
    return np.mean([any(way) for way in ways]), np.mean([sum(way) / k for way in ways])


def test_saved_tables_come_back(tmp_path):
    pairs = some_pairs()
    retrieve._save_pairs(tmp_path / "new" / "pairs.npz", pairs)
    again = retrieve._load_pairs(tmp_path / "new" / "pairs.npz")
    assert (again.scores == pairs.scores).all() and again.scores.dtype == np.float32
    pd.testing.assert_frame_equal(again.images, pairs.images, check_dtype=False)
    pd.testing.assert_frame_equal(again.texts, pairs.texts, check_dtype=False)
    prompts = retrieve.prompt_table(["Edema"])
    asked = PairScores(np.zeros((12, len(prompts)), np.float32), pairs.images, prompts)
    retrieve._save_pairs(tmp_path / "prompts.npz", asked)
    pd.testing.assert_frame_equal(retrieve._load_pairs(tmp_path / "prompts.npz").texts, prompts, check_dtype=False)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["pairs.npz"]


@PROPERTY
@given(st.integers(0, 10**6), st.integers(0, 3))
def test_exclusive_classes(seed, per_class):
    draw = np.random.default_rng(seed)
    targets = pd.DataFrame(draw.choice([1, 0, np.nan], (20, 3)), columns=list("abc"))
    found = retrieve._exclusive_class(targets)
    assert found.tolist() == [names[0] if len(names) == 1 else "" for names in ([c for c in "abc" if row[c] == 1] for _, row in targets.iterrows())]
    some = retrieve._exclusive_class(targets, per_class, seed)
    assert all(a in ("", b) for a, b in zip(some, found))
    assert all((some == c).sum() == min(per_class, (found == c).sum()) for c in "abc")


# ---------------------------------------------------------------- the methods' door

@pytest.mark.parametrize("name", methods_with_text())
def test_every_method_compares_images_with_texts(name, pack, tokenizer):
    torch.manual_seed(0)
    method = METHODS[name].from_preset("tiny", tokenizer)
    state = {key: value.clone() for key, value in method.state_dict().items()}
    texts = [["No pleural effusion.", "Mild cardiomegaly."], ["Clear lungs."], ["Left pneumothorax is seen."]]
    table = retrieve._similarity_table(method, retrieve._embed_images(method, pack, range(5), 2), *retrieve._embed_texts(method, texts, 2))
    assert table.shape == (5, 3) and np.isfinite(table).all() and table.std() > 0 and method.training
    assert all(torch.equal(value, state[key]) for key, value in method.state_dict().items())
    for i, t in itertools.product((0, 4), range(3)):                             # one pair at a time
        image = retrieve._embed_images(method, pack, [i])
        parts = [[sentence] for sentence in texts[t]] if method.text_unit == "sentence" else [texts[t]]
        alone = [retrieve._similarity_table(method, image, *retrieve._embed_texts(method, [part]))[0, 0] for part in parts]
        np.testing.assert_allclose(table[i, t], np.mean(alone), atol=2e-5, rtol=1e-4)
    assert method.text_unit == ("sentence" if name in ("convirt", "clip", "gloria", "local-mi", "mixture-mi", "caption-lstm", "caption-transformer") else "report")


def test_what_cannot_be_compared_is_refused(pack, tokenizer):
    bare = Method(LoVT.Config(image="tiny_resnet", image_weights=None, text="tiny-bert"), tokenizer)
    for call in (lambda: bare.embed_image(torch.zeros(1, 1, 64, 64)), lambda: bare.embed_text(None)):
        with pytest.raises(NotImplementedError, match="Method"):
            call()
    method = LoVT.from_preset("tiny", tokenizer)
    with pytest.raises(ValueError, match="2 of 3 texts.*0, 2"):
        retrieve._embed_texts(method, [[], ["Clear lungs."], ["..."]])
    with pytest.raises(ValueError, match="'tset'"):
        retrieve._retrieval_scores(method, pack, "tset")
    with pytest.raises(ValueError, match="'tset'"):
        retrieve._zero_shot_scores(method, pack, retrieve.prompt_table(), "tset")
    with torch.no_grad():
        next(method.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match="not numbers"):
        retrieve._retrieval_scores(method, pack)


class Films:
    "A pack of studies with none, one or two images, of which one has no report; the brightness of an image tells its study."

    def __init__(self, studies=9):
        counts = [2, 1, 0, 1, 2, 1, 1, 1, 1][:studies]
        rows = np.split(np.arange(sum(counts)), np.cumsum(counts)[:-1])
        self.studies = pd.DataFrame({"study_id": [f"s{i}" for i in range(studies)], "patient_id": [f"p{i // 2}" for i in range(studies)], "split": "test",
                                     "image_rows": [list(row) for row in rows], "sentences": [["Clear lungs."] if i != 3 else [] for i in range(studies)]})
        self.image_table = pd.DataFrame({"image_id": [f"i{i}" for i in range(sum(counts))], "study": np.repeat(np.arange(studies), counts)})
        self.path, self.size, self.manifest = "films", 8, {"source": {}, "hash": "films", "labels": ["Edema", "Nodule"]}
        self.recipe = {}
        self.labels = pd.DataFrame({"Edema": [1.0, 0, 1, 0, 1, 0, 0, -1, 0], "Nodule": [0.0, 1, 0, 1, 0, 1, 0, 1, np.nan]}).iloc[:studies]

    def __len__(self):
        return len(self.image_table)

    def image(self, row):
        return np.full((8, 8), self.image_table["study"].iloc[row], np.uint8)


class Knows(torch.nn.Module):
    "Reads the study off the image, and of text t that it belongs to the t-th study that has one, or the t-th prompt's finding off its words."
    text_unit, sampling = "report", SimpleNamespace(max_tokens=64, punctuation=False, overflow="cut")

    def __init__(self, tokenizer, answer):
        super().__init__()
        self.weight, self.tokenizer, self.answer = torch.nn.Parameter(torch.zeros(1)), tokenizer, answer
        self.preprocessing = SimpleNamespace(size=8, crop=1.0, fit=None, transform=lambda: lambda images: images)

    def embed_image(self, image):
        return image[:, 0, 0, 0].long()

    def embed_text(self, batch):
        return batch.study_id

    def similarity(self, image, text):
        return torch.tensor([[self.answer(int(i), int(t)) for t in text] for i in image], dtype=torch.float32)


def test_one_who_knows_is_perfect(tokenizer, tmp_path):
    pack, texts = Films(), [0, 1, 4, 5, 6, 7, 8]                                 # 2 has no image, 3 no report
    method = Knows(tokenizer, lambda image, text: image == texts[text])
    pairs = retrieve._retrieval_scores(method, pack, batch_size=3)
    assert pairs.texts["study_id"].tolist() == [f"s{i}" for i in texts] and pairs.images["study_id"].tolist() == ["s0", "s0", "s1", "s4", "s4", "s5", "s6", "s7", "s8"]
    table = retrieve.retrieve(method, pack, resamples=10, ks=(1,), out=tmp_path).set_index(["relevant", "direction", "metric"])
    assert (table.loc["same study"]["value"] == 1).all()
    blind = table.loc["same study"]["chance"].xs("R@1", level="metric")
    np.testing.assert_allclose(blind, [1 / 7, (2 * 2 + 5) / 9 / 7])
    assert table.loc[("same class", _DIRECTIONS[0], "precision@1"), "n"] == 7 and sorted(path.name for path in tmp_path.iterdir()) == ["retrieval.csv", "retrieval.json", "retrieval.npz"]
    saved = pd.read_csv(tmp_path / "retrieval.csv").set_index(["relevant", "direction", "metric"])
    np.testing.assert_allclose(saved["value"], table["value"])


def test_fewer_studies_are_whole_patients_of_a_seed_with_their_own_chance(tokenizer, pack, tmp_path):
    method = METHODS["clip"].from_preset("tiny", tokenizer)
    split = pack.studies[pack.studies["split"] == "test"]
    assert len(split) > 12 and (split["sentences"].map(len) > 0).all()
    ask = lambda **how: retrieve.retrieve(method, pack, resamples=5, out=tmp_path, **how).set_index(["relevant", "direction", "metric"]).loc["same study"]
    whole, few = ask(), ask(studies=9, seed=3)
    drawn = retrieve._load_pairs(tmp_path / "retrieval.npz")
    assert (whole["candidates"] == len(split)).all() and drawn.scores.shape == (9, 9) and (few["candidates"] == 9).all()
    at_one = few.xs("R@1", level="metric")["chance"]
    np.testing.assert_allclose(at_one, 1 / 9)
    assert (few.xs("median rank", level="metric")["chance"] == 5).all()
    own = drawn.texts.groupby("patient_id").size()
    all_of = split.groupby(split["patient_id"].astype(str)).size()
    assert (own < all_of[own.index]).sum() <= 1, "patients are drawn whole, but for the last"
    assert json.loads((tmp_path / "retrieval.json").read_text()).items() >= {"studies": 9, "seed": 3}.items()
    again, other = (retrieve._retrieval_scores(method, pack, studies=9, seed=seed) for seed in (3, 4))
    np.testing.assert_array_equal(again.scores, drawn.scores)
    assert set(other.texts["study_id"]) != set(drawn.texts["study_id"])
    named = retrieve.zero_shot(method, pack, resamples=5, out=tmp_path, studies=9, seed=3)
    assert (named["findings"]["n"] <= 9).all() and set(retrieve._load_pairs(tmp_path / "zero_shot.npz").images["study_id"]) == set(drawn.texts["study_id"])
    with pytest.raises(ValueError, match="studies is 0; expected at least 1"):
        retrieve.zero_shot(method, pack, studies=0)


# ---------------------------------------------------------------- zero-shot

def test_prompts_of_one_who_knows(tokenizer):
    pack, prompts = Films(), retrieve.prompt_table(["Edema", "Nodule"])
    truth = pack.labels.fillna(0)
    fits = lambda image, text: prompts["sign"].iloc[text] * truth[prompts["finding"].iloc[text]].iloc[image]
    answer = retrieve.zero_shot(Knows(tokenizer, fits), pack, resamples=10)
    findings = answer["findings"].set_index(["finding", "metric"])
    assert (findings["value"].xs("AUROC", level="metric") == 1).all()
    assert findings.loc[("Edema", "AUROC"), "n"] == 9 and findings.loc[("Nodule", "AUROC"), "n"] == 10    # 7 is uncertain of edema; blank is negative
    assert (answer["prompts"][["alone", "paired", "ensemble"]] == 1).all(axis=None)
    accuracy = answer["classes"][answer["classes"]["name"] == "accuracy"]
    assert (accuracy["value"] == 1).all() and (accuracy["n"] == 8).all()        # 6 and 8 have none of the two
    assert not answer["classes"]["name"].isin(["Brier score", "expected calibration error"]).any()


def test_zero_shot_tables_by_hand():
    draw = np.random.default_rng(2)
    prompts = pd.concat([retrieve.prompt_table(["Edema", "Nodule"]), pd.DataFrame([("Edema", 1, 99, "Wet lungs.")], columns=["finding", "sign", "pair", "prompt"])])
    answer = pd.DataFrame({"image_id": range(50), "study_id": range(50), "patient_id": np.arange(50) // 2})
    pairs = PairScores(draw.normal(size=(50, len(prompts))).astype(np.float32), answer, prompts.reset_index(drop=True))
    truth = pd.DataFrame({"Edema": draw.choice([1, 0, np.nan], 50), "Nodule": np.zeros(50)})
    for combine, how in (("mean", np.mean), ("max", np.max)):
        known = truth["Edema"].notna().to_numpy()
        score = how(pairs.scores[:, [*range(0, 12, 2), 24]], 1) - how(pairs.scores[:, 1:12:2], 1)
        found = retrieve.zero_shot_table(pairs, truth, combine, 20).set_index(["finding", "metric"])
        labels = truth["Edema"][known]
        expected = [roc_auc_score(labels, score[known]), average_precision_score(labels, score[known]), balanced_accuracy_score(labels, score[known] > 0)]
        np.testing.assert_allclose(found.loc["Edema"]["value"], expected)
        np.testing.assert_allclose(found.loc["Edema"]["chance"], [0.5, labels.mean(), 0.5])
        assert found.loc["Nodule"]["value"].isna().all() and found.loc["macro"]["value"].tolist() == found.loc["Edema"]["value"].tolist()
    breakdown = retrieve._prompt_breakdown(pairs, truth)
    assert np.isnan(breakdown["paired"].iloc[-1]) and np.isclose(breakdown["alone"].iloc[-1], roc_auc_score(labels, pairs.scores[known, 24]))
    assert np.isclose(breakdown["alone"].iloc[1], roc_auc_score(labels, -pairs.scores[known, 1])) and breakdown["alone"][12:24].isna().all()
    np.testing.assert_allclose(breakdown["paired"].iloc[2], roc_auc_score(labels, pairs.scores[known, 2] - pairs.scores[known, 3]))
    nothing = retrieve.zero_shot_table(pairs, truth * np.nan, resamples=5)
    assert nothing["value"].isna().all() and set(nothing["finding"]) == {"Edema", "Nodule"}
    assert retrieve._class_table(pairs, np.full(50, ""))["value"].isna().all()
    with pytest.raises(ValueError, match="unknown finding with names for its prompts 'Effusion'"):
        retrieve.prompt_table(["Effusion"])
    with pytest.raises(ValueError, match="unknown finding of the prompts 'Mass'"):
        retrieve._class_table(pairs, np.array(["Mass"] * 50))
    with pytest.raises(ValueError, match="unknown way to combine prompts 'median'"):
        retrieve._finding_scores(pairs, combine="median")


def test_classes_are_standardised_over_the_test_images():
    prompts = retrieve.prompt_table(["Edema", "Nodule"], templates=(("{}", "no {}"),), names={"Edema": ["edema"], "Nodule": ["nodule"]})
    answer = pd.DataFrame({"image_id": range(40), "study_id": range(40), "patient_id": range(40)})
    kind = np.arange(40) % 2
    scores = np.zeros((40, 4), np.float32)
    scores[:, 0], scores[:, 2] = 5 + 0.1 * (kind == 0), 10 * (kind == 1)           # edema is liked by all images, nodule by its own
    scores[:, 2] -= 20
    pairs = PairScores(scores, answer, prompts)
    classes = np.where(kind == 0, "Edema", "Nodule")
    table = retrieve._class_table(pairs, classes).query("name == 'accuracy'").set_index("scores")
    assert table.loc["raw", "value"] == 0.5 == table.loc["raw", "chance"] and table.loc["standardised (GLoRIA)", "value"] == 1
    classes[:10] = ""
    assert (retrieve._class_table(pairs, classes)["n"].max(), retrieve._class_table(pairs, classes[:1].repeat(40))["n"].max()) == (30, 0)
