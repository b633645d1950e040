"""Every data set from files of its public shape to a Pack, as a user would: check, prepare, kill, resume, evaluate."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from medvis.cli.commands import main
from medvis.data.sets.registry import DATASETS, command_config, prepare, prepare_data, simulate
from medvis.data.images import FITS, boxes_to_square, mask_to_square
from medvis.data.pack import Pack
from medvis.data.phantom import tight_box
from medvis.data.source import BuildConfig, check_source, describe_pack
from medvis.data.tasks import pack_task


def ready(name, root, out, recipe="medvis", size=32, workers=0):
    "The options of a data set that stands in `root`"
    data_set = DATASETS[name]
    return command_config(data_set)(data_set.config(root, recipe), BuildConfig(out, size=size, workers=workers, max_rejects=0.6, progress=False))


@pytest.mark.parametrize("name", ["covid-rural", "openi"])
def test_from_the_command_line(name, tmp_path, capsys):
    assert main(["data", "get", name]) == 0 and "ROOT" in capsys.readouterr().out
    assert main(["data", "check", name, "--root", str(tmp_path / "none")]) == 1 and "What is needed" in capsys.readouterr().err
    assert main(["data", "simulate", name, "--root", str(tmp_path / "files"), "--studies", "24", "--size", "64"]) == 0
    assert main(["data", "simulate", name, "--root", str(tmp_path / "files")]) == 1 and "not empty" in capsys.readouterr().err
    assert main(["data", "check", name, "--root", str(tmp_path / "files")]) == 0 and "Nothing is missing" in capsys.readouterr().out
    assert main(["prepare", name, "--root", str(tmp_path / "files"), "--out", str(tmp_path / "pack"), "--size", "64", "--no-progress"]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("images seen", "hash", "mean"))
    assert main(["data", "leaks", str(tmp_path / "pack")]) == 0
    pack = Pack(tmp_path / "pack")
    pack.verify()
    assert pack.manifest["source"]["kind"] == name and pack.manifest["lists"]["all"]["images"]["count"] == len(pack) and (pack.path / "subsets.csv").exists()


CONSENSUS = "consensus test; else train as in MIMIC-CXR, the others validate"
SPLITS = {      # data set -> the split rule of each recipe, as Packs have it in their manifests
    "mimic-cxr": ["official", "official", "official", "official", "official, test joined to validate", "official, edema test patients not in training"],
    "mimic-edema": [CONSENSUS, f"{CONSENSUS}; without MIMIC's test patients"],
    "chexpert": ["patients 90/10", "lovt", "mgca", "mgca"],
    "rsna": ["patients", "lovt 60/20/20", "mgca 70/15/15", "mgca 60/20/20"],
    "siim": ["patients", "lovt 60/20/20", "mgca 70/15/15"],
    "covidx": ["patients 80/20", "mgca 80/20", "patients 90/10"],
    "object-cxr": ["patients 80/20", "lovt 80/20", "mgca 90/10"],
    "nih": ["official", "patients", "lovt 60/20/20"],
    "covid-rural": ["patients 60/20/20", "lovt 60/20/20"],
    "openi": ["patients", "patients", "annotation.json"],
    "folder": ["patients"],
    "class-folder": ["patients"]}


def test_split_rules_are_written_as_ever():
    "The sentence of a rule is part of a build: with another one, a Pack of yesterday would be of other settings."
    assert {name: [json.loads(json.dumps(asdict(recipe)))["splits"] for recipe in data_set.recipes.values()] for name, data_set in DATASETS.items()} == SPLITS


STRAYS = {      # data set -> a file that names what has no image, how it comes to do so, what is said
    "covid-rural": ("*/pngs_masks/*.png", lambda file: shutil.copy(file, file.with_name("stray.png")), "there is no such image"),
    "rsna": ("stage_2_detailed_class_info.csv", lambda file: file.write_text(file.read_text() + "stray,Normal\n"), "not in stage_2_train_labels.csv"),
    "mimic-cxr": ("*chexpert.csv.gz", lambda file: (table := pd.read_csv(file, dtype=str)).loc[[*table.index, 0]].assign(
        study_id=[*table["study_id"], "59999999"]).to_csv(file, index=False), "not in the metadata table"),
    "mimic-edema": ("regex_report*.csv", lambda file: file.write_text(file.read_text() + "19999999,59999999,1\n"), "not in the metadata table")}


@pytest.mark.parametrize("name", STRAYS)
def test_what_has_no_image_takes_none(name, tmp_path):
    "A row or a mask without an image is reported, and counts as no image of the data set."
    simulate(name, tmp_path, studies=40)
    pattern, spoil, reason = STRAYS[name]
    spoil(next(iter(sorted(tmp_path.rglob(pattern)))))
    data_set = DATASETS[name]
    stray, = (item for item in data_set.plan(data_set.config(tmp_path, "local-mi" if name == "mimic-edema" else "medvis")).items if reason in str(item.get("rejects")))
    assert stray["planned"] == 0 and ("stray" in stray["study"] or "59999999" in stray["study"])


PREPARE = """
import sys
from pathlib import Path
from medvis.data.sets.registry import DATASETS, command_config, prepare_data
from medvis.data.source import BuildConfig
if __name__ == "__main__":
    name, root, out, workers = sys.argv[1:]
    data_set = DATASETS[name]
    prepare_data(command_config(data_set)(data_set.config(Path(root)), BuildConfig(Path(out), size=32, workers=int(workers), max_rejects=0.6, progress=False)))
