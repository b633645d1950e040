"""MIMIC-CXR, its edema grades, Open-i: what went in comes out, in every published form; damage is named and never half-used."""
import gzip
import html
import io
import json
import shutil
import tarfile
import xml.etree.ElementTree as ET
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medvis.data.coded import CODED_FINDINGS, coded_findings, phantom_codes, read_rad_restruct, target_agreement, write_rad_restruct
from medvis.data.sets import mimic, mimic_edema, mimic_files, openi
from medvis.data.files import DataError, RejectCode
from medvis.data.phantom import Phantom
from medvis.data.reports import ReportRules, check_report, parse_sections
from medvis.data.sets.plans import write_dicom
from medvis.data.source import BuildConfig, check_source, describe_pack, prepare_source, read_study
from medvis.data.tasks import pack_task

STUDIES = [Phantom()[index] for index in range(30)]
TABLES = ("metadata", "split", "chexpert", "negbio")
REAL = Path(__file__).parents[2] / "shared/data/reports_openi"      # not part of the repository
quick = settings(deadline=None, max_examples=25, derandomize=True)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    root = tmp_path_factory.mktemp("mimic") / "root"
    mimic_files.simulate_mimic(root, STUDIES)
    return root


@pytest.fixture
def copy(simulated, tmp_path):
    return shutil.copytree(simulated, tmp_path / "copy")


def table_path(root: Path, kind: str) -> Path:
    return root / f"mimic-cxr-jpg/2.0.0/mimic-cxr-2.0.0-{kind}.csv.gz"


def edit(root: Path, kind: str, change) -> None:
    "Change a table as bytes."
    path = table_path(root, kind)
    path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()))))


def plan(root: Path, recipe: str = "medvis", **changes):
    return mimic._plan_mimic(mimic._MimicConfig(root, recipe, **changes))


def essence(source) -> list[dict]:
    "Items without the places of their files."
    return [{**item, "report": "", "images": [image["id"] for image in item.get("images", ())]} for item in source.items]


def reasons(source) -> str:
    return "; ".join(reason for item in source.items for _, reason, _ in item.get("rejects", ()))


# ---- forms of MIMIC-CXR

def unpack_tables(folder: Path) -> None:
    for packed in folder.glob("*.csv.gz"):
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()


def as_lovt(root: Path) -> Path:
    (root / "mimic-cxr-jpg/2.0.0").rename(root / "mimic-cxr-jpg_2-0-0")
    (root / "mimic-cxr/2.0.0").rename(root / "mimic-cxr_2-0-0")
    return root


def as_mgca(root: Path) -> Path:
    jpg = root / "mimic-cxr-jpg/2.0.0"
    unpack_tables(jpg)
    zipfile.ZipFile(root / "mimic-cxr/2.0.0/mimic-cxr-reports.zip").extractall(jpg)
    shutil.rmtree(root / "mimic-cxr")
    return root


def as_wget(root: Path) -> Path:
    (root / "physionet.org/files").mkdir(parents=True)
    for name in ("mimic-cxr", "mimic-cxr-jpg", "mimic-cxr-pe-severity"):
        (root / name).rename(root / "physionet.org/files" / name)
    pe = root / "physionet.org/files/mimic-cxr-pe-severity"
    (pe / "1.0.1").mkdir()
    for path in pe.glob("*.csv"):
        path.rename(pe / "1.0.1" / path.name)
    return root


def as_one_folder(root: Path) -> Path:
    shutil.move(root / "mimic-cxr/2.0.0/mimic-cxr-reports.zip", root / "mimic-cxr-jpg/2.0.0")
    return root / "mimic-cxr-jpg/2.0.0"


def as_unpacked(root: Path) -> Path:
    text = root / "mimic-cxr/2.0.0"
    zipfile.ZipFile(text / "mimic-cxr-reports.zip").extractall(text / "mimic-cxr-reports")
    (text / "mimic-cxr-reports.zip").unlink()
    return root


def as_shuffled(root: Path) -> Path:
    for kind in TABLES:
        path = table_path(root, kind)
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        table.sample(frac=1, random_state=0)[sorted(table.columns)[::-1]].to_csv(path, index=False)
    return root


@pytest.mark.parametrize("form", [as_lovt, as_mgca, as_wget, as_one_folder, as_unpacked, as_shuffled])
def test_every_form_of_mimic_makes_the_same_studies(simulated, copy, form):
    root = form(copy)
    changed = plan(root)
    assert essence(changed) == essence(plan(simulated))
    records = [read_study(item, root, 64, "pad") for item in changed.items]
    assert not any(record.rejects for record in records)
    by_study = {mimic_files._mimic_ids(study)[1]: study.report for study in STUDIES}
    assert {record.study_id: record.report for record in records} == by_study
    if form is as_wget:
        assert len(mimic_edema._plan_edema(mimic_edema._EdemaConfig(root)).items) == len(mimic_edema._plan_edema(mimic_edema._EdemaConfig(simulated)).items)


