"""What a user installs: sdist and wheel built from a clean copy, put into an environment that has the run-time requirements alone."""
import email
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from notebooks import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

DEVELOPMENT = {"nbdev", "fastcore", "execnb", "ghapi", "jupyterlab", "nbconvert", "playwright", "pytest", "ruff", "build"}


def run(*command, **options) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


def tree_files() -> set[str]:
    "What of medvis/ belongs in a wheel: everything but caches."
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / "medvis").rglob("*")
            if path.is_file() and "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    "A folder with the sdist and the wheel made from it, as for PyPI."
    copy, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in ("setup.py", "settings.ini", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "medvis", copy / "medvis", ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, copy)
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_string(archive.read(name).decode())


def needed(requirements: list[Requirement]) -> set[str]:
    "Names of the distributions that these requirements ask for, theirs included."
    found, todo = set(), list(requirements)
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras} - {e for n, e in found if n == name}:
            found.add((name, extra))
            asked = map(Requirement, importlib.metadata.requires(name) or [])
            todo += [one for one in asked if not one.marker or one.marker.evaluate({"extra": extra})]
    return {name for name, _ in found}


@pytest.fixture(scope="module")
def installed(wheel: Path, metadata, tmp_path_factory) -> Path:
    "The bin/ of an environment with the wheel, and links to the run-time requirements and to nothing else."
    home = tmp_path_factory.mktemp("user")
    venv.create(home / "env", symlinks=True)
    python = home / "env/bin/python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    links = home / "requirements"
    links.mkdir()
    for name in needed([one for one in map(Requirement, metadata.get_all("Requires-Dist")) if not one.marker]):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (links / top).exists():  # `nvidia/` belongs to several
                (links / top).symlink_to(distribution.locate_file(top))
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    Path(site, "requirements.pth").write_text(f"{links}\n")
    return python.parent


@pytest.fixture
def alone(tmp_path: Path) -> dict:
    "subprocess options of a newcomer: an empty home, no PYTHONPATH, not in the project's folder."
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV"))}
    return {"cwd": tmp_path, "env": env | {"HOME": str(tmp_path), "MPLBACKEND": "Agg"}}


def test_wheel_holds_the_tree(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == tree_files()


def test_sdist_holds_what_it_is_built_from(built: Path):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert held >= tree_files() | {"setup.py", "settings.ini", "pyproject.toml", "README.md", "LICENSE"}


def test_metadata(metadata):
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    plain = {canonicalize_name(one.name) for one in requirements if not one.marker}
    assert "torch" in plain and not plain & DEVELOPMENT
    assert set(metadata.get_all("Provides-Extra")) == {"dicom", "lab", "small", "export", "attribution", "cluster", "docs", "dev"}
    assert any(one.name == "pydicom" and one.marker.evaluate({"extra": "dicom"}) for one in requirements)
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert {"Typing :: Typed", "Intended Audience :: Science/Research"} <= set(metadata.get_all("Classifier"))
    addresses = [*(metadata.get_all("Project-URL") or ()), metadata["Home-page"], metadata["Author-email"]]
    assert not any(".invalid" in (address or "") for address in addresses), "an address that leads nowhere is none"


def test_environment_has_no_development_tools(installed: Path, alone):
    found = run(installed / "python", "-c", "import importlib.metadata as m; print(*[d.name for d in m.distributions()])", **alone)
    assert "medvis" in found.split() and not {canonicalize_name(name) for name in found.split()} & DEVELOPMENT


def test_every_module_imports(installed: Path, wheel: Path, alone):
    walk = ("import importlib, pkgutil, medvis; print(medvis.__file__)\n"
            "for m in pkgutil.walk_packages(medvis.__path__, 'medvis.'): importlib.import_module(m.name); print(m.name)")
    where, *names = run(installed / "python", "-W", "error::SyntaxWarning", "-c", walk, **alone).split()
    assert Path(where).is_relative_to(installed.parent)
    with zipfile.ZipFile(wheel) as archive:
        files = [name for name in archive.namelist() if name.endswith(".py")]
    assert set(names) == {name[:-3].replace("/", ".").removesuffix(".__init__") for name in files} - {"medvis"}


def test_command(installed: Path, alone):
    shown = run(installed / "medvis", "--help", **alone)
    for command in ("demo", "prepare", "pretrain", "probe", "show"):
        assert command in shown
