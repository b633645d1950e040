"""Precision and recall of the rules of `medvis.data.targets` against Rad-ReStruct's structured findings, sides and regions.

`python benchmarks/targets.py PLACE [--half develop|report|all]`: a folder with Open-i's reports and `radrestruct.tgz`, or a Pack that was prepared from one (of any recipe).
Prints counts, never a word of a report. Rules were made with the patients of `develop` in view; `report` are the others (one study a patient, split by a hash of its number).
"""
import argparse
import hashlib
from pathlib import Path

import pandas as pd

from medvis.data.coded import CODED_FINDINGS, compare_targets
from medvis.data.pack import Pack
from medvis.data.sets.openi import openi_reports
from medvis.data.targets import STATUSES


def half(study: str) -> str:
    return ("develop", "report")[hashlib.sha256(study.encode()).digest()[0] % 2]


def coded_reports(place: Path) -> pd.DataFrame:     # index: study; sentences, coded
    "The coded reports of a folder of Open-i, or of a Pack. ValueError if there are none."
    if (place / "manifest.json").exists():
        reports = Pack(place).studies.rename(columns={"study_id": "study"})
    else:
        reports = openi_reports(place)
    if "coded" not in reports or reports["coded"].isna().all():
        raise ValueError(f"{place}: no coded reports; expected radrestruct.tgz beside the reports, or a Pack that was prepared from such a folder")
    return reports[reports["coded"].notna()].set_index("study")[["sentences", "coded"]]


def prevalence(coded: pd.Series) -> pd.DataFrame:   # of each finding, the most frequent first: reports, share, with a side, with a zone
    "In how many reports a finding was coded."
    codes = pd.DataFrame([(study, *one) for study, codes in coded.items() for one in codes], columns=["study", "finding", "region", "side"])
    counts = pd.DataFrame({"reports": codes.groupby("finding")["study"].nunique(), "with a side": codes[codes["side"] != ""].groupby("finding")["study"].nunique(),
                           "with a region": codes[codes["region"] != ""].groupby("finding")["study"].nunique()}).reindex(CODED_FINDINGS).fillna(0).astype(int)
    return counts.assign(share=counts["reports"] / len(coded)).sort_values("reports", ascending=False, kind="stable")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("place", type=Path)
    parser.add_argument("--half", default="report", choices=("develop", "report", "all"))
    chosen = parser.parse_args()
    reports = coded_reports(chosen.place)
    print(f"{len(reports)} coded reports\n\n{prevalence(reports['coded']).round(3).to_string()}")
    kept = reports[[chosen.half in ("all", half(study)) for study in reports.index]]
    print(f"\n{len(kept)} reports, half: {chosen.half}")
    for statuses in (STATUSES[:1], STATUSES[:2]):
        table = compare_targets(kept["sentences"].to_dict(), kept["coded"].to_dict(), statuses=statuses)
        print(f"\nFindings, counted as there if {' or '.join(statuses)}\n{table.loc['finding'].round(3).to_string()}")
    print(f"\nPlaces, of the findings that both have and Rad-ReStruct places\n{table.drop(index='finding', level=0).round(3).to_string()}")


if __name__ == "__main__":
    main()