@pytest.mark.parametrize("recipe", mimic._MIMIC_RECIPES)
def test_a_pack_of_mimic_holds_what_went_in(simulated, tmp_path, recipe):
    pack = prepare_source(mimic.MIMIC_CXR, mimic._MimicConfig(simulated, recipe), BuildConfig(tmp_path / "pack", size=64, progress=False))
    rules, splits = mimic._MIMIC_RECIPES[recipe].rules, mimic_files._mimic_splits(STUDIES)
    by_study = {mimic_files._mimic_ids(study)[1]: study for study in STUDIES}
    held_out = {study.patient_id for study in STUDIES if splits[study.patient_id] == "test" and study.severities["Edema"] is not None}
    missing, share = set(by_study) - set(pack.studies.study_id), mimic._MIMIC_RECIPES[recipe].train_share
    train = {name for name, study in by_study.items() if splits[study.patient_id] == "train"}
    assert set(pack.studies.study_id) <= set(by_study) and missing <= train, "in the simulated copy the edema test patients are test patients of MIMIC"
    assert abs(1 - len(missing) / len(train) - share) < 0.05 if share < 1 else not missing
    assert held_out
    for row in pack.studies.itertuples():
        study = by_study[row.study_id]
        assert (row.sentences, None) == check_report(study.report, rules)
        wanted = splits[study.patient_id].replace("test", "validate") if recipe == "mgca" else splits[study.patient_id]
        assert row.split == wanted and row.patient_id == mimic_files._mimic_ids(study)[0]
        truth = {dicom: view for dicom, view, _ in mimic_files._mimic_images(study) if view in ("PA", "AP")}
        found = pack.image_table.iloc[row.image_rows]
        assert list(found.image_id) == sorted(truth) and dict(zip(found.image_id, found.view, strict=True)) == truth
        for image, dicom in zip(row.image_rows, found.image_id, strict=True):
            pixels = np.asarray(Image.open(simulated / found.path[image]))
            assert (pack.image(image) == pixels).all(), "64 x 64 stays as it is"
    labels = pack.labels.astype(object).where(pack.labels.notna(), None).to_dict("records")
    assert labels == [mimic_files._mimic_labels(by_study[name]) for name in pack.studies.study_id]
    assert pack.studies.study_id.tolist() == sorted(pack.studies.study_id, key=lambda name: mimic_files._mimic_ids(by_study[name]))


def test_negbio_labels_are_another_table(simulated):
    labels = {item["study"]: item["labels"] for item in plan(simulated, labeler="negbio").items}
    for study in STUDIES:
        expected = {name: 0.0 if value == -1 else value for name, value in mimic_files._mimic_labels(study).items()}
        assert labels[mimic_files._mimic_ids(study)[1]] == expected


@pytest.mark.parametrize("odd", ["50913680", "58235663"])
def test_reports_that_the_parser_misreads_are_left_out(copy, odd):
    study = mimic_files._mimic_ids(STUDIES[5])[1].encode()
    for kind in TABLES:
        edit(copy, kind, lambda data: data.replace(study, odd.encode()))
    for recipe in mimic._MIMIC_RECIPES:
        source = plan(copy, recipe)
        assert odd not in {item["study"] for item in source.items} and len(source.items) == 29
        assert source.dropped["study whose sections the parser misreads"] == sum(view in ("PA", "AP") for _, view, _ in mimic_files._mimic_images(STUDIES[5]))


# ---- damage to MIMIC-CXR

FIRST = mimic_files._mimic_ids(STUDIES[0])


def swap(old: str, new: str, count: int = -1):
    return lambda data: data.replace(old.encode(), new.encode(), count)


def without_line(number: int):
    return lambda data: b"".join(line for place, line in enumerate(data.splitlines(keepends=True)) if place != number)


FATAL = {       # (table, change) -> what the DataError says; all other damage to tables is in test_damage
    "no header": ("split", without_line(0), "no column 'dicom_id'"),
    "other data set": ("split", lambda data: data.replace(b"0,5", b"1,5").replace(b"-", b"_"), "no dicom_id in common"),
    "other labels": ("chexpert", lambda data: data.replace(b",5", b",6"), "no study_id in common"),
}


@pytest.mark.parametrize("damage", FATAL)
def test_a_damaged_table_stops_the_work(copy, damage):
    kind, change, message = FATAL[damage]
    edit(copy, kind, change)
    with pytest.raises(DataError, match=message):
        plan(copy)
    facts, problems = check_source(mimic.MIMIC_CXR, mimic._MimicConfig(copy))
    assert any(message in problem for problem in problems)


BAD_ROWS = {    # the same damage to an id in several tables -> reason of the reject
    "traversal": ("metadata split", swap("-", "../", 1), "not five times eight"),
    "study with letters": ("metadata split chexpert", swap(FIRST[1], "5000000x", 1), "study_id is not eight digits"),
    "short patient": ("metadata split chexpert", swap(FIRST[0] + ",", "1,", 1), "subject_id is not eight digits"),
}


@pytest.mark.parametrize("damage", BAD_ROWS)
def test_a_damaged_row_costs_its_study_and_no_other(simulated, copy, damage):
    kinds, change, message = BAD_ROWS[damage]
    for kind in kinds.split():
        edit(copy, kind, change)
    source, before = plan(copy), {item["study"]: item for item in plan(simulated).items}
    assert message in reasons(source)
    kept = [item for item in source.items if "rejects" not in item]
    assert len(before) - 2 <= len(kept) < len(before) and all(item == before[item["study"]] for item in kept)


