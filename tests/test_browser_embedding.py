"""The embedding view and the slider in a real browser, alone: their saved pages, opened from disk, without network."""
import statistics

import numpy as np
import pandas as pd
import pytest
from browser import browser, opened  # noqa: F401  (a fixture)

from medvis.data.phantom import Phantom
from medvis.widgets.embedding import EmbeddingView
from medvis.widgets.shell import standalone, static

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">&'\" $x_{2}$ عربى 🩻\u202e"
KINDS = ["Nodule", "Edema", "none"]


@pytest.fixture(scope="module")
def films():
    return [Phantom(64)[k].image for k in range(4)]


@pytest.fixture
def view(films):
    "Three far clusters of 20 points at (0, 0), (10, 0), (5, 8)."
    rng, kind = np.random.default_rng(0), np.repeat([0, 1, 2], 20)
    places = np.array([[0, 0], [10, 0], [5, 8]])[kind] + rng.normal(scale=0.5, size=(60, 2))
    cell = rng.integers(0, 4, (60, 2)) / 4
    points = pd.DataFrame({
        "x": places[:, 0], "y": places[:, 1], "finding": np.array(KINDS)[kind], "fit": np.linspace(0, 1, 60), "picture": np.arange(60) % 4,
        "x0": cell[:, 0], "y0": cell[:, 1], "x1": cell[:, 0] + 0.25, "y1": cell[:, 1] + 0.25,
        "text": [f"sentence {k}" if k else HOSTILE for k in range(60)]})
    return EmbeddingView(points, films)


@pytest.fixture
def page(view, browser, tmp_path):  # noqa: F811
    with opened(browser, view.to_html(tmp_path / "view.html", "Plane")) as page:
        yield page


def state(page, name):
    return page.evaluate("name => document.getElementById('widget').model.get(name)", name)


def give(page, name, value):
    page.evaluate("([name, value]) => document.getElementById('widget').model.set(name, value)", [name, value])


def place(view, page, i):
    "Where a point lies in the window: the view as it fits all points at first."
    frame = page.locator(".plot canvas").last.bounding_box()
    x, y = view.points["x"], view.points["y"]
    zoom = 0.92 * min(frame["width"] / np.ptp(x), frame["height"] / np.ptp(y))
    left = (x[i] - (x.max() + x.min()) / 2) * zoom + frame["x"] + frame["width"] / 2
    return left, frame["y"] + frame["height"] / 2 - (y[i] - (y.max() + y.min()) / 2) * zoom


def pixels(page, which=0):
    "How many pixels of a canvas are not clear."
    return page.evaluate("""which => {
        const canvas = document.querySelectorAll('.plot canvas')[which], { width, height } = canvas;
        const copy = Object.assign(document.createElement('canvas'), { width, height }).getContext('2d', { willReadFrequently: true });
        copy.drawImage(canvas, 0, 0);
        const all = copy.getImageData(0, 0, width, height).data;
        let n = 0; for (let k = 3; k < all.length; k += 4) n += all[k] > 60; return n; }""", which)


def settled(page):
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def test_hover_shows_region_and_sentence(view, page):
    page.mouse.move(*place(view, page, 25))
    assert state(page, "focus") == 25
    card = page.locator(".card")
    assert "sentence 25" in card.inner_text() and "Edema" in card.inner_text()
    page.wait_for_selector(".films[data-drawn='25']")
    # the picture is the film, the outline where the region is
    drawn = page.evaluate("""() => { const c = document.querySelector('.films canvas');
        return Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).filter((_, k) => k % 4 < 3); }""")
    drawn = np.array(drawn).reshape(320, 320, 3)
    coloured = np.ptp(drawn, axis=2) > 40
    rows, columns = np.flatnonzero(coloured.any(1)), np.flatnonzero(coloured.any(0))
    box = view.points.iloc[25][["x0", "y0", "x1", "y1"]].to_numpy(float) * 320
    assert np.abs(np.array([columns[0], rows[0], columns[-1], rows[-1]]) - box).max() < 6
    film = np.kron(view.pictures[1], np.ones((5, 5)))
    assert np.corrcoef(film[~coloured], drawn[..., 0][~coloured])[0, 1] > 0.95
    page.mouse.move(5, 5)


