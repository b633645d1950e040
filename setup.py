"""Package metadata, read from settings.ini (which nbdev reads too). There is no [project] table in pyproject.toml."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=["="])
config.read("settings.ini", encoding="utf-8")
settings = config["DEFAULT"]
extras = {name: settings[f"{name}_requirements"].split() for name in ("dicom", "lab", "small", "export", "attribution", "cluster", "docs", "dev")}
extras["dev"] += extras["dicom"] + extras["lab"] + extras["export"] + extras["attribution"] + extras["docs"]

home = settings["git_url"]
addresses = {"Changes": f"{home}/blob/{settings['branch']}/CHANGELOG.md", "Issues": f"{home}/issues"}
published = {} if ".invalid" in home else dict(url=home, author_email=settings["author_email"], project_urls=addresses)

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=settings["keywords"],
    author=settings["author"],
    **published,
    classifiers=[
        "Development Status :: 3 - Alpha",
        f"Intended Audience :: {settings['audience']}",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
        "Typing :: Typed",
    ],
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=f">={settings['min_python']}",
    packages=find_packages(include=[settings["lib_path"], f"{settings['lib_path']}.*"]),
    package_data={"": ["static/*", "py.typed"]},
    install_requires=settings["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": settings["console_scripts"].split()},
    zip_safe=False,
)