def test_damaged_files_are_rejects_of_the_build_without_report_text(copy, tmp_path):
    jpg, archive = copy / "mimic-cxr-jpg/2.0.0/files", copy / "mimic-cxr/2.0.0/mimic-cxr-reports.zip"
    pictures = {name: [path for path in sorted(jpg.glob(f"*/*/s{mimic_files._mimic_ids(study)[1]}/*.jpg"))] for name, study in zip("abcde", STUDIES[5:], strict=False)}
    whole = pictures["a"][0].read_bytes()
    for path, data in zip((pictures["a"], pictures["b"], pictures["c"]), (b"", whole[: len(whole) // 2], b"not a picture"), strict=True):
        [picture.write_bytes(data) for picture in path]
    [picture.unlink() for picture in pictures["d"]]
    members = {info.filename: zipfile.ZipFile(archive).read(info) for info in zipfile.ZipFile(archive).infolist()}
    for study, data in zip(STUDIES[12:15], (b"", b" FINDINGS: secret \xff words", None), strict=True):
        name = next(name for name in members if mimic_files._mimic_ids(study)[1] in name)
        members[name] = data
    with zipfile.ZipFile(archive, "w") as changed:
        [changed.writestr(name, data) for name, data in members.items() if data is not None]
    pack = prepare_source(mimic.MIMIC_CXR, mimic._MimicConfig(copy), BuildConfig(tmp_path / "pack", size=64, progress=False, max_rejects=0.5))
    reasons = " | ".join(pack.rejects.reason)
    for reason in ("file is empty", "is blank", "not UTF-8", "its report is not in the zip"):
        assert reason in reasons
    assert "secret" not in reasons and len(pack.studies) == 30 - 4 - 3


@quick
@given(st.data())
def test_no_damage_ends_in_a_traceback(simulated, data):
    "Bytes overwritten anywhere in a table: the plan stands, or a DataError says why not."
    kind = data.draw(st.sampled_from(TABLES[:3]))
    path = table_path(simulated, kind)
    whole = path.read_bytes()
    broken = bytearray(gzip.decompress(whole))
    place = data.draw(st.integers(0, len(broken) - 1))
    piece = data.draw(st.binary(max_size=5))
    broken[place:place + data.draw(st.integers(0, 5))] = piece
    try:
        path.write_bytes(gzip.compress(bytes(broken)))
        source = plan(simulated)
        assert all(item["split"] in ("train", "validate", "test") and item["images"] for item in source.items if "rejects" not in item)
    except DataError as error:
        assert str(error)
    finally:
        path.write_bytes(whole)


# ---- edema

def test_a_pack_of_edema_grades_holds_what_went_in(simulated, tmp_path):
    pack = prepare_source(mimic_edema.MIMIC_EDEMA, mimic_edema._EdemaConfig(simulated), BuildConfig(tmp_path / "pack", size=64, progress=False))
    by_study, splits = {mimic_files._mimic_ids(study)[1]: study for study in STUDIES}, mimic_files._mimic_splits(STUDIES)
    graded = {name for name, study in by_study.items() if study.severities["Edema"] is not None}
    assert set(pack.studies.study_id) == graded
    for row, grade in zip(pack.studies.itertuples(), pack.grades["Edema"], strict=True):
        study = by_study[row.study_id]
        assert grade == study.severities["Edema"] and (row.split == "test") == (splits[study.patient_id] == "test")
        images = [dicom for dicom, view, _ in mimic_files._mimic_images(study) if view in ("PA", "AP")]
        assert pack.image_table.image_id[row.image_rows].tolist() == (images[:1] if row.split == "test" else sorted(images))


def edema_file(root: Path, kind: str) -> Path:
    return root / f"mimic-cxr-pe-severity/{kind}_edema_severity.csv"


def test_a_patient_of_the_consensus_never_trains(simulated, copy):
    "Whoever enters the consensus leaves training, whatever his place in MIMIC's own split."
    for recipe in mimic_edema._EDEMA_RECIPES:
        source = mimic_edema._plan_edema(mimic_edema._EdemaConfig(copy, recipe))
        training = [item for item in source.items if item["split"] == "train"]
        chosen = training[0]
        with open(edema_file(copy, "consensus_image"), "a") as file:
            file.write(f"{chosen['patient']},{chosen['study']},3,{chosen['images'][0]['id']}\n")
        after = mimic_edema._plan_edema(mimic_edema._EdemaConfig(copy, recipe))
        of_patient = [item for item in after.items if item["patient"] == chosen["patient"]]
        assert [(item["study"], item["split"], item["grades"]["Edema"]) for item in of_patient] == [(chosen["study"], "test", 3)]
        others = {item["study"]: item["split"] for item in source.items if item["patient"] != chosen["patient"]}
        assert {item["study"]: item["split"] for item in after.items if item["patient"] != chosen["patient"]} == others, "nobody else moves"
        shutil.copy(edema_file(simulated, "consensus_image"), edema_file(copy, "consensus_image"))


def test_experts_correct_the_regular_expressions_but_not_for_local_mi(copy):
    path = edema_file(copy, "expert_report")
    subject, number, grade = path.read_text().splitlines()[1].split(",")
    other = 3 - int(grade)
    path.write_text(path.read_text().replace(f"{number},{grade}", f"{number},{other}"))
    found = {recipe: {item["study"]: item["grades"]["Edema"] for item in mimic_edema._plan_edema(mimic_edema._EdemaConfig(copy, recipe)).items} for recipe in mimic_edema._EDEMA_RECIPES}
    assert found["medvis"][number] == other and found["local-mi"][number] == int(grade)


def test_the_rules_of_the_papers():
    recipes = {name: (one.fit, one.rules.sections, one.uncertain, one.blank, one.subset) for name, one in mimic._MIMIC_RECIPES.items()}
    assert recipes["lovt"] == ("pad-first", ("findings", "impression"), "positive", "negative", "first")
    assert recipes["mgca"] == ("pad", ("impression", "findings"), "ignore", "negative", "patients")
    assert recipes["local-mi"] == ("crop", ("impression", "findings", "recommendation", "recommendation(s)"), "ignore", "ignore", "patients")
    assert {one.views for one in mimic._MIMIC_RECIPES.values()} == {("PA", "AP")} and {one.size for one in mimic._MIMIC_RECIPES.values()} == {256}


def test_the_older_spelling_and_another_order_of_columns(simulated, copy):
    for kind in ("regex_report", "expert_report", "consensus_image"):
        table = pd.read_csv(edema_file(copy, kind), dtype=str).rename(columns={"edema_severity": "edeme_severity"})
        table[sorted(table.columns)].assign(fold="1").to_csv(edema_file(copy, kind), index=False)
    assert mimic_edema._plan_edema(mimic_edema._EdemaConfig(copy)).items == mimic_edema._plan_edema(mimic_edema._EdemaConfig(simulated)).items
    apart = copy.parent / "apart"
    (copy / "mimic-cxr-pe-severity").rename(apart)
    with pytest.raises(DataError, match="name its folder with --edema"):
        mimic_edema._plan_edema(mimic_edema._EdemaConfig(copy))
    assert mimic_edema._plan_edema(mimic_edema._EdemaConfig(copy, edema=apart)).items == mimic_edema._plan_edema(mimic_edema._EdemaConfig(simulated)).items


@pytest.mark.parametrize(("old", "new", "message"), [
    ("{0},{1},", "{0},{1},9", "expected 0, 1, 2 or 3"), ("{0},{1},", "{0},{1},-", "expected 0, 1, 2 or 3"), ("{0},{1},", "19999999,{1},", "has another patient or study"),
    ("{0},{1},", "{0},59999999,", "is not in the metadata table"), ("{0},{1},", "{0},{1},0\n{0},{1},", "has more than one edema grade")])
def test_a_damaged_grade_costs_its_study(simulated, copy, old, new, message):
    before = {item["study"]: item for item in mimic_edema._plan_edema(mimic_edema._EdemaConfig(simulated, "local-mi")).items}
    chosen = next(item for item in before.values() if item["split"] == "train")
    row = (chosen["patient"], chosen["study"])
    path = edema_file(copy, "regex_report")
    assert old.format(*row) in path.read_text()
    path.write_text(path.read_text().replace(old.format(*row), new.format(*row)))
    source = mimic_edema._plan_edema(mimic_edema._EdemaConfig(copy, "local-mi"))
    assert message in reasons(source)
    kept = {item["study"]: item for item in source.items if "rejects" not in item}
    assert chosen["study"] not in kept and all({**item, "split": ""} == {**before[study], "split": ""} for study, item in kept.items())


# ---- Open-i

PATIENTS = [replace(study, study_id=f"phantom-{place:07d}") for place, study in      # one report of each patient, as published
            enumerate({study.patient_id: study for study in (Phantom()[index] for index in range(60))}.values())]


@pytest.fixture(scope="module")
def reports_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("openi") / "root"
    openi._simulate_openi(root, PATIENTS)
    return root


texts = st.text(st.characters(exclude_categories=("Cs", "Cc")) | st.sampled_from(list("\n\t :&<>;.ABCIMPRESSIONFINDINGS")), max_size=120)
sections = st.dictionaries(st.sampled_from(openi._SECTIONS), texts | st.sampled_from(["IMPRESSION: no", "\n FINDINGS: a", "&amp;lt;", "&lt", "A\n \nB", "\ufeff", "___"]))


@quick
@given(sections)
def test_sections_in_are_sections_out(written):
    wanted = {name: " ".join(written[name].split()) for name in openi._SECTIONS if written.get(name, "").split()}
    assert parse_sections(openi._compose_report(written)) == wanted and list(parse_sections(openi._compose_report(written))) == list(wanted)


@quick
@given(sections)
def test_sections_survive_the_xml(written):
    report = ET.Element("eCitation")
    ET.SubElement(report, "uId", id="CXR1")
    for name, text in written.items():
        ET.SubElement(report, "AbstractText", Label=name.upper()).text = text
    try:
        data = ET.tostring(report, encoding="utf-8")
        ET.fromstring(data)
    except ET.ParseError:       # characters that XML does not allow
        return
    found = openi._parse_xml(data, "1.xml")["sections"]
    assert found == {name: " ".join(html.unescape(text).split()) for name, text in written.items()}


@quick
@given(st.data())
def test_damaged_xml_is_a_data_error_or_a_report(reports_root, data):
    whole = bytearray((reports_root / "ecgen-radiology/1.xml").read_bytes())
    place = data.draw(st.integers(0, len(whole) - 1))
    whole[place:place + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=8))
    try:
        assert set(openi._parse_xml(bytes(whole), "1.xml")["sections"]) <= set(openi._SECTIONS)
    except DataError as error:
        assert "1.xml" in str(error) and "atelectasis" not in str(error)


@pytest.mark.parametrize("before", [
    '<!DOCTYPE e [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;"><!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;">]>',
    '<!DOCTYPE e [<!ENTITY x SYSTEM "file:///etc/passwd">]>', '<!DOCTYPE e SYSTEM "http://localhost/x.dtd">', "<!DOCTYPE e [<!ENTITY % p '<!ENTITY q \"r\">'> %p;]>", "<!DOCTYPE e>"])
def test_entities_are_refused(reports_root, before):
    text = (reports_root / "ecgen-radiology/1.xml").read_text().replace("<eCitation>", before + "<eCitation>").replace("None.", "&c;")
    with pytest.raises(DataError, match="holds a DOCTYPE"):
        openi._parse_xml(text.encode(), "1.xml")
    with pytest.raises(DataError):
        openi._parse_xml(text.encode("utf-16"), "1.xml")


def test_a_pack_of_openi_holds_what_went_in(reports_root, tmp_path):
    pack = prepare_source(openi.OPENI, openi._OpeniConfig(reports_root), BuildConfig(tmp_path / "pack", size=64, progress=False))
    assert pack.studies.study_id.tolist() == [f"CXR{number + 1}" for number in range(len(PATIENTS))]
    for row, study in zip(pack.studies.itertuples(), PATIENTS, strict=True):
        assert (row.sentences, None) == check_report(study.report, ReportRules())
        truth = {name: text for name, text in parse_sections(study.report).items() if name in openi._SECTIONS}
        assert parse_sections(row.report) == {name: " ".join(text.split()) for name, text in truth.items()}
        assert all((pack.image(image) == pixels).all() for image, (_, pixels) in zip(row.image_rows, openi._openi_images(study), strict=True))
    labels = pack.labels.astype(object).where(pack.labels.notna(), None).to_dict("records")
    assert labels == [openi._mesh_labels(openi._phantom_terms(study)) for study in PATIENTS]


def test_the_archive_and_the_folder_are_the_same(reports_root, tmp_path):
    with tarfile.open(tmp_path / "NLMCXR_reports.tgz", "w:gz") as archive:
        archive.add(reports_root / "ecgen-radiology", "ecgen-radiology")
        link = tarfile.TarInfo("ecgen-radiology/7777.xml")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        large = tarfile.TarInfo("ecgen-radiology/8888.xml")
        large.size = openi._LARGEST + 5
        archive.addfile(large, io.BytesIO(b" " * large.size))
    reports, rejects = openi._read_reports(tmp_path)
    assert reports == openi._read_reports(reports_root)[0] and [one["study"] for one in rejects] == ["ecgen-radiology/8888.xml"]
    assert openi.openi_reports(tmp_path / "NLMCXR_reports.tgz")["dropped"].ne("").sum() == 1


def picture_form(root: Path, form: str) -> Path:
    "The same pictures in another published form: another folder, another spelling of the names, another kind of file."
    old = root / "NLMCXR_png"
    for path in sorted(old.glob("*.png")):
        number, name = path.stem[3:].split("_")[0], path.stem[3:]       # 4 and 4_IM-0004-1001 of CXR4_IM-0004-1001
        pixels = np.asarray(Image.open(path))
        if form == "dicom":
            write_dicom(root / f"NLMCXR_dcm/{number}/{name}.dcm", pixels, name)
            path.unlink()
            continue
        new = {"jpg": f"images/CXR{name}.jpg", "jpeg": f"NLMCXR_png/{number}/CXR{name}.JPEG", "kaggle": f"images_normalized/{name}.dcm.png",
               "nested": f"NLMCXR_png/NLMCXR_png/CXR{name}.png", "flat": f"CXR{number}_{name}.png"}[form]
        (root / new).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / new, **({} if new.endswith("png") else {"quality": 95}))
        path.unlink()
    return root


@pytest.mark.parametrize("form", ["dicom", "jpg", "jpeg", "kaggle", "nested", "flat"])
def test_every_form_of_the_pictures_makes_the_same_studies(reports_root, tmp_path, form):
    root = picture_form(shutil.copytree(reports_root, tmp_path / "form"), form)
    source, expected = openi._plan_openi(openi._OpeniConfig(root)), openi._plan_openi(openi._OpeniConfig(reports_root))
    assert essence(source) == essence(expected)
    if form == "dicom":
        pytest.importorskip("pydicom")
    for item, study in zip(source.items, PATIENTS, strict=True):
        record = read_study(item, root, 64, "pad")
        assert not record.rejects and [image.image_id for image in record.images] == [name for name, _ in openi._openi_images(study)]
        for image, (_, pixels) in zip(record.images, openi._openi_images(study), strict=True):
            assert np.abs(image.pixels.astype(int) - pixels).mean() < (3 if form in ("jpg", "jpeg") else 1e-9)


def test_a_part_of_a_squashed_copy(reports_root, tmp_path):
    "JPEGs of some studies, squashed to squares, beside the archive of all reports: as copies go around."
    root = tmp_path / "copy"
    (root / "images").mkdir(parents=True)
    with tarfile.open(root / "NLMCXR_reports.tgz", "w:gz") as archive:
        archive.add(reports_root / "ecgen-radiology", "ecgen-radiology")
    rows, projections = [], []
    for study in PATIENTS[:6]:
        for place, (name, pixels) in enumerate(openi._openi_images(study)):
            Image.fromarray(np.ascontiguousarray(pixels[:48])).resize((64, 64)).convert("RGB").save(root / f"images/{name}.jpg", quality=95)
            rows.append({"image_path": f"images/{name}.jpg", "orig_width": 2048, "orig_height": 1536})
            projections.append({"uid": name[3:].split("_")[0], "filename": f"{name[3:]}.dcm.png", "projection": ("Frontal", "Lateral")[place]})
    rows[1] |= {"orig_width": "", "orig_height": ""}
    pd.DataFrame(rows).to_csv(root / "images.csv", index=False)
    pd.DataFrame(projections).to_csv(root / "indiana_projections.csv", index=False)
    source = openi._plan_openi(openi._OpeniConfig(root, partial=True))
    assert len(source.items) == 6 and source.dropped["picture is not there"] == sum(len(openi._openi_images(study)) for study in PATIENTS[6:])
    assert not any("squashed" in image for item in source.items for image in item["images"])
    frontal = prepare_source(openi.OPENI, openi._OpeniConfig(root, "frontal", partial=True, unsquash=True), BuildConfig(tmp_path / "pack", size=64, progress=False))
    assert len(frontal) == 6 and "unsquash" in frontal.manifest["source"]["read"]
    sizes = dict(zip(frontal.image_table.image_id, zip(frontal.image_table.width, frontal.image_table.height)))
    unknown = rows[1]["image_path"][len("images/"):-len(".jpg")]
    assert {size for name, size in sizes.items() if name != unknown} == {(64, 48)} and sizes.get(unknown, (64, 64)) == (64, 64)
    for place, study in enumerate(PATIENTS[:6]):
        if sizes[frontal.image_table.image_id[place]] == (64, 48):
            assert np.abs(frontal.image(place)[8:56].astype(int) - study.image[:48]).mean() < 8 and not frontal.image(place)[:8].any()
    Image.fromarray(PATIENTS[0].image[:48]).save(root / rows[0]["image_path"])
    record = read_study(openi._plan_openi(openi._OpeniConfig(root, partial=True, unsquash=True)).items[0], root, 64, "pad")
    assert "expected a square, squashed from 2048 x 1536" in record.rejects[0][1]
    (root / "images.csv").unlink()
    with pytest.raises(DataError, match="there is no images.csv"):
        openi._plan_openi(openi._OpeniConfig(root, partial=True, unsquash=True))


def test_an_option_that_came_later_leaves_packs_of_before_as_they_are(reports_root, tmp_path):
    pack = prepare_source(openi.OPENI, openi._OpeniConfig(reports_root), BuildConfig(tmp_path / "pack", size=64, progress=False))
    assert pack.manifest["source"]["read"] == {"recipe": "medvis", "split_seed": 0, "partial": False}


def test_missing_pictures_are_rejects_or_left_out(reports_root, tmp_path):
    root = shutil.copytree(reports_root, tmp_path / "some")
    for path in sorted((root / "NLMCXR_png").glob("*.png"))[3:]:
        path.unlink()
    with pytest.raises(ValueError, match="did not get in"):
        prepare_source(openi.OPENI, openi._OpeniConfig(root), BuildConfig(tmp_path / "pack", size=64, progress=False))
    source = openi._plan_openi(openi._OpeniConfig(root, partial=True))
    assert sum(len(item["images"]) for item in source.items) == 3 and source.dropped["picture is not there"] == sum(len(openi._openi_images(study)) for study in PATIENTS) - 3
    assert len(openi.openi_reports(root)) == len(PATIENTS), "the reports alone need no picture"


def test_a_damaged_file_is_a_reject(reports_root, tmp_path):
    root = shutil.copytree(reports_root, tmp_path / "damaged")
    folder = root / "ecgen-radiology"
    whole = (folder / "2.xml").read_text()
    (folder / "1.xml").write_text("")
    (folder / "2.xml").write_text(whole[:-40])
    (folder / "3.xml").write_bytes(whole.replace("CXR2", "CXR3").encode("latin-1") + b"\xff")
    (folder / "4.xml").write_text(whole.replace("CXR2_IM", "../../CXR2"))
    (folder / "5.xml").write_text((folder / "6.xml").read_text())
    (folder / "7.xml").unlink()
    (folder / "7.xml").symlink_to(folder / "7.xml")
    source = openi._plan_openi(openi._OpeniConfig(root))
    names = {item["study"] for item in source.items if "rejects" in item}
    assert names == {*(f"ecgen-radiology/{number}.xml" for number in (1, 2, 3, 4, 7)), "CXR6", "CXR5"}     # 5 is coded, and no longer has a report
    assert {reason for item in source.items for _, reason, _ in item.get("rejects", ()) if item["study"] == "CXR6"} == {f"ecgen-radiology/{n}.xml: 2 files have this uId" for n in (5, 6)}
    before = {item["study"]: item for item in openi._plan_openi(openi._OpeniConfig(reports_root)).items}
    assert all(item == before[item["study"]] for item in source.items if "rejects" not in item) and len(source.items) == len(PATIENTS) - 7 + 8


def test_labels_by_what_was_coded():
    labels = openi._mesh_labels(["Cardiomegaly/borderline", "Pulmonary Edema/interstitial", "Spine/degenerative"])
    assert {name: value for name, value in labels.items() if value} == {"Cardiomegaly": -1, "Edema": 1} and 0.0 in labels.values()
    assert set(openi._mesh_labels(["No Indexing"]).values()) == {None}


def test_frontal_pictures_by_the_table_of_projections(reports_root, tmp_path):
    root = shutil.copytree(reports_root, tmp_path / "frontal")
    with pytest.raises(DataError, match="needs the views"):
        openi._plan_openi(openi._OpeniConfig(root, "frontal"))
    names = [name for study in PATIENTS for name, _ in openi._openi_images(study)]
    rows = [{"uid": name[3:].split("_")[0], "filename": f"{name[3:]}.dcm.png", "projection": "Frontal" if name.endswith("1001") else "Lateral"} for name in names]
    pd.DataFrame(rows).to_csv(root / "indiana_projections.csv", index=False)
    source = openi._plan_openi(openi._OpeniConfig(root, "frontal"))
    assert [image["id"] for item in source.items for image in item["images"]] == [name for name in names if name.endswith("1001")]
    assert source.dropped == {"view is not Frontal": sum(name.endswith("2001") for name in names)}


def test_r2gen_splits(reports_root, tmp_path):
    root = shutil.copytree(reports_root, tmp_path / "r2gen")
    listed = {"train": ["CXR1_IM-0001", "CXR2_IM-0002-1001"], "val": ["CXR3_IM-0003"], "test": ["CXR4_IM-0004"]}
    (root / "annotation.json").write_text(json.dumps({name: [{"id": one, "report": "", "image_path": []} for one in ids] for name, ids in listed.items()}))
    source = openi._plan_openi(openi._OpeniConfig(root, "r2gen"))
    assert [(item["study"], item["split"]) for item in source.items] == [("CXR1", "train"), ("CXR2", "train"), ("CXR3", "validate"), ("CXR4", "test")]
    assert source.dropped["study is not in annotation.json"] == sum(len(openi._openi_images(study)) for study in PATIENTS[4:])


codes = st.lists(st.tuples(st.sampled_from(CODED_FINDINGS), st.sampled_from(["", "apex", "middle lobe", "hilum", "aorta"]), st.sampled_from(["", "left", "right", "bilateral"]))
                 | st.tuples(st.sampled_from(CODED_FINDINGS), st.sampled_from(["left lower lobe", "left hilum"]), st.just("left")), max_size=12)


@quick
@given(codes)
def test_codes_in_are_codes_out(written):
    labels, read = read_rad_restruct(write_rad_restruct(written), "1.json")
    assert read == sorted(map(list, set(written)))
    assert labels == {finding: float(finding in {name for name, *_ in written}) for finding in CODED_FINDINGS}


@quick
@given(st.data())
def test_a_damaged_structured_report_is_a_data_error_or_a_report(data):
    "Bytes changed, cut and doubled: no other error, and no label that is not 1, 0, -1 or blank."
    whole = bytearray(write_rad_restruct(phantom_codes(PATIENTS[0])))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(whole) - 1))
        whole[place:place + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=4) | st.sampled_from([b"[", b"]", b"{", b"}", b"null", b'"a"', b"3"]))
    try:
        labels, read = read_rad_restruct(bytes(whole), "1.json")
    except DataError as error:
        assert str(error).startswith("1.json: ") and error.code in (RejectCode.BAD_TEXT, RejectCode.BAD_LABEL)
    else:
        assert list(labels) == list(CODED_FINDINGS) and set(labels.values()) <= {1.0, 0.0, -1.0, None} and all(len(one) == 3 for one in read)