def test_pointing_at_nothing_finds_nothing(view, page):
    page.mouse.move(*place(view, page, 25))
    left, top = place(view, page, 25)
    page.mouse.move(left, top - 200)
    assert state(page, "focus") == -1 and "Point at a point" in page.locator(".card").inner_text()


def test_hostile_text_stays_text(view, page):
    give(page, "focus", 0)
    assert "<script>document.title" in page.locator(".card .report").inner_text() and "🩻" in page.locator(".card .report").inner_text()
    give(page, "selection", [0])
    assert page.locator(".chosen button").first.get_attribute("title") == HOSTILE
    assert page.title() == "Plane" and page.locator("img").count() == 0


def test_a_box_selects_one_cluster(view, page):
    page.get_by_role("button", name="Box").click()
    at = np.array([place(view, page, k) for k in range(20)])
    page.mouse.move(*(at.min(0) - 12))
    page.mouse.down()
    page.mouse.move(*at.mean(0), steps=3)
    page.mouse.move(*(at.max(0) + 12))
    page.mouse.up()
    assert state(page, "selection") == list(range(20))
    assert "20 selected" in page.locator(".status").inner_text()
    assert page.locator(".chosen canvas").count() == 20
    page.get_by_role("button", name="Forget").click()
    assert state(page, "selection") == []


def test_a_lasso_selects_what_it_surrounds(view, page):
    page.get_by_role("button", name="Lasso").click()
    at = np.array([place(view, page, k) for k in range(40, 60)])
    (x0, y0), (x1, y1) = at.min(0) - 12, at.max(0) + 12
    page.mouse.move(x0, y0)
    page.mouse.down()
    for corner in ((x1, y0), (x1, y1), (x0, y1)):
        page.mouse.move(*corner, steps=3)
    page.mouse.up()
    assert state(page, "selection") == list(range(40, 60))
    page.mouse.move(*place(view, page, 3))  # with shift, a box adds
    give(page, "mode", "pan")
    at = np.array([place(view, page, k) for k in range(20)])
    page.keyboard.down("Shift")
    page.mouse.move(*(at.min(0) - 12))
    page.mouse.down()
    page.mouse.move(*(at.max(0) + 12), steps=2)
    page.mouse.up()
    page.keyboard.up("Shift")
    assert state(page, "selection") == [*range(20), *range(40, 60)]


def test_the_legend_hides_and_shows(view, page):
    settled(page)
    before = pixels(page)
    page.get_by_role("button", name="Edema").click()
    settled(page)
    assert state(page, "hidden") == ["Edema"] and "40 points" in page.locator(".status").inner_text()
    assert pixels(page) < 0.8 * before
    page.mouse.move(*place(view, page, 25))
    assert state(page, "focus") == -1, "what is hidden is not found"
    page.get_by_role("button", name="Edema").dblclick()
    assert state(page, "hidden") == ["Nodule", "none"]
    page.get_by_role("button", name="Show all kinds").click()
    settled(page)
    page.mouse.move(5, 5)
    assert state(page, "hidden") == [] and page.get_by_role("button", name="Edema").get_attribute("aria-pressed") == "true"


def test_any_column_colours(view, page):
    page.get_by_label("Colour").select_option("fit")
    assert state(page, "colour") == "fit" and page.locator(".legend .bar").count() == 1
    settled(page)
    assert pixels(page) > 500


def test_keys_alone(view, page):
    canvas = page.get_by_role("application")
    canvas.focus()
    page.keyboard.press("ArrowRight")
    first = state(page, "focus")
    assert first >= 0
    for _ in range(60):
        page.keyboard.press("ArrowRight")
    assert view.points["finding"][state(page, "focus")] == "Edema", "the rightmost points"
    assert state(page, "focus") == view.points["x"].idxmax()
    assert "Edema" in page.locator("[aria-live]").inner_text()
    page.keyboard.press("Enter")
    assert state(page, "selection") == [state(page, "focus")]
    page.keyboard.press("Enter")
    assert state(page, "selection") == []
    for key in ("+", "+", "Shift+ArrowLeft", "-", "0"):
        page.keyboard.press(key)
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    assert state(page, "selection") == []
    settled(page)
    page.mouse.move(*place(view, page, 30))
    assert state(page, "focus") == 30, "0 shows the whole plane as at first"


