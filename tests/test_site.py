"""The site: it is built without a warning, its links lead somewhere, its search finds, its widgets live, and nothing is fetched."""
import importlib
import inspect
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from browser import browser  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import site_pages  # noqa: E402

SHOWN = ["objectives", "widgets"]  # rooms of the small site that is built here; `make docs` builds the whole
QUESTIONS = {  # what is typed into the search box -> the page that should be among the first five
    "SLURM": "howto/many", "resume": "howto/resume", "mimic download": "howto/mimic", "install dicom": "start/install", "booktabs": "howto/figure", "my own folder": "howto/folder",
    "laterality": "glossary", "sinkhorn": "notebooks/objectives/03_prototypes", "mutual information": "notebooks/objectives/04_mutual_information", "my own model": "howto/model",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site") / "site"
    site_pages.build(out, SHOWN)     # a warning is an error
    return out / "html"


class Page(HTMLParser):
    "What a page names, asks for and links to."

    def __init__(self, text: str):
        super().__init__()
        self.names, self.links, self.loads = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.names |= {found[key] for key in ("id", "name") if found.get(key)}
        self.links += [found["href"]] if tag == "a" and found.get("href") else []
        self.loads += [found[key] for key in ("src", "href") if found.get(key) and (tag in ("script", "img", "iframe", "source") or tag == "link" and found.get("rel") != "canonical")]


def test_every_link_leads_somewhere_and_nothing_is_loaded_from_elsewhere(site):
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html") if "_static" not in path.parts}
    dead = []
    for path, page in pages.items():
        for link in [*page.links, *page.loads]:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https"):
                dead += [f"{path.name} loads {link}"] * (link in page.loads)
            elif not parts.scheme:
                target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
                target = target / "index.html" if target.is_dir() else target
                if not target.exists() or parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].names:
                    dead.append(f"{path.relative_to(site)} -> {link}")
    assert len(pages) > 200 and not dead, "\n".join(dead[:20])


def test_every_public_name_is_documented():
    bare = []
    for path in site_pages.notebook_paths():
        notebook = site_pages.read_notebook(path)
        module = site_pages.module_of(notebook)
        if module is None:
            continue
        loaded, made_in = importlib.import_module(module), dict(site_pages.definitions(notebook))
        if hasattr(loaded, "__path__"):     # a door: its names are documented where they are made
            continue
        for name in site_pages.public_names(module):
            thing = getattr(loaded, name)
            if inspect.isclass(thing) or inspect.isroutine(thing):
                bare += [f"{module}.{name}"] * (not inspect.getdoc(thing))
            else:
                bare += [f"{module}.{name}"] * (not site_pages.said_of(name, notebook["cells"], made_in[name]))
    assert not bare, f"{len(bare)} names are not documented: {', '.join(bare)}"


def test_every_function_and_class_has_an_example_that_was_run():
    "A cell of its notebook, which nbdev_test runs; of a constant the page shows the value."
    without, counted = [], 0
    for path in site_pages.notebook_paths():
        notebook = site_pages.read_notebook(path)
        module, made_in = site_pages.module_of(notebook), dict(site_pages.definitions(notebook))
        loaded = importlib.import_module(module) if module else None
        for name in () if module is None or hasattr(loaded, "__path__") else site_pages.public_names(module):
            if inspect.isclass(getattr(loaded, name)) or inspect.isroutine(getattr(loaded, name)):
                counted += 1
                without += [f"{module}.{name}"] * (site_pages.example_of(name, notebook["cells"], made_in[name]) is None)
    assert counted > 800 and not without, f"{len(without)} of {counted}: {', '.join(without)}"


def test_what_is_not_documented_and_not_shown_is_found():
    cells = [{"cell_type": "code", "source": source} for source in ("#| export\nclass Batch:\n    x: int\n\n\nLONE = 3", "LON = 1", "#| export\ndef collate(x) -> Batch:\n    return Batch()", "assert collate(3)")]
    assert site_pages.example_of("Batch", cells, 0) == "assert collate(3)" and site_pages.example_of("LONE", cells, 0) is None
    assert site_pages.said_of("LONE", cells, 0) == ""


def test_search_finds_what_is_asked_without_a_network(site, browser):  # noqa: F811
    missed = {}
    with browser.new_context(offline=True) as session:
        page, asked = session.new_page(), []
        page.on("request", lambda request: asked.append(request.url))
        for question, wanted in QUESTIONS.items():
            page.goto(f"{(site / 'search.html').as_uri()}?q={question}")
            page.wait_for_selector("#search-results ul.search li a")
            page.wait_for_function("document.querySelector('#search-results p.search-summary')?.innerText.length > 0")
            found = page.eval_on_selector_all("#search-results ul.search li > a", "links => links.map(link => link.href)")
            if not any(wanted in link for link in found[:5]):
                missed[question] = [link.rpartition("/html/")[2] for link in found[:5]]
        assert not missed, missed
        assert all(url.startswith(("file:", "data:", "blob:")) for url in asked)


def test_a_widget_lives_in_its_page(site, browser):  # noqa: F811
    with browser.new_context(offline=True) as session:
        page, complaints, asked = session.new_page(), [], []
        page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((site / "notebooks/widgets/07_tour.html").as_uri())
        frame = page.frame_locator("iframe.widget")
        frame.locator("[data-ready]").first.wait_for()
        assert all(url.startswith(("file:", "data:", "blob:")) for url in asked) and not complaints, (asked, complaints)
