"""The papers around the code say what is true: addresses that exist, versions in step, a card as the export writes it."""
import re
import subprocess
from configparser import ConfigParser

import pytest
import yaml
from notebooks import ROOT

from medvis.exchange.card import card_text

CONFIG = ConfigParser(delimiters=["="])
CONFIG.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = CONFIG["DEFAULT"]
NAMED = ("CITATION.cff", "CHANGELOG.md", "CODE_OF_CONDUCT.md", "SECURITY.md", "DATA_USE.md", "MODEL_CARD.md", "LICENSE", "CONTRIBUTING.md")


def committed() -> list[str]:
    "Files of the repository that are text."
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [name for name in names if name and (ROOT / name).is_file() and not name.endswith((".webp", ".png", ".parquet", ".safetensors", ".u8"))]


def test_no_file_claims_a_home_that_is_not_there():
    if not (ROOT / ".git").exists():
        pytest.skip("not a repository")
    claims = re.compile(r"medvis\.github\.io|github\.com/medvis\b|medvis@|pypi\.org/project/medvis|pip install (--\S+ )*[\"']?medvis(?!\\?\[)")
    found = [name for name in committed() if name not in ("settings.ini", "tests/test_papers.py") and claims.search((ROOT / name).read_text(encoding="utf-8", errors="ignore"))]
    assert not found


def test_addresses_are_true_or_lead_nowhere_on_purpose():
    addresses = [SETTINGS[name] for name in ("doc_host", "git_url", "author_email")]
    assert len({".invalid" in address for address in addresses}) == 1, "published or not: all of them"
    assert ("repository-code" in (ROOT / "CITATION.cff").read_text()) == (".invalid" not in SETTINGS["git_url"])


def test_citation():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["cff-version"] == "1.2.0" and cited["version"] == SETTINGS["version"] and cited["license"] == "Apache-2.0"
    assert [paper["year"] for paper in cited["references"]] == [2021, 2022, 2022]
    assert all(paper["title"] and len(paper["authors"]) >= 4 and paper["collection-title"] for paper in cited["references"])


def test_changes_name_the_version():
    assert re.search(rf"^## {re.escape(SETTINGS['version'])}\b", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)


def test_the_card_to_fill_in_is_the_one_that_export_writes():
    assert (ROOT / "MODEL_CARD.md").read_text(encoding="utf-8") == card_text()


@pytest.mark.parametrize("name", NAMED)
def test_each_paper_stands_there(name):
    assert len((ROOT / name).read_text(encoding="utf-8")) > 300


def test_the_workflow_calls_the_check_and_the_forms_are_forms():
    steps = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["test"]["steps"]
    assert ".ci/run" in [step.get("run") for step in steps] and (ROOT / ".ci/run").stat().st_mode & 0o111
    forms = [yaml.safe_load(path.read_text()) for path in sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")) if path.stem != "config"]
    assert len(forms) == 3 and all(form["name"] and form["description"] and form["body"] for form in forms)