"""


@pytest.mark.parametrize(("name", "studies", "workers"), [("covid-rural", 200, 0), ("mimic-cxr", 200, 2)])
def test_killed_and_resumed_it_ends_with_the_same_bytes(name, studies, workers, tmp_path):
    simulate(name, tmp_path / "files", studies=studies)
    prepare_data(ready(name, tmp_path / "files", tmp_path / "whole"))
    script, out = tmp_path / "prepare.py", tmp_path / "killed"
    script.write_text(PREPARE)
    command = [sys.executable, script, name, tmp_path / "files", out, str(workers)]
    kills = 0
    for parts in (1, 2):
        process = subprocess.Popen(command, start_new_session=True)
        while process.poll() is None and len(list((tmp_path / "killed.partial" / "parts").glob("*.json"))) < parts:
            time.sleep(0.002)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills
    prepare_data(ready(name, tmp_path / "files", out))
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert files == sorted(path.name for path in out.iterdir()) and "manifest.json" in files
    assert all((tmp_path / "whole" / name).read_bytes() == (out / name).read_bytes() for name in files)
    assert len(Pack(out)) > 100 and not (tmp_path / "killed.partial").exists()


def test_the_images_seen_add_up(tmp_path, capsys):
    "A study left out for its report takes all its images with it; a row of labels without images takes none."
    simulate("mimic-cxr", tmp_path / "files", studies=30)
    tables = {name: pd.read_csv(next((tmp_path / "files").rglob(f"*{name}.csv.gz")), dtype=str) for name in ("metadata", "chexpert")}
    counts = tables["metadata"].groupby("study_id").size()
    blanked = [counts[counts == 2].index[0], counts[counts == 1].index[0]]
    reports = next((tmp_path / "files").rglob("*.zip"))
    with zipfile.ZipFile(reports) as old:
        texts = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(reports, "w") as new:
        for name, text in texts.items():
            new.writestr(name, b" " if any(study in name for study in blanked) else text)
    stray = tables["chexpert"].iloc[[0]].assign(study_id="59999999")
    pd.concat([tables["chexpert"], stray]).to_csv(next((tmp_path / "files").rglob("*chexpert.csv.gz")), index=False)
    assert main(["data", "check", "mimic-cxr", "--root", str(tmp_path / "files")]) == 1
    assert " x text file that is blank, damaged or not UTF-8, such as " in (printed := capsys.readouterr().err) and "is blank" in printed and "59999999: has labels, but is not in the metadata table" in printed
    pack = prepare_data(ready("mimic-cxr", tmp_path / "files", tmp_path / "pack", recipe="lovt"))
    assert f"{len(tables['metadata'])} images seen" in describe_pack(pack) and pack.manifest["counts"]["seen"] + sum(pack.manifest["source"]["dropped"].values()) == len(tables["metadata"])
    assert pack.manifest["rejected"]["bad-text"] == 3


@pytest.mark.parametrize("name", DATASETS)
def test_a_recipe_that_is_not_there_is_told(name, tmp_path):
    data_set = DATASETS[name]
    facts, problems = check_source(data_set, data_set.config(tmp_path, "nobody's"))
    assert facts == {} and len(problems) == 1 and problems[0].startswith('unknown recipe "nobody\'s"')


def test_what_is_there_already_says_so(tmp_path, capsys):
    simulate("class-folder", tmp_path / "files", studies=20)
    lost = next((tmp_path / "files").rglob("*.jpeg"))
    moved = lost.rename(tmp_path / lost.name)
    lost.symlink_to("nowhere")
    command = ["prepare", "class-folder", "--root", str(tmp_path / "files"), "--out", str(tmp_path / "pack"), "--size", "32", "--patients", "kermany"]
    assert main(command) == 0 and "1 rejected: file not found" in capsys.readouterr().out
    lost.unlink()
    moved.rename(lost)
    assert main(command) == 0 and "is there already; 1 rejects stay as they were" in capsys.readouterr().out


SLOWLY = """
import signal, sys, time
from medvis.cli.start import main
from medvis.data import source