def test_wheel_zooms_around_the_pointer_once_the_plane_has_focus(view, page):
    spot = place(view, page, 30)
    page.mouse.move(*spot)
    settled(page)
    still = pixels(page)
    page.mouse.wheel(0, -400)
    page.wait_for_timeout(120)
    assert pixels(page) == still, "the page scrolls, not the plane"
    page.get_by_role("application").focus()
    page.mouse.wheel(0, -400)
    page.wait_for_timeout(120)
    page.mouse.move(spot[0] + 1, spot[1])
    assert state(page, "focus") == 30 and pixels(page) != still


def test_a_model_set_from_python_is_followed(view, page):
    give(page, "selection", [3, 4])
    give(page, "focus", 4)
    assert "sentence 4" in page.locator(".card").inner_text() and "2 selected" in page.locator(".status").inner_text()


def test_everything_has_a_name(page):
    unnamed = page.evaluate("""() => [...document.querySelectorAll('button, select, canvas[tabindex], [role=img], [role=group]')]
        .filter((node) => !(node.getAttribute('aria-label') || node.textContent.trim() || node.labels?.length)).map((node) => node.outerHTML)""")
    assert unnamed == []


def test_thousands_of_points_are_smooth(browser, tmp_path, films):  # noqa: F811
    rng = np.random.default_rng(0)
    n = 8000
    points = pd.DataFrame({"x": rng.normal(size=n), "y": rng.normal(size=n), "kind": rng.choice(list("abcdef"), n), "text": "Small nodule.",
                           "picture": rng.integers(0, 4, n)})
    with opened(browser, EmbeddingView(points, films).to_html(tmp_path / "many.html")) as page:
        hover, frame = page.evaluate("""async () => {
            const plane = document.querySelectorAll('.plot canvas')[1], box = plane.getBoundingClientRect(), hover = [], frame = [];
            for (let k = 0; k < 120; k++) {
                const [x, y] = [box.left + box.width * (0.3 + 0.4 * ((k * 37) % 100) / 100), box.top + box.height * (0.3 + 0.4 * ((k * 61) % 100) / 100)];
                const start = performance.now();
                plane.dispatchEvent(new PointerEvent('pointermove', { clientX: x, clientY: y, bubbles: true }));
                hover.push(performance.now() - start);
            }
            plane.focus();
            for (let k = 0; k < 12; k++) {
                plane.dispatchEvent(new KeyboardEvent('keydown', { key: k % 2 ? '-' : '+', bubbles: true }));
                const start = performance.now();
                await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
                frame.push(performance.now() - start);
            }
            return [hover, frame]; }""")
        print(f"hover median {statistics.median(hover):.1f} ms, quickest frame {min(frame):.1f} ms, {n} points")
        assert state(page, "focus") >= 0
        assert statistics.median(hover) < 50 and min(frame) < 250  # a frame waits for whatever else the machine does


@pytest.mark.parametrize("width, scheme", [(1280, "light"), (1280, "dark"), (480, "light")])
def test_screenshots(view, browser, tmp_path, width, scheme):  # noqa: F811
    with opened(browser, view.to_html(tmp_path / "view.html"), width, color_scheme=scheme) as page:
        give(page, "selection", [3, 22, 45])
        give(page, "focus", 22)
        page.wait_for_selector(".films[data-drawn='22']")
        page.screenshot(path=tmp_path / f"{width}-{scheme}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is cut off at the right"
        ground = page.evaluate("getComputedStyle(document.querySelector('.embedding')).backgroundColor")
        assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(18, 22, 28)"}[scheme]


def test_the_slider_has_a_name_and_keys(browser, tmp_path):  # noqa: F811
    path, names = tmp_path / "slider.html", ["absent", "mild", "moderate", "severe"]
    given = {"value": 1, "low": 0, "high": 3, "names": names, "description": "Nodule"}
    path.write_text(standalone("Slider", static("slider.js"), static("theme.css") + static("slider.css"), given), encoding="utf-8")
    with opened(browser, path) as page:
        slider = page.get_by_role("slider", name="Nodule")
        slider.press("ArrowRight")
        assert state(page, "value") == 2 and slider.get_attribute("aria-valuetext") == "moderate"
        slider.press("Home")
        assert state(page, "value") == 0
        give(page, "value", 3)
        assert slider.input_value() == "3" and page.locator("output").inner_text() == "severe"