def structured(root: Path, number: int, change) -> None:
    "Change one report of Rad-ReStruct, in the archive."
    with tarfile.open(root / "radrestruct.tgz") as archive:
        files = {member.name: archive.extractfile(member).read() for member in archive}
    (root / "radrestruct.tgz").unlink()
    name = f"radrestruct/{number}.json"
    files[name] = change(files.get(name, files["radrestruct/1.json"]))
    with tarfile.open(root / "radrestruct.tgz", "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def prepare_openi(root: Path, out: Path, **options):
    return prepare_source(openi.OPENI, openi._OpeniConfig(root, **options), BuildConfig(out, size=64, progress=False))


@pytest.mark.parametrize("degree", [3, True, "borderline", {"hyperdistention": 1}, [7]])
@pytest.mark.parametrize("question", ["cardiovascular system/diseases/cardiomegaly", "respiratory system/sub_areas/lung/body_regions/lung"])
def test_a_degree_that_is_no_list_of_words_is_a_data_error(question, degree):
    area, *parts, last = question.split("/")
    node = {last: {"instances": [{"degree": degree}]}}
    for part in reversed(parts):
        node = {part: node}
    with pytest.raises(DataError, match="^1.json: an instance of .*expected lists of words"):
        read_rad_restruct(json.dumps([{"area": area} | node]).encode(), "1.json")


def answered(path: str, *instances: dict) -> dict[str, float | None]:
    "The labels of a structured report in which one question is answered with these instances, and all others with no."
    report = json.loads(write_rad_restruct([]))
    area, *parts = path.split("/")
    node = next(one for one in report if one["area"] == area)
    for part in parts:
        node = node[part]
    node["instances"] = list(instances)
    return read_rad_restruct(json.dumps(report).encode(), "1.json")[0]


LUNGS = ("Lung Opacity", "Nodule", "Mass", "Granuloma", "Scar")


@pytest.mark.parametrize("path, finding", [(path, None) for path in (
    "skeletal system/signs/opacity", "skeletal system/diseases/granuloma", "skeletal system/diseases/cicatrix", "breast/diseases/mass", "breast/diseases/cicatrix", "mediastinum/signs/opacity", "mediastinum/diseases/calcified granuloma",
    "cardiovascular system/signs/opacity", "cardiovascular system/diseases/nodule", "cardiovascular system/diseases/cicatrix", "cardiovascular system/diseases/calcified granuloma",
    "respiratory system/sub_areas/trachea/signs/opacity", "respiratory system/sub_areas/trachea/diseases/calcified granuloma")] + [
    ("respiratory system/sub_areas/lung/signs/opacity", "Lung Opacity"), ("respiratory system/sub_areas/lung/diseases/infiltrate", "Lung Opacity"), ("respiratory system/sub_areas/pleura/diseases/cicatrix", "Scar"), ("thorax/diseases/mass", "Mass"),
    ("thorax/diseases/calcified granuloma", "Granuloma"), ("cardiovascular system/diseases/heart failure", "Edema"), ("skeletal system/diseases/fractures, bone", "Fracture")])
def test_what_lies_outside_the_lungs_is_no_finding_of_lungs(path, finding):
    labels = answered(path, {"body_region": ["unspecified"]})
    assert [name for name, value in labels.items() if value] == [finding] * (finding is not None) and set(labels.values()) <= {0.0, 1.0}


@pytest.mark.parametrize("path, finding", [("cardiovascular system/diseases/cardiomegaly", "Cardiomegaly"), ("respiratory system/sub_areas/pleura/diseases/pleural effusion", "Pleural Effusion")])
def test_what_is_only_borderline_is_uncertain(path, finding):
    "As by the coders' MeSH headings: -1 if it is borderline wherever it is."
    for degrees, label in (([["borderline"]], -1), ([["borderline"], ["borderline"]], -1), ([["borderline"], ["no selection"]], 1), ([["mild"]], 1), ([None], 1), ([], 0)):
        assert answered(path, *({"degree": degree} for degree in degrees))[finding] == label
    assert openi._mesh_labels([f"{finding}/borderline"])[finding] == -1 and openi._mesh_labels([f"{finding}/borderline", f"{finding}/mild"])[finding] == 1


def test_an_archive_packed_as_the_repository_has_it(reports_root, tmp_path):
    "Lists of questions bear the numbers of reports: they are passed over, whatever stands first."
    root = shutil.copytree(reports_root, tmp_path / "root")
    with tarfile.open(root / "radrestruct.tgz") as archive:
        files = {Path(member.name).name: archive.extractfile(member).read() for member in archive}
    (root / "radrestruct.tgz").unlink()
    with tarfile.open(root / "radrestruct.tgz", "w:gz") as archive:
        for folder in ("a_qa_pairs", "new_reports", "train_qa_pairs"):
            for name, content in files.items():
                content = content if folder == "new_reports" else b'[[["Is there a nodule?"], ["no"], [], {}]]'
                member = tarfile.TarInfo(f"data/radrestruct/{folder}/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    for labels in ("mesh", "rad-restruct"):
        expected = openi._plan_openi(openi._OpeniConfig(reports_root, labels=labels))
        assert openi._plan_openi(openi._OpeniConfig(root, labels=labels)) == expected


@pytest.mark.parametrize("labels", ["mesh", "rad-restruct"])
@pytest.mark.parametrize("number, change, code, message", [
    (2, lambda data: data[:len(data) // 2], RejectCode.BAD_TEXT, "radrestruct/2.json: no structured report of Rad-ReStruct, or damaged"),
    (2, lambda data: b"", RejectCode.BAD_TEXT, "radrestruct/2.json: no structured report"),
    (2, lambda data: data + b" " * 2_000_000, RejectCode.BAD_TEXT, "radrestruct/2.json has 1000001 bytes"),
    (2, lambda data: data.replace(b'"nodule"', b'"module"', 1), RejectCode.BAD_LABEL, "diseases/module', which is no finding of Rad-ReStruct"),
    (2, lambda data: data.replace(b'"instances": []', b'"instances": null', 1), RejectCode.BAD_TEXT, "or in no list"),
    (999, lambda data: data, RejectCode.CONTRADICTION, "in radrestruct.tgz, but not among the reports"),
])
def test_a_damaged_structured_report_costs_its_codes_or_its_study(reports_root, tmp_path, number, change, code, message, labels):
    "The study only where its codes are its labels; all others stay as they are, and the fault is named either way."
    root = shutil.copytree(reports_root, tmp_path / "root")
    structured(root, number, change)
    whole, rest = prepare_openi(reports_root, tmp_path / "whole", labels=labels), prepare_openi(root, tmp_path / "rest", labels=labels)
    assert rest.rejects[["item", "code"]].to_numpy().tolist() == [[f"CXR{number}", str(code)]] and message in rest.rejects["reason"][0]
    faulty = whole.studies["study_id"] == f"CXR{number}"
    kept = whole.studies[~faulty] if labels == "rad-restruct" else whole.studies
    codes = [None if study == f"CXR{number}" else coded for study, coded in zip(kept["study_id"], kept["coded"])]
    assert rest.studies["study_id"].tolist() == kept["study_id"].tolist() and rest.studies["coded"].tolist() == codes and rest.labels.equals(whole.labels.loc[kept.index].reset_index(drop=True))
    assert sum(rest.manifest["rejected"].values()) == len(whole) - len(rest), "what costs no study costs no picture"
    assert any(message in problem for problem in check_source(openi.OPENI, openi._OpeniConfig(root, labels=labels))[1])
    table = openi.openi_reports(root).set_index("study")
    assert (table["dropped"] == openi.openi_reports(reports_root).set_index("study")["dropped"]).all(), "a report is none the worse for it"
    assert {study: fault for study, fault in table["fault"].items() if fault}.keys() == {f"CXR{number}"} & {*table.index} and table["coded"].isna().sum() == (number == 2)


def test_the_labels_are_chosen_and_the_codes_are_kept_either_way(reports_root, tmp_path):
    packs = {labels: prepare_openi(reports_root, tmp_path / labels, labels=labels) for labels in ("mesh", "rad-restruct")}
    assert list(packs["mesh"].labels) == list(openi._MESH.values()) and list(packs["rad-restruct"].labels) == list(CODED_FINDINGS)
    for pack in packs.values():
        pack.verify()
        assert [row.tolist() for row in coded_findings(pack).to_numpy()] == [[f"CXR{number}", *one] for number, study in enumerate(PATIENTS, 1) for one in phantom_codes(study)]
        assert target_agreement(pack).loc["finding"].loc["all", "recall"] > 0.95 and f"{len(PATIENTS)} reports were coded" in describe_pack(pack)
    task = pack_task(packs["rad-restruct"])
    assert task.classes == CODED_FINDINGS and set(np.unique(task.targets)) == {0, 1} and len(task) == len(packs["rad-restruct"])
    rows = packs["rad-restruct"].image_table["study"].to_numpy()
    assert (task.targets == packs["rad-restruct"].labels.to_numpy()[rows]).all()
    assert pack_task(packs["rad-restruct"], classes=["Scar", "Nodule"]).classes == ("Scar", "Nodule")


def test_a_report_without_a_structured_one_is_blank_and_not_negative(reports_root, tmp_path):
    "Half of the reports are not coded: of those nothing is absent."
    root = shutil.copytree(reports_root, tmp_path / "half")
    (root / "radrestruct").mkdir()
    for number, study in enumerate(PATIENTS, 1):
        if number % 2:
            (root / f"radrestruct/{number}.json").write_bytes(write_rad_restruct(phantom_codes(study)))
    (root / "radrestruct.tgz").unlink()
    left_out = json.loads(write_rad_restruct([]))
    del left_out[0]["objects"]["stents"]
    (root / "radrestruct/1.json").write_text(json.dumps(left_out))
    pack = prepare_openi(root, tmp_path / "pack", labels="rad-restruct")
    even = [int(study[3:]) % 2 == 0 for study in pack.studies["study_id"]]
    assert pack.labels[even].isna().all(axis=None) and pack.studies["coded"][even].isna().all() and len(pack) == sum(len(openi._openi_images(study)) for study in PATIENTS)
    assert pack.labels.iloc[0].isna().tolist() == [finding == "Support Devices" for finding in CODED_FINDINGS], "what was not asked is blank"
    assert len(pack_task(pack)) == sum(len(openi._openi_images(study)) for study in PATIENTS[::2])
    assert pack.manifest["source"]["rad_restruct"] == "radrestruct"


def test_without_rad_restruct_all_is_as_it_was(reports_root, tmp_path):
    "Packs of before can still be prepared: the same key and hash as when nobody knew of Rad-ReStruct."
    root = shutil.copytree(reports_root, tmp_path / "without")
    (root / "radrestruct.tgz").unlink()
    pack = prepare_openi(root, tmp_path / "pack")
    assert pack.manifest["coded"] == [] and "coded" not in pack.studies and "rad_restruct" not in pack.manifest["source"] and "coded" not in describe_pack(pack)
    assert not any("coded" in item for item in openi._plan_openi(openi._OpeniConfig(root)).items)
    with pytest.raises(ValueError, match="prepare Open-i with radrestruct.tgz in its folder"):
        target_agreement(pack)
    with pytest.raises(DataError, match="no Rad-ReStruct for its labels: no radrestruct.tgz"):
        prepare_openi(root, tmp_path / "other", labels="rad-restruct")


@pytest.mark.skipif(not REAL.is_dir(), reason="the real reports are not part of the repository")
def test_the_real_reports(tmp_path):
    "All 2 373: sections by an independent reading of the XML are the sections that come out; counts as published with the data."
    table = openi.openi_reports(REAL).set_index("study")
    published = pd.read_csv(REAL / "reports.csv", dtype=str, keep_default_na=False).set_index("uid")
    assert len(table) == len(published) == 2373 and (table["findings"] != "").sum() == 2043 and (table["impression"] != "").sum() == 2347
    inside = []      # reports with a heading within a section, which is cut out of it
    for study, row in published.iterrows():
        wanted = {name: " ".join(html.unescape(row[name]).split()) for name in openi._SECTIONS if row[name].split()}
        found = parse_sections(table.text[study])
        if found != wanted:
            inside.append(study)
            assert set(found) - set(wanted) == {"comparison"} and found["comparison"] in wanted["indication"], study
        assert table.images[study] == row["image_ids"].split() and table.major[study] == [term.strip() for term in row["mesh_major"].split(";") if term.strip()], study
    assert inside == ["CXR2800"]
    assert table.dropped.value_counts().to_dict() == {"": 2352, "report: empty report": 21}
    assert table.sentences[table.dropped == ""].map(len).sum() > 13_000
