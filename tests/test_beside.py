"""Models of three kinds and fits, imported by the command line, and a run of our own: in one widget, and in one table of audits."""
import json

import numpy as np
import pandas as pd
import pytest
import torch
import transformers

from medvis.cli.commands import main
from medvis.data.label_phrases import phrases_from_labels
from medvis.evaluate.audit import audit, audit_runs, verdict
from medvis.methods.method import phantom_tokenizer
from medvis.testing import phantom_films, small_phantom
from medvis.train import TrainConfig, create_method, fit
from medvis.widgets import CorrespondenceWidget

FITS = {"clip": "crop", "siglip": "stretch", "medclip": "pad"}


@pytest.fixture(scope="module")
def films():
    return phantom_films(48)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "Files as they are published, small, and `medvis import` of each; the last was trained here."
    home, words, side = tmp_path_factory.mktemp("beside"), phantom_tokenizer(60), dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=64)
    torch.manual_seed(0)
    text = dict(side, vocab_size=len(words), max_position_embeddings=64, eos_token_id=words.sep_token_id, bos_token_id=words.cls_token_id)
    for name, kind in (("clip", "CLIP"), ("siglip", "Siglip")):
        config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=dict(side, image_size=64, patch_size=16))
        getattr(transformers, f"{kind}Model")(config).save_pretrained(home / name)
        words.save_pretrained(home / name)
    crop = {"do_resize": True, "size": {"shortest_edge": 64}, "do_center_crop": True, "crop_size": {"height": 64, "width": 64}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (home / "clip/preprocessor_config.json").write_text(json.dumps(crop))
    words.save_pretrained(home / "words")
    parts = {"text_model": transformers.BertModel(transformers.BertConfig(**text)), "vision_model": transformers.SwinModel(transformers.SwinConfig(image_size=64, embed_dim=24, depths=[1, 1], num_heads=[1, 2], window_size=4))}
    state = {f"{part}.model.{key}": value for part, network in parts.items() for key, value in network.state_dict().items()}
    state |= {"text_model.projection_head.weight": torch.randn(16, 64), "vision_model.projection_head.weight": torch.randn(16, 48)}
    torch.save(state, home / "medclip.pt")
    for name, more in {"clip": "", "siglip": "", "medclip.pt": f"--tokenizer {home}/words --size 64"}.items():
        assert main(f"import {home}/{name} --out {home}/runs/{name.removesuffix('.pt')} {more}".split()) == 0
    method = create_method("mixture-mi", "tiny", pack := small_phantom(40))
    fit(method, pack, TrainConfig.of(method, home / "runs/ours", epochs=1, batch_size=16, progress=False))
    return {name: home / "runs" / name for name in ("ours", *FITS)}


def test_one_widget(runs, films, tmp_path):
    widget = CorrespondenceWidget(runs, films, split=None)
    view = widget.studies[0]                                    # a portrait: what is cut and what is squeezed is plain
    assert {name: json.loads((runs[name] / "manifest.json").read_text())["data"]["fit"] for name in FITS} == FITS
    wanted = {"ours": (0, 0, 1, 1), "medclip": (0, 0, 1, 1), "siglip": (0.08, 0, 0.92, 1), "clip": (0.08, 0.08, 0.92, 0.92)}
    for name, scores in view.runs.items():
        np.testing.assert_allclose(scores.frame, wanted[name], atol=0.01, err_msg=name)
    for name, scores in view.runs.items():
        assert np.isfinite(scores.scores["sentences"]).all() and scores.scores["words"].shape[0] == len(view.words), name
    page = widget.to_html(tmp_path / "page.html", [0, 1, 2]).read_text()
    for name in runs:
        assert f'"{name}"' in page, name
    assert "leaving it out (leaves" in page and len(widget.to_figure().axes) >= 5


def test_one_table(runs, films, tmp_path):
    phrases = phrases_from_labels(films, split="test")
    table = audit_runs(runs, films, phrases, tmp_path, resamples=20)
    assert list(table["run"]) == list(runs) and len(set(table["phrases"])) == 1 and len(pd.read_csv(tmp_path / "audits.csv")) == 4
    own = {name: audit(run, films, phrases, resamples=20) for name, run in runs.items()}
    seen = {name: int(one["phrases"].max()) for name, one in own.items()}
    assert set(table["phrases"]) <= {*range(1, min(seen.values()) + 1)}
    for name, line in table.set_index("run").iterrows():
        if seen[name] == line["phrases"]:
            assert line["verdict"] == verdict(own[name]) and line["hit"] == pytest.approx(own[name].loc[0, "hit"])
    others = [str(path) for name, path in runs.items() if name != "ours"]
    assert main(["phrases", str(runs["ours"]), "--data", str(films.path), "--from-labels", "--audit", "--beside", *others, "--out", str(tmp_path / "cli")]) == 0
    again = pd.read_csv(tmp_path / "cli" / "audits.csv")
    np.testing.assert_allclose(again[["hit", "chance"]], table[["hit", "chance"]])
    assert list(again["run"]) == list(runs)