read_study = source.read_study


def slowly(*args, **options):
    time.sleep(0.06)
    return read_study(*args, **options)


source.read_study = slowly      # in the workers too: they import this file
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell's background job, such as CI, is started without
    sys.exit(main())
"""


def test_workers_leave_the_interrupt_to_the_main_process(tmp_path):
    simulate("covid-rural", tmp_path / "files", studies=100)      # two parts, of 64 and 36: one worker is idle while the other still reads
    (tmp_path / "slowly.py").write_text(SLOWLY)
    command = [sys.executable, tmp_path / "slowly.py", "prepare", "covid-rural", "--root", tmp_path / "files", "--out", tmp_path / "pack", "--workers", "2", "--no-progress"]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list((tmp_path / "pack.partial" / "parts").glob("*.json")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    printed = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "interrupted" in printed and "Traceback" not in printed


@settings(max_examples=300, deadline=None)
@given(height=some.integers(40, 400), width=some.integers(40, 400), size=some.integers(24, 96), fit=some.sampled_from(FITS), ellipse=some.booleans(), data=some.data())
def test_the_box_of_a_moved_mask_is_the_moved_box(height, width, size, fit, ellipse, data):
    least = -(-max(height, width) // size)              # a pixel of the square: what is smaller in both directions may lose an edge
    x0, y0 = data.draw(some.integers(0, width - least - 1)) if width > least + 1 else 0, data.draw(some.integers(0, height - least - 1)) if height > least + 1 else 0
    x1, y1 = data.draw(some.integers(min(width, x0 + least), width)), data.draw(some.integers(min(height, y0 + least), height))
    rows, columns = np.mgrid[:height, :width] + 0.5
    inside = ((columns - (x0 + x1) / 2) / ((x1 - x0) / 2)) ** 2 + ((rows - (y0 + y1) / 2) / ((y1 - y0) / 2)) ** 2 <= 1
    mask = inside if ellipse else (columns > x0) & (columns < x1) & (rows > y0) & (rows < y1)
    moved = mask_to_square(mask, size, fit)
    box = boxes_to_square([tight_box(mask)], height, width, size, fit)[0].clip(0, size)
    if (box[2:] - box[:2]).min() < 1:
        return                                          # cut away, but for a sliver
    assert moved.any()
    seen = np.flatnonzero(moved.any(0)), np.flatnonzero(moved.any(1))
    found = [seen[0][0], seen[1][0], seen[0][-1] + 1, seen[1][-1] + 1]
    if ellipse and fit == "crop":                       # an ellipse that is cut has another box than its box cut
        return
    assert np.abs(np.array(found) - box).max() <= 1 + 1e-9, (found, box)


@pytest.mark.parametrize("fit", FITS)
def test_what_was_marked_is_never_lost(fit):
    dot = np.zeros((900, 700), bool)
    dot[450, 350] = True
    assert mask_to_square(dot, 32, fit).sum() == 1


@pytest.mark.parametrize(("name", "kinds"), [("siim", {"masks", "labels"}), ("nih", {"boxes", "labels"}), ("mimic-edema", {"ordinal"})])
def test_tasks_come_out_of_packs(name, kinds, tmp_path):
    simulate(name, tmp_path / "files", studies=30)
    pack = prepare_data(ready(name, tmp_path / "files", tmp_path / "pack", size=64))
    for kind in kinds:
        task = pack_task(pack, kind)
        assert task.kind == kind and len(task) and task.rows("train", 0.1).size <= task.rows("train").size


@pytest.fixture(scope="module")
def mimic(tmp_path_factory):
    "Files of MIMIC-CXR, and LoVT's Packs of them by recipe: with all training studies, the first 30 %, 30 % of the patients."
    root = tmp_path_factory.mktemp("mimic")
    simulate("mimic-cxr", root / "files", studies=120)
    for recipe in ("lovt", "lovt-30", "lovt-30-patients"):
        assert main(["prepare", "mimic-cxr", "--root", str(root / "files"), "--out", str(root / recipe), "--recipe", recipe, "--size", "32", "--no-progress"]) == 0
    return root


def test_thirty_percent_of_the_data(mimic, tmp_path):
    "Nested, of whole patients where patients are drawn; what validates and tests stays; the same at every door; the manifest says what was left out."
    packs = {recipe: Pack(mimic / recipe) for recipe in ("lovt", "lovt-30", "lovt-30-patients")}
    tables = {recipe: pack.studies.set_index("study_id") for recipe, pack in packs.items()}
    train = {recipe: table[table["split"] == "train"] for recipe, table in tables.items()}
    whole, first, drawn = train.values()
    assert list(first.index) == list(whole.index)[:round(0.3 * len(whole))] and drawn["patient_id"].nunique() == round(0.3 * whole["patient_id"].nunique())
    assert set(drawn.index) == set(whole.index[whole["patient_id"].isin(drawn["patient_id"])]) < set(whole.index) and set(drawn.index) != set(first.index)
    for recipe, table in tables.items():
        packs[recipe].verify()
        held = [one[one["split"] != "train"].drop(columns="image_rows") for one in (table, tables["lovt"])]
        pd.testing.assert_frame_equal(*held)
        rows = {table.index[row]: packs[recipe].images[images].tobytes() for row, images in enumerate(table["image_rows"])}
        assert all(rows[study] == packs["lovt"].images[tables["lovt"].loc[study, "image_rows"]].tobytes() for study in table.index)
        lost = packs["lovt"].manifest["counts"]["images"] - packs[recipe].manifest["counts"]["images"]
        named = [count for rule, count in packs[recipe].manifest["source"]["dropped"].items() if "30 %" in rule]
        assert named == ([] if recipe == "lovt" else [lost]) and packs[recipe].recipe.get("train_share", 1) == (1 if recipe == "lovt" else 0.3)
        assert ("30 % of the training" in describe_pack(packs[recipe])) == (recipe != "lovt")
    half = prepare("mimic-cxr", mimic / "files", tmp_path / "half", recipe="lovt", train_share=0.5, subset="patients", size=32, progress=False)
    third = prepare("mimic-cxr", mimic / "files", tmp_path / "third", recipe="lovt-30-patients", size=32, progress=False)
    assert third.manifest["hash"] == packs["lovt-30-patients"].manifest["hash"] and set(drawn.index) < set(half.studies["study_id"][half.studies["split"] == "train"]) < set(whole.index)


def test_a_pack_of_before_shares_is_the_same_build(mimic):
    "All of the training studies is no new setting: the manifest does not name it."
    source = Pack(mimic / "lovt").manifest["source"]
    assert "train_share" not in source["recipe"] and source["read"].keys() == {"recipe", "split_seed", "labeler", "edema"}


def test_a_share_that_is_none_is_told(mimic, capsys):
    for door in (["data", "check"], ["prepare"]):
        assert main([*door, "mimic-cxr", "--root", str(mimic / "files"), "--train-share", "30", *["--out", str(mimic / "none")] * (door == ["prepare"])]) == 1
        assert "train_share 30.0; expected" in (said := capsys.readouterr().err) and "above 0 and at most 1" in said
    assert main(["data", "check", "mimic-cxr", "--root", str(mimic / "files"), "--recipe", "lovt-30"]) == 0
    seen = {recipe: check_source(DATASETS["mimic-cxr"], DATASETS["mimic-cxr"].config(mimic / "files", recipe))[0] for recipe in ("lovt", "lovt-30")}
    assert seen["lovt-30"]["images"] == len(Pack(mimic / "lovt-30")) < seen["lovt"]["images"] and sum(seen["lovt"][what] for what in ("images", "dropped by rules")) == sum(seen["lovt-30"][what] for what in ("images", "dropped by rules"))


def test_the_start_lists_data_sets_and_recipes():
    lines = (Path(__file__).parent.parent / "docs/start/data.md").read_text().splitlines()
    for name, data_set in DATASETS.items():
        row = next(line for line in lines if line.startswith(f"| `{name}` |"))
        assert row.split("|")[3].strip() == ", ".join(data_set.recipes), name


def test_another_root_is_another_build(tmp_path):
    "The same tables with other pictures: what was built from the one is not the answer for the other"
    simulate("object-cxr", tmp_path / "one", studies=10)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    prepare_data(ready("object-cxr", tmp_path / "one", tmp_path / "pack", size=64))
    with pytest.raises(FileExistsError, match="other data"):
        prepare_data(ready("object-cxr", tmp_path / "two", tmp_path / "pack", size=64))


def test_a_pack_below_its_own_root(tmp_path):
    simulate("class-folder", tmp_path, studies=20)
    config = ready("class-folder", tmp_path, tmp_path / "pack", size=64)
    (tmp_path / "pack.leaks.csv").write_text("left by a build that was refused")
    assert prepare_data(config).manifest == prepare_data(config).manifest and prepare_data(config).manifest["source"]["dropped"] == {}
