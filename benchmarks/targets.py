"""Precision and recall of the rules of `medvis.data.targets` against Rad-ReStruct's structured findings, sides and regions.

`python benchmarks/targets.py FOLDER [--half develop|report|all]`: a folder with Open-i's reports (`NLMCXR_reports.tgz` or `ecgen-radiology`) and `radrestruct.tgz`.
Prints counts, never a word of a report. Rules were made with the patients of `develop` in view; `report` are the others (one study a patient, split by a hash of its number).
"""
import argparse
import hashlib
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from medvis.data.sets.openi import openi_reports
from medvis.data.targets import STATUSES, agreement, merge_targets, sentence_targets

NAMES = {   # of Rad-ReStruct -> finding
    "opacity": "Lung Opacity", "airspace disease": "Lung Opacity", "infiltrate": "Lung Opacity", "pulmonary atelectasis": "Atelectasis",
    "cardiomegaly": "Cardiomegaly", "pleural effusion": "Pleural Effusion", "hydropneumothorax": "Pleural Effusion", "pneumothorax": "Pneumothorax",
    "pulmonary edema": "Edema", "pulmonary congestion": "Edema", "heart failure": "Edema", "consolidation": "Consolidation", "pneumonia": "Pneumonia",
    "nodule": "Nodule", "mass": "Mass", "calcified granuloma": "Granuloma", "granuloma": "Granuloma", "cicatrix": "Scar", "pulmonary fibrosis": "Fibrosis",
    "pulmonary emphysema": "Emphysema", "bullous emphysema": "Emphysema", "pulmonary disease, chronic obstructive": "Emphysema",
    "fractures, bone": "Fracture",
    "catheters, indwelling": "Support Devices", "implanted medical device": "Support Devices", "medical device": "Support Devices",
    "tube, inserted": "Support Devices", "stents": "Support Devices", "foreign bodies": "Foreign Object", "surgical instruments": "Foreign Object"}
ZONES = {"upper lobe": "upper", "apex": "upper", "middle lobe": "middle", "hilum": "middle", "lower lobe": "lower", "costophrenic angle": "lower"}


def instances(node: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict]]:
    "(names on the way, instance) of all that a report of Rad-ReStruct holds."
    for name, below in node.items() if isinstance(node, dict) else ():
        if name == "instances":
            yield from ((path, one) for one in below)
        else:
            yield from instances(below, (*path, name))


def place(instance: dict) -> tuple[set[str], set[str]]:     # sides, zones
    regions = instance.get("body_region") or ()     # "middle lobe" is also said of the left lung, so it tells no side
    sides = {side for side in ("left", "right") for region in regions if region.startswith(side)}
    sides |= {side for side in ("left", "right", "bilateral") if side in (instance.get("localization") or ())}
    return sides, {zone for name, zone in ZONES.items() if any(region.endswith(name) for region in regions)}


def finding_of(path: tuple[str, ...], instance: dict) -> str | None:
    if path[-2:] == ("body_regions", "lung") and "hyperdistention" in (instance.get("degree") or ()):
        return "Hyperinflation"
    if "pleura" in path and path[-1] == "thickening":
        return "Pleural Thickening"
    return NAMES.get(path[-1])


def structured(report: list[dict]) -> dict[str, tuple[str, str | None, str | None]]:   # finding -> asserted, side, zone
    found = {}
    for area in report:
        for path, instance in instances(area):
            if name := finding_of(path, instance):
                sides, zones = found.setdefault(name, (set(), set()))
                for told, more in zip((sides, zones), place(instance)):
                    told |= more
    one = lambda values, several: several if len(values) > 1 else next(iter(values), None)
    return {name: ("asserted", one(sides, "bilateral"), one(zones, None)) for name, (sides, zones) in found.items()}


def read_structured(root: Path) -> dict[str, dict]:     # study -> see `structured`
    with tarfile.open(root / "radrestruct.tgz") as archive:
        files = {member.name: archive.extractfile(member).read() for member in archive if member.name.endswith(".json")}
    return {f"CXR{Path(name).stem}": structured(json.loads(text)) for name, text in files.items()}


def half(study: str) -> str:
    return ("develop", "report")[hashlib.sha256(study.encode()).digest()[0] % 2]


def table(found: dict[str, dict], truth: dict[str, dict]) -> pd.DataFrame:
    "One row a study and finding that either has: the status that was found, whether it is in the truth, sides and zones of both."
    none = (None, None, None)
    return pd.DataFrame([(study, name, *found[study].get(name, none), *truth[study].get(name, none))
                         for study in truth for name in sorted({*found[study], *truth[study]})],
                        columns=["study", "finding", "status", "side", "zone", "true", "true_side", "true_zone"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--half", default="report", choices=("develop", "report", "all"))
    chosen = parser.parse_args()
    reports = openi_reports(chosen.folder if (chosen.folder / "ecgen-radiology").is_dir() else chosen.folder / "NLMCXR_reports.tgz")
    truth = read_structured(chosen.folder)
    kept = [study for study in reports["study"] if study in truth and chosen.half in ("all", half(study))]
    sentences = reports.set_index("study")["sentences"]
    found = {study: merge_targets([sentence_targets(sentence) for sentence in sentences[study]]) for study in kept}
    rows = table(found, {study: truth[study] for study in kept})
    rows = rows[rows["finding"].isin({*NAMES.values(), "Hyperinflation", "Pleural Thickening"})]
    print(f"{len(kept)} reports, half: {chosen.half}")
    for said in (STATUSES[:1], STATUSES[:2]):
        told = rows.assign(said=rows["status"].where(rows["status"].isin(said)).where(lambda status: status.isna(), "asserted"))
        print(f"\nFindings, counted as there if {' or '.join(said)}\n", agreement(told["said"], told["true"], told["finding"]).round(3).to_string())
    both = rows[rows["status"].isin(STATUSES[:2]) & rows["true"].notna()]
    for kind in ("side", "zone"):
        placed = both[both[f"true_{kind}"].notna()]
        print(f"\n{kind}, of the findings that both have and Rad-ReStruct gives a {kind}\n", agreement(placed[kind], placed[f"true_{kind}"], placed[f"true_{kind}"]).round(3).to_string())
    opposite = both[both["side"].isin(("left", "right")) & both["true_side"].isin(("left", "right"))]
    print(f"\none side in both: {len(opposite)}, the same in {int((opposite['side'] == opposite['true_side']).sum())}")


if __name__ == "__main__":
    main()
