"""The correspondence widget in a real browser, its script alone in a page without a kernel: pointing, pinning, keys, hostile text, speed."""
from dataclasses import replace
from itertools import groupby

import numpy as np
import pytest
from browser import browser, opened  # noqa: F401
from correspondences import (
    GRIDS, NODULE, REPORT, at_region, changed_at, lit, make_view, pixels, place_of, planted, shot, square, trait, word, write_views)

from medvis.data.reports import find_words
from medvis.widgets.study import Outline, RunScores, word_spans


def with_names(path, *names):
    "The page with functions of the script, and `render`, within reach of a test."
    path.write_text(path.read_text().replace("render({ model: widget.model", f"Object.assign(window, {{ {', '.join(('render', *names))} }});\nrender({{ model: widget.model"))
    return path


@pytest.fixture(scope="module")
def views():
    return [make_view(0, outlines=[NODULE]),
            make_view(1, ["Lungs are clear.", "No effusion."], {"Nodule": 0.0}),
            make_view(2, ["Large effusion at the right base."], {"Nodule": 1.0})]


@pytest.fixture
def page(browser, views, tmp_path):  # noqa: F811
    with opened(browser, write_views(tmp_path / "page.html", views), height=720) as page:
        yield page


def test_a_word_lights_its_region_in_every_run(page):
    before = {run: pixels(page, run) for run in GRIDS}
    for item in (0, 4, 9):
        page.hover(word(item))
        for run in GRIDS:
            np.testing.assert_allclose(changed_at(before[run], pixels(page, run)), place_of(run, planted(run, item)), atol=0.05)
    page.mouse.move(2, 2)
    for run in GRIDS:
        assert (pixels(page, run) == before[run]).all(), "the map must go with the pointer"


def test_a_sentence_lights_its_region(page):
    before = pixels(page)
    page.hover(word(2, "sentences"))
    np.testing.assert_allclose(changed_at(before, pixels(page)), place_of("fine", planted("fine", 2)), atol=0.05)
    page.get_by_role("button", name="Grain: Sentences").click()
    page.hover('p[data-sentence="1"]', position={"x": 4, "y": 4})
    np.testing.assert_allclose(changed_at(before, pixels(page)), place_of("fine", planted("fine", 1)), atol=0.05)


def test_a_region_lights_its_words(page, views):
    for run, item in (("fine", 0), ("fine", 7), ("coarse", 2)):
        region = planted(run, item)
        page.mouse.move(*at_region(page, run, region))
        scores = views[0].runs[run].scores["words"][:, region]
        share = (scores - scores.min()) / np.ptp(scores)
        np.testing.assert_allclose(lit(page), share**2 * (3 - 2 * share), atol=2e-3)
        assert lit(page).argmax() == scores.argmax()
    page.mouse.move(2, 2)
    assert not lit(page).any()


def test_a_box_is_the_mean_of_its_regions(page, views):
    (x0, y0), (x1, y1) = at_region(page, "fine", 9), at_region(page, "fine", 27)   # rows 1 to 3, columns 1 to 3
    page.mouse.move(x0 - 5, y0 - 5)
    page.mouse.down()
    page.mouse.move(x1 + 5, y1 + 5, steps=3)
    page.mouse.up()
    page.mouse.move(2, 2)
    (box,) = trait(page, "selection")["boxes"]
    assert 0.125 < box[0] < 3 / 16 and 7 / 16 < box[2] < 0.5
    inside = [8 * row + column for row in (1, 2, 3) for column in (1, 2, 3)]
    scores = views[0].runs["fine"].scores["words"][:, inside].mean(1)
    share = (scores - scores.min()) / np.ptp(scores)
    np.testing.assert_allclose(lit(page), share**2 * (3 - 2 * share), atol=2e-3)
    page.keyboard.press("Escape")


def test_pins_stay_and_combine(page, views):
    before = pixels(page)
    page.click(word(0))
    page.click(word(4))
    page.mouse.move(2, 2)
    assert trait(page, "selection")["words"] == [0, 4] and trait(page, "selection")["study"] == "study-000"
    change = np.abs(pixels(page) - before).sum(2)
    side = change.shape[0]
    for item in (0, 4):
        x, y = place_of("fine", planted("fine", item))
        assert change[int(y * side), int(x * side)] > 40, "both words' regions must be coloured"
    x, y = place_of("fine", planted("fine", 7))
    assert change[int(y * side), int(x * side)] < 20
    page.click(word(0))
    assert trait(page, "selection")["words"] == [4]
    page.get_by_role("button", name="Unpin all").click()
    page.mouse.move(2, 2)
    assert (pixels(page) == before).all()


def test_selection_set_from_outside_is_shown(page):
    before = pixels(page)
    page.evaluate("document.getElementById('widget').model.set('selection', {words: [7]})")
    np.testing.assert_allclose(changed_at(before, pixels(page)), place_of("fine", planted("fine", 7)), atol=0.05)
    assert page.get_attribute(word(7), "aria-pressed") == "true"


def test_hits_are_those_of_the_pointing_game(page, views):
    for run in GRIDS:
        badge = page.locator(f'figure:has(canvas[data-run="{run}"]) .badge')
        hits = {item: hit for item, _, hit in views[0].hits(run)}
        assert set(hits) == (set(NODULE.words) if run == "fine" else set()), "the coarse run sees nothing of it"
        for item in range(len(views[0].words)):
            page.hover(word(item))
            assert badge.is_visible() == (item in hits)
            if item in hits:
                assert badge.get_attribute("data-hit") == str(hits[item]).lower() and "Nodule" in badge.text_content()
    hits = dict((item, hit) for item, _, hit in views[0].hits("fine"))
    assert hits[0] is True and not all(hits.values())


def test_prototypes_are_a_grain_of_their_own(browser, tmp_path):  # noqa: F811
    view = make_view(0)
    fine = view.runs["fine"]
    scores = fine.scores | {"prototypes": np.eye(64, dtype=np.float32)[[20, 43]]}     # prototype 7 lives in region 20, 31 in region 43
    view = replace(view, runs=view.runs | {"fine": replace(fine, scores=scores, prototypes=[7, 31])})
    with opened(browser, write_views(tmp_path / "page.html", [view], grains=["words", "sentences", "prototypes"]), height=720) as page:
        page.get_by_role("button", name="Grain: Prototypes").click()
        before, other = pixels(page), pixels(page, "coarse")
        assert page.locator('[data-grain="prototypes"][data-item]').all_text_contents() == ["prototype 7", "prototype 31"]
        for item, region in ((1, 43), (0, 20)):
            page.hover(word(item, "prototypes"))
            page.wait_for_timeout(100)
            np.testing.assert_allclose(changed_at(before, pixels(page)), place_of("fine", region), atol=0.05)
        assert (pixels(page, "coarse") == other).all(), "a run without prototypes shows nothing"
        page.click(word(1, "prototypes"))
        assert trait(page, "selection")["prototypes"] == [1]


def test_display_settings(page):
    plain = pixels(page)
    page.click(word(0))
    page.mouse.move(2, 2)
    heat, x, y = pixels(page), *place_of("fine", planted("fine", 0))
    at = int(y * len(heat)) + 12, int(x * len(heat)) + 12    # off the ring
    corner = (5, 5)
    for name, value in (("colours", "viridis"), ("opacity", 0.2), ("smooth", False)):
        old = trait(page, name)
        page.evaluate("([name, value]) => document.getElementById('widget').model.set(name, value)", [name, value])
        assert np.abs(pixels(page) - heat).max() > 20, name
        page.evaluate("([name, value]) => document.getElementById('widget').model.set(name, value)", [name, old])
    page.get_by_label("Threshold").fill("0.9")
    strict = pixels(page)
    assert (strict[corner] == plain[corner]).all() and np.abs(strict[at] - plain[at]).sum() <= np.abs(heat[at] - plain[at]).sum()
    assert (np.abs(strict - plain).sum(2) > 10).mean() < (np.abs(heat - plain).sum(2) > 10).mean()
    page.get_by_label("Threshold").fill("0")
    outlines = page.get_by_role("button", name="Show the outlines")
    assert outlines.text_content() == "Outlines" and "truth" not in page.locator("body").inner_text().lower(), "what a report says is not the truth"
    outlines.click()
    assert np.abs(pixels(page) - heat).max() > 50, "the outline must go"


def test_raw_scale_is_one_for_all_maps(page, views):
    scores = views[0].runs["fine"].scores["words"]

    def ends():
        return [float(t) for t in page.locator('figure:has(canvas[data-run="fine"]) .bar span').all_text_contents()]
    page.hover(word(3))
    np.testing.assert_allclose(ends(), [scores[3].min(), scores[3].max()], atol=0.006)
    page.get_by_role("button", name="Scale: Raw").click()
    for item in (3, 5):
        page.hover(word(item))
        np.testing.assert_allclose(ends(), [scores.min(), scores.max()], atol=0.006)


def test_one_run_alone(page):
    page.get_by_role("button", name="Show coarse").click()
    assert trait(page, "shown") == ["fine"] and page.locator("canvas").count() == 1
    page.get_by_role("button", name="Show fine").click()       # the last one stays
    assert page.locator("canvas").count() == 1


def test_browsing(page):
    place = page.locator(".place")
    page.get_by_role("button", name="Next study").click()
    page.wait_for_selector("[data-ready=study-001]")
    assert "study-001" in place.text_content() and "2 of 3" in place.text_content()
    page.click(word(0))
    page.get_by_role("button", name="Next study").click()
    page.wait_for_selector("[data-ready=study-002]")
    assert trait(page, "selection")["words"] == [], "pins belong to a study"
    page.get_by_label("Study", exact=True).fill("0")
    page.wait_for_selector("[data-ready=study-000]")
    page.get_by_label("Search ids and words").fill("EFFUSION no")
    page.locator(".place", has_text="of 2").wait_for()
    page.get_by_label("Search ids and words").fill("002")
    page.wait_for_selector("[data-ready=study-002]")
    assert "1 of 1" in place.text_content()
    page.get_by_label("Search ids and words").fill("zebra")
    page.locator(".place", has_text="no study").wait_for()
    assert "No study fits" in page.locator("[role=status]").text_content()
    page.get_by_label("Search ids and words").fill("")
    page.get_by_label("Finding", exact=True).select_option("Nodule")
    page.locator(".place", has_text="of 2").wait_for()


def test_worst_alignment_first(page, views):
    order = sorted(views, key=lambda view: view.alignment("fine"))
    page.get_by_label("Order").select_option("alignment")
    for k, view in enumerate(order):
        page.wait_for_selector(f"[data-ready={view.id}]")
        page.locator(".place", has_text=f"{k + 1} of 3").wait_for()
        page.get_by_role("button", name="Next study").click()


def test_most_misses_first(browser, tmp_path):  # noqa: F811
    "As `Studies.find` has them; a word of a phrase that the reader typed is no miss of the study."
    good, bad = replace(NODULE, words=(0,)), replace(NODULE, words=(0, 1, 4))
    asked = replace(NODULE, words=(0, *range(13, 17)))
    views = [make_view(0, outlines=[good]), make_view(1, outlines=[bad]), make_view(2), make_view(3, outlines=[replace(NODULE, words=(1,))])]
    views.append(make_view(4, [*REPORT, "a b c d"], outlines=[asked], kinds=["report"] * 3 + ["typed"]))
    assert [round(view.misses("fine"), 2) for view in views] == [0, 0.67, 0, 1, 0] and len(views[4].hits("fine")) == 5
    with opened(browser, write_views(tmp_path / "page.html", views)) as page:
        page.get_by_label("Order").select_option("misses")
        for k, position in enumerate((3, 1, 0, 2, 4)):
            page.wait_for_selector(f"[data-ready={views[position].id}]")
            page.locator(".place", has_text=f"{k + 1} of 5").wait_for()
            page.get_by_role("button", name="Next study").click()


def test_window_zoom_and_pan_by_mouse(page):
    plain = pixels(page)
    x, y = at_region(page, "fine", 27)
    page.mouse.move(x, y)
    page.mouse.down(button="right")
    page.mouse.move(x - 40, y + 30, steps=3)
    page.mouse.up(button="right")
    level, width = trait(page, "window")
    assert level > 128 and width < 255
    page.mouse.move(2, 2)
    assert pixels(page).mean() != plain.mean()
    page.mouse.move(x, y)
    page.keyboard.down("Control")
    page.mouse.wheel(0, -240)
    page.keyboard.up("Control")
    page.mouse.move(2, 2)
    near = pixels(page)
    page.mouse.move(x, y)
    page.mouse.down(button="middle")
    page.mouse.move(x + 50, y, steps=3)
    page.mouse.up(button="middle")
    page.mouse.move(2, 2)
    assert np.abs(pixels(page) - near).max() > 5
    page.get_by_role("button", name="Show all of the picture").click()
    page.mouse.move(2, 2)
    assert trait(page, "window") == [128, 255] and (pixels(page) == plain).all()


def test_the_tools_do_what_the_other_buttons_do(page):
    x, y = at_region(page, "fine", 27)
    page.get_by_role("button", name="Drag: Window").click()
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 30, y, steps=2)
    page.mouse.up()
    assert trait(page, "window")[1] > 255 and trait(page, "selection")["boxes"] == []


def test_keyboard_alone(page, views):
    before, focus = pixels(page), "document.activeElement.dataset"
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate(f"{focus}.run") == "fine":
            break
    assert page.evaluate(f"{focus}.run") == "fine", "Tab must lead to the picture"
    page.keyboard.press("ArrowRight")        # shows the cursor, in the middle
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowLeft")         # region of row 3, column 3
    assert lit(page).argmax() == views[0].runs["fine"].scores["words"][:, 27].argmax()
    page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("Enter")
    (box,) = trait(page, "selection")["boxes"]
    np.testing.assert_allclose(box, [3 / 8, 3 / 8, 5 / 8, 4 / 8])
    page.keyboard.press("Escape")
    assert trait(page, "selection")["boxes"] == []
    page.keyboard.press("+")
    page.keyboard.press("Alt+ArrowRight")
    assert np.abs(pixels(page) - before).max() > 5
    page.keyboard.press("0")
    page.keyboard.press("W")
    assert trait(page, "window")[1] > 255
    page.keyboard.press("w")
    for _ in range(10):
        page.keyboard.press("Tab")
        if page.evaluate(f"{focus}.grain"):
            break
    assert page.evaluate(f"[{focus}.grain, {focus}.item]") == ["words", "0"]
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")         # the first word of the next sentence
    assert page.evaluate(f"{focus}.item") == "7"
    page.keyboard.press(" ")
    assert trait(page, "selection")["words"] == [7]
    page.keyboard.press("n")
    page.wait_for_selector("[data-ready=study-001]")
    assert page.evaluate(f"[{focus}.grain, {focus}.item]") == ["words", "0"], "who reads goes on reading"


def test_everything_has_a_name_and_a_role(page):
    nameless = page.evaluate("""() => [...document.querySelectorAll('button, input, select, canvas, [role=button], summary')]
        .filter(e => !(e.getAttribute('aria-label') || e.textContent.trim())).map(e => e.outerHTML)""")
    assert not nameless
    assert page.locator("[role=status][aria-live=polite]").count() == 1
    page.hover(word(0))
    assert "highest in row 1, column 4" in page.get_attribute("canvas[data-run=fine]", "aria-label")
    assert "Small" in page.locator("[role=status]").text_content() and "hit" in page.locator("[role=status]").text_content()


def test_masked_text(page, browser, views, tmp_path):  # noqa: F811
    page.get_by_role("button", name="Mask the text of the report").click()
    shown = page.locator(".report").text_content().replace(page.locator(".legend.frames").text_content(), "")
    assert not any(word.lower() in shown.lower() for sentence in REPORT for word in sentence.strip(".").split() if len(word) > 2)
    page.hover(word(0))
    assert "word 1" in page.locator("[role=status]").text_content()
    page.get_by_role("button", name="Mask the text of the report").click()
    assert "nodule" in page.locator(".report").text_content()
    path = write_views(tmp_path / "masked.html", views, masked=True)
    assert "nodule in" not in path.read_text() and "effusion" not in path.read_text().replace("Pleural Effusion", "")


KERNEL = """() => { const model = document.getElementById('widget').model, held = model.get('held').studies, sent = window.sent = [];
    model.set('held', {});
    let saved = model.get('masked');                 // what the kernel knows: later than what it is asked
    model.save_changes = () => setTimeout(() => (saved = model.get('masked')), 120);
    const answers = []; model.on = ((on) => (name, act) => (name === 'msg:custom' && answers.push(act), on.call(model, name, act)))(model.on);
    model.send = message => { if (message.ask !== 'study') return;
        const masked = saved || message.masked, { head, buffers } = held[message.position]; sent.push(masked);
        const sentences = masked ? head.sentences.map(line => line.map(([text, word]) => [text.replace(/[\\p{L}]+/gu, '•••'), word])) : head.sentences;
        setTimeout(() => window.answers.forEach(act => act({ answer: 'study', study: { ...head, sentences, masked } }, buffers)), 10) };
    window.answers = answers; const el = document.createElement('div'); document.getElementById('widget').replaceChildren(el);
    render({ model, el }); }"""


def test_mask_with_a_kernel_that_answers_before_it_saves(browser, views, tmp_path):  # noqa: F811
    path = with_names(write_views(tmp_path / "page.html", views))
    with opened(browser, path) as page:
        page.evaluate(KERNEL)
        page.wait_for_selector(word(0))
        mask, report = page.get_by_role("button", name="Mask the text of the report"), page.locator(".report")
        for _ in range(2):
            page.evaluate("sent.length = 0")
            mask.click()
            assert "nodule" not in report.text_content()
            page.wait_for_timeout(200)
            assert page.evaluate("sent.length && sent.every(Boolean)"), "something clear was sent after masking"
            mask.click()
            page.locator(".report", has_text="nodule").wait_for(timeout=3000)


def test_the_common_scale_shows_nothing_of_a_flat_map(browser, tmp_path):  # noqa: F811
    view = make_view(0)
    runs = {name: replace(run, temperature=0.1) for name, run in view.runs.items()}
    flat = {grain: (rows / 50).astype(np.float32) for grain, rows in runs["coarse"].scores.items()}      # a peak of a fifth of the temperature
    view = replace(view, runs={"fine": runs["fine"], "coarse": replace(runs["coarse"], scores=flat)})
    with opened(browser, write_views(tmp_path / "page.html", [view], scale="common")) as page:
        place = {run: tuple(int(160 * share) + 9 * sign for share, sign in zip(place_of(run, planted(run, 7)), (0, 1))) for run in GRIDS}
        before = {run: pixels(page, run) for run in GRIDS}
        page.hover(word(7))
        change = {run: np.abs(pixels(page, run) - before[run]).sum(2)[place[run][1], place[run][0]] for run in GRIDS}
        assert change["fine"] > 60 and change["coarse"] < 15, change
        low, high = map(float, page.locator('figure:has(canvas[data-run="fine"]) .bar span').all_text_contents())
        assert abs(high - low - 0.1 * np.log(64)) < 0.011
        shot(page, "common-scale")


def test_words_that_a_run_does_not_read_are_marked(browser, tmp_path):  # noqa: F811
    view = make_view(0)
    for run in view.runs.values():
        run.scores["words"][7:] = np.nan
    view = replace(view, runs={name: replace(run, tokens=112) for name, run in view.runs.items()})
    with opened(browser, write_views(tmp_path / "page.html", [view])) as page:
        assert page.locator(".word.unread").count() == len(view.words) - 7
        assert page.get_attribute(word(7), "title") == "beyond the 112 tokens that the model reads" and page.get_attribute(word(6), "title") is None
        assert "112 tokens" in page.locator(".legend:not(.frames)").text_content() and "(coarse)" in page.locator(".legend.frames").text_content()
        shot(page, "unread")


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_long_names_and_many_runs_keep_to_their_places(browser, tmp_path, count):  # noqa: F811
    long = ["a-very-long-run-name-with-its-settings-lr-0.003-seed-1", "mixture-mi", "another_run_of_some_length_2026-11-29", "x" * 90][:count]
    view = make_view(0, outlines=[NODULE])
    view = replace(view, runs={name: view.runs["fine"] for name in long}, cells={name: view.cells["fine"] for name in long}, seen={name: view.seen["fine"] for name in long})
    with opened(browser, write_views(tmp_path / "page.html", [view], shown=long, runs=long), height=1000) as page:
        for width in (1280, 400):
            page.set_viewport_size({"width": width, "height": 1000})
            page.hover(word(0))
            wrong = page.evaluate("""() => [...document.querySelectorAll('.panel')].flatMap(panel => {
                const box = panel.getBoundingClientRect(), [title, badge] = ['b', '.badge'].map(one => panel.querySelector(one).getBoundingClientRect());
                const apart = title.right <= badge.left + 1 || title.bottom <= badge.top + 1;
                return apart && title.right <= box.right + 1 && badge.right <= box.right + 1 && badge.width > 70 ? [] : [panel.textContent] })""")
            assert not wrong and page.evaluate("document.documentElement.scrollWidth <= innerWidth"), wrong
            search = page.evaluate("document.querySelector('input[type=search]').clientWidth")
            assert search >= 180
            shot(page, f"runs-{count}-{width}")


HOSTILE = ["</script><script>document.title='owned'</script>", "<img src=x onerror=\"document.title='owned'\"> & &amp; \"quotes\" 'single'",
           "قلب بحجم طبيعي", "‮detrevni 🫁🩻 lungs 👩🏽‍⚕️ fine", "a" * 10_000, "word " * 400, "${1+1} {{x}} `tick` \\u003c \\n \u2028 end"]


def test_hostile_text_is_text(browser, tmp_path):  # noqa: F811
    view = make_view(0, HOSTILE, {"<b>Nodule</b>": 1.0})
    path = write_views(tmp_path / "hostile.html", [view], findings=[["<b>Nodule</b>", 1]])
    with opened(browser, path) as page:
        texts = page.eval_on_selector_all("p[data-sentence]", "all => all.map(e => e.textContent)")
        assert texts == HOSTILE and page.title() == "test"
        assert page.eval_on_selector_all(".report *", "all => all.filter(e => !['DIV', 'P', 'SPAN'].includes(e.tagName)).length") == 0
        assert page.locator("[data-grain=words]").count() == len(word_spans(HOSTILE)) + 1    # the report's own data-grain
        emoji = next(item for item, text in enumerate(view.words) if text == "lungs")
        assert page.locator(word(emoji)).text_content() == "lungs"
        page.hover(word(emoji))
        assert "“lungs”" in page.locator("[role=status]").text_content()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        shot(page, "hostile")


@pytest.mark.parametrize("name, width, scheme", [("light", 1280, "light"), ("dark", 1280, "dark"), ("narrow", 480, "light"), ("slim", 330, "dark")])
def test_fits_and_follows_the_theme(browser, views, tmp_path, name, width, scheme):  # noqa: F811
    with opened(browser, write_views(tmp_path / "page.html", views), width, 1000, color_scheme=scheme) as page:
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        ground, ink = page.evaluate("() => { const s = getComputedStyle(document.querySelector('.correspondence')); return [s.backgroundColor, s.color] }")
        bright = [sum(map(int, colour[4:-1].split(","))) for colour in (ground, ink)]
        assert (bright[0] > bright[1]) == (scheme == "light")
        page.hover(word(1))
        shot(page, f"planted-{name}")


def test_answers_within_50_ms(browser, tmp_path):  # noqa: F811
    """Median over 100 words and 100 regions, from the event to the frame after it: 19 x 19 regions, 112 words, two runs.

    Other tests share the cores, which can only add time: one of three rounds has to be fast enough."""
    rng, sentences = np.random.default_rng(0), [" ".join(f"word{8 * s + i}" for i in range(8)) for s in range(14)]
    view = make_view(0, sentences)
    runs = {name: RunScores((19, 19), (0, 0, 1, 1), {"words": rng.random((112, 361), np.float32), "sentences": rng.random((14, 361), np.float32)})
            for name in GRIDS}
    object.__setattr__(view, "runs", runs)
    with opened(browser, write_views(tmp_path / "page.html", [view])) as page:
        measure = lambda: page.evaluate("""async () => {
            const words = [...document.querySelectorAll('[data-grain=words][data-item]')], canvas = document.querySelector('canvas');
            const painted = () => new Promise(done => requestAnimationFrame(() => { const c = new MessageChannel(); c.port1.onmessage = done; c.port2.postMessage(0) }));
            const timed = async act => { await painted(); const start = performance.now(); act(); await painted(); return performance.now() - start };
            const out = {words: [], regions: [], script: [], idle: []}, box = canvas.getBoundingClientRect();
            for (let i = 0; i < 100; i++) {
                out.idle.push(await timed(() => {}));
                const start = performance.now(); words[i].dispatchEvent(new PointerEvent('pointerenter')); out.script.push(performance.now() - start);
                out.words.push(await timed(() => words[i].dispatchEvent(new PointerEvent('pointerenter'))));
                words[i].dispatchEvent(new PointerEvent('pointerleave'));
                const clientX = box.x + ((i % 19) + 0.5) / 19 * box.width, clientY = box.y + (Math.floor(i / 19) + 0.5) / 19 * box.height;
                out.regions.push(await timed(() => canvas.dispatchEvent(new PointerEvent('pointermove', {clientX, clientY}))));
            }
            return out }""")
        for _ in range(3):
            medians = {name: float(np.median(values)) for name, values in measure().items()}
            if max(medians.values()) < 50:
                break
    assert max(medians.values()) < 50, medians


# ---------------------------------------------------------------- what is drawn and what is said

SAID = Outline("Nodule: left upper", square(32, 0, 64, 21), words=(0, 1), sentences=(0,), said=True)  # the highest region of word 1 is not in it
LUNG = Outline("left_lung", square(40, 8, 60, 60))


def toggle(page, kind):
    return page.locator(f'.targets [data-kind="{kind}"]')


@pytest.fixture
def drawn(browser, tmp_path):  # noqa: F811
    with opened(browser, write_views(tmp_path / "page.html", [make_view(0, outlines=[NODULE, LUNG, SAID]), make_view(1)], hidden=[]), height=820) as page:
        yield page


def test_every_class_has_a_toggle(drawn):
    kinds = ["Nodule", "left_lung", "Nodule (report)"]
    assert drawn.locator(".targets button").all_text_contents() == kinds
    seen = pixels(drawn)
    for kind in kinds:
        toggle(drawn, kind).click()
        assert trait(drawn, "hidden") == [kind] and toggle(drawn, kind).get_attribute("aria-pressed") == "false"
        changed = np.abs(pixels(drawn) - seen).sum(2) > 60
        assert changed.any(), f"the outline of {kind} must go"
        y, x = np.nonzero(changed)
        inside = {"Nodule": (24, 0, 40, 12), "left_lung": (38, 0, 64, 62), "Nodule (report)": (30, 0, 64, 24)}[kind]  # its name stands beside it
        assert x.min() >= 2.5 * inside[0] - 6 and y.max() <= 2.5 * inside[3] + 6, kind
        toggle(drawn, kind).click()
        assert trait(drawn, "hidden") == [] and (pixels(drawn) == seen).all()
        assert drawn.evaluate("document.activeElement.dataset.kind") == kind, "a pressed toggle keeps the focus"
    drawn.get_by_role("button", name="Next study").click()
    drawn.wait_for_selector("[data-ready=study-001]")
    assert not drawn.locator(".targets").is_visible(), "a study without outlines has no toggles"


DRAWN, REPORTED = "Hits are counted against what is drawn.", "Hits are counted against the places that the reports name: nothing is drawn in this data set."


def badge_of(page, run="fine"):
    return page.locator(f'figure:has(canvas[data-run="{run}"]) .badge')


def test_what_is_drawn_counts_and_what_is_said_does_not(drawn):
    view, badge = make_view(0, outlines=[NODULE, LUNG, SAID]), badge_of(drawn)
    cells = [cells[planted("fine", 0)] for cells in view.cells["fine"]]
    assert cells == [True, False, False] and view.hits("fine")[0] == (0, 0, True) and view.targets("fine") == [0, 1]
    assert drawn.locator(".judged").inner_text() == DRAWN
    drawn.hover(word(0))
    assert badge.get_attribute("data-hit") == "true" and badge.text_content() == "✓ hit · Nodule" and DRAWN in badge.get_attribute("title")
    drawn.mouse.move(2, 2)
    toggle(drawn, "Nodule").click()
    drawn.hover(word(0))
    assert badge.text_content() == "✓ hit · Nodule", "an outline that is hidden is judged all the same"
    shot(drawn, "targets")


def test_hiding_a_class_changes_no_verdict(browser, tmp_path):  # noqa: F811
    "A word with two targets, of which one is hit: it stays a hit when that one is hidden, and a miss stays a miss."
    view = make_view(0, outlines=[NODULE, replace(LUNG, words=(0, 1))])
    expected = {0: "✓ hit · Nodule, left_lung", 1: "✗ miss · Nodule, left_lung"}
    assert [hit for item, _, hit in view.hits("fine") if item == 0] == [True, False] and not any(hit for item, _, hit in view.hits("fine") if item == 1)
    with opened(browser, write_views(tmp_path / "page.html", [view])) as page:
        for hidden in ([], ["Nodule"], ["left_lung"], ["Nodule", "left_lung"]):
            page.evaluate("hidden => document.getElementById('widget').model.set('hidden', hidden)", hidden)
            for item, text in expected.items():
                page.hover(word(item))
                assert badge_of(page).text_content() == text and badge_of(page).is_visible(), hidden


def test_a_study_without_boxes_does_not_switch_to_what_is_said(browser, tmp_path):  # noqa: F811
    "Whether hits are of what is drawn or of what is said is decided for a data set, not study by study."
    view = make_view(0, outlines=[SAID])
    assert view.hits("fine") == [] and view.misses("fine") == 0
    with opened(browser, write_views(tmp_path / "page.html", [view], hidden=[])) as page:
        assert page.locator(".judged").inner_text() == DRAWN
        for item in SAID.words:
            page.hover(word(item))
            assert not badge_of(page).is_visible() and not badge_of(page, "coarse").is_visible()
        assert "hit" not in page.locator("[role=status]").text_content() and "miss" not in page.locator("[role=status]").text_content()


def test_an_outline_that_a_run_does_not_see_is_no_target(browser, tmp_path):  # noqa: F811
    "The coarse run sees a crop: what lies outside of it is neither hit nor missed. What is seen and holds no region's centre is missed, as in `evaluate.ground`."
    outside, small = Outline("Mass", square(0, 0, 6, 6), words=(0,)), Outline("Dot", square(30, 30, 31, 31), words=(1,))
    view = make_view(0, outlines=[outside, small])
    assert view.hits("coarse") == [(1, 1, False)] and [item for item, *_ in view.hits("fine")] == [0, 1]
    with opened(browser, write_views(tmp_path / "page.html", [view])) as page:
        page.hover(word(0))
        assert badge_of(page).text_content() == "✗ miss · Mass" and not badge_of(page, "coarse").is_visible()
        assert page.locator("[role=status]").text_content().count("miss") == 1
        page.hover(word(1))
        assert badge_of(page, "coarse").text_content() == "✗ miss · Dot"


def test_an_unknown_fit_is_said(browser, tmp_path):  # noqa: F811
    view = make_view(0, outlines=[replace(NODULE, fits=False)])
    assert view.hits("fine") == [] and view.misses("fine") == 0
    with opened(browser, write_views(tmp_path / "page.html", [view])) as page:
        page.hover(word(0))
        for run in GRIDS:
            assert badge_of(page, run).get_attribute("data-hit") == "unknown" and badge_of(page, run).text_content() == "? unknown fit · Nodule"
        assert page.locator("[role=status]").text_content().count("unknown fit") == 2
        assert page.locator(".judged").inner_text().startswith(DRAWN + " Unknown fit: it is not known how this picture was made square")
        shot(page, "unknown-fit")


def test_a_masked_report_keeps_the_places_that_it_names(drawn):
    drawn.get_by_role("button", name="Mask the text").click()
    assert drawn.locator(".targets button").all_text_contents() == ["Nodule", "left_lung"]
    drawn.hover(word(0))
    assert drawn.locator(".badge").first.text_content() == "✓ hit · Nodule"


def test_only_what_the_report_says(browser, tmp_path):  # noqa: F811
    view = make_view(0, outlines=[SAID], judged="said")
    assert view.hits("fine") == [(0, 0, False), (1, 0, bool(view.cells["fine"][0, planted("fine", 1)]))]
    with opened(browser, write_views(tmp_path / "page.html", [view], masked=False)) as page:
        assert page.locator(".judged").inner_text() == REPORTED
        for item, _, hit in view.hits("fine"):
            page.hover(word(item))
            assert page.locator(".badge").first.get_attribute("data-hit") == str(hit).lower()


# ---------------------------------------------------------------- phrases in place of sentences

PHRASES = ["pulmonary nodule", "cardiomegaly", "pleural effusion", "my own phrase"]
KINDS = ["label", "absent", "absent", "typed"]


def test_phrases_from_labels_are_clicked_like_sentences(browser, tmp_path):  # noqa: F811
    view = make_view(0, PHRASES, outlines=[replace(NODULE, words=(0, 1), sentences=(0,))], kinds=KINDS)
    with opened(browser, write_views(tmp_path / "page.html", [view]), height=820) as page:
        legends = page.locator(".report .legend:not(.frames)").all_text_contents()
        assert legends == ["Phrases from labels (there are no reports)", "Phrases that labels say this image does not show", "Your phrases"]
        before = pixels(page)
        page.click(word(0, "sentences"))
        page.mouse.move(2, 2)
        assert trait(page, "selection")["sentences"] == [0]
        np.testing.assert_allclose(changed_at(before, pixels(page)), place_of("fine", planted("fine", 0)), atol=0.05)
        assert badge_of(page).text_content() == "✓ hit · Nodule"
        page.get_by_role("button", name="Mask the text").click()
        assert page.locator("p[data-sentence]").all_text_contents() == PHRASES, "labels, and what was typed, are not the report's text"
        page.hover(word(1, "sentences"))
        assert "“cardiomegaly”" in page.locator("[role=status]").text_content() and not badge_of(page).is_visible()
        assert page.get_by_label("A phrase of your own").count() == 0, "a page has no kernel to ask"
        shot(page, "phrases")


def test_neither_reports_nor_labels(browser, tmp_path):  # noqa: F811
    with opened(browser, write_views(tmp_path / "page.html", [make_view(0, [], judged="nothing")])) as page:
        assert page.locator(".judged").inner_text().startswith("No hits are counted")
        assert "neither a report nor phrases" in page.locator(".report").inner_text() and "CorrespondenceWidget(run, pack)" in page.locator(".report").inner_text()
        page.mouse.move(*at_region(page, "fine", 9))
        page.click('canvas[data-run="fine"]')
        assert len(trait(page, "selection")["boxes"]) == 1 and not badge_of(page).is_visible()


ASKED = """() => { const model = document.getElementById('widget').model, [plain, ...more] = model.get('held').studies, sent = window.sent = [];
    model.set('held', {}); let act = null; const on = model.on; model.on = (name, listener) => (name === 'msg:custom' && (act = listener), on.call(model, name, listener));
    model.send = message => { if (message.ask !== 'study') return; sent.push(message.typed);
        const one = more.find(({ head }) => String(head.typed) === String(message.typed)) ?? plain, late = sent.length === 2 ? 300 : 10;
        setTimeout(() => act({ answer: 'study', study: { ...one.head, position: message.position, id: plain.head.id } }, one.buffers), late) };
    const el = document.createElement('div'); document.getElementById('widget').replaceChildren(el); render({ model, el }); }"""


def test_a_word_is_what_find_words_says(browser, tmp_path):  # noqa: F811
    texts = ["XXXX", "XXXXX", "xxxx", "XXX", "XXXX.", "XXXX XXXX", "the XXXX lobe", "XXXXa", "___", "_a_", "_", " ?! ", "3", "½", "é", "e\u0301", "\u0301", "قلب", "肺",
             "XXXX\u200d", "\u200dXXXX", "_\u00ad", "XX\u00adXX", "🫁", "X-XXXX", ""]
    with opened(browser, with_names(write_views(tmp_path / "page.html", [make_view(0)]), "hasWord")) as page:
        assert page.evaluate("texts => texts.map(window.hasWord)", texts) == [bool(find_words(text)) for text in texts]


FAILING = """bad => { const model = document.getElementById('widget').model, [plain, other] = model.get('held').studies, sent = window.sent = [];
    model.set('held', {}); let act = null; const on = model.on; model.on = (name, listener) => (name === 'msg:custom' && (act = listener), on.call(model, name, listener));
    model.send = message => { if (message.ask !== 'study') return; sent.push(message.typed);
        const { head, buffers } = message.typed.length ? other : plain, of = { answer: 'study', study: { ...head, position: message.position, id: plain.head.id, typed: message.typed } };
        const failed = message.typed.includes(bad) || message.position > 0;
        setTimeout(() => failed ? act({ answer: 'error', reason: `ValueError: no ${message.position}`, typed: message.typed }, []) : act(of, buffers), 10) };
    const el = document.createElement('div'); document.getElementById('widget').replaceChildren(el); render({ model, el }); }"""


def test_a_phrase_that_cannot_be_read_is_dropped(browser, tmp_path):  # noqa: F811
    "Blanks are not asked for; a phrase with which the kernel fails is left out, its message stays, and the widget goes on. A study that cannot be read drops none."
    views = [make_view(0), make_view(0, [*REPORT, "mass"], kinds=["report"] * 3 + ["typed"])]
    with opened(browser, with_names(write_views(tmp_path / "page.html", views))) as page:
        page.evaluate(FAILING, "unreadable")
        box, status, own = page.get_by_label("A phrase of your own"), page.locator("[role=status]"), page.locator(".sentence[data-kind=typed] p")
        box.wait_for()
        box.fill("XXXX")
        box.press("Enter")
        assert "at least one word" in status.text_content() and not trait(page, "typed") and page.evaluate("sent") == [[]]
        box.fill("unreadable")
        box.press("Enter")
        page.locator("[role=status]", has_text="no 0").wait_for()
        page.wait_for_timeout(300)
        # the page's own widget listens to the same model and asks too: what is asked once may be sent twice
        assert [asked for asked, _ in groupby(page.evaluate("sent"))] == [[], ["unreadable"], []] and trait(page, "typed") == []
        page.wait_for_timeout(50)
        assert status.text_content() == "ValueError: no 0"
        box.fill("mass")
        box.press("Enter")
        own.wait_for()
        assert own.all_text_contents() == ["mass"] and trait(page, "selection")["sentences"] == [3]
        page.evaluate("document.getElementById('widget').model.set('position', 1)")
        page.locator("[role=status]", has_text="no 1").wait_for()
        assert trait(page, "typed") == ["mass"], "a phrase that was answered before is not to blame"


@pytest.mark.parametrize("sentences", [REPORT, []])
def test_a_phrase_is_typed_asked_pinned_and_left_out(browser, tmp_path, sentences):  # noqa: F811
    "The kernel is asked with all phrases; an answer to an older list is not shown; what comes back is pinned. Without a report the box stands alone."
    kinds, first, second = ["report"] * len(sentences), "large nodule", "left-sided mass?"
    views = [make_view(0, sentences), *(make_view(0, [*sentences, *typed], kinds=[*kinds, *["typed"] * len(typed)]) for typed in ([first], [first, second], [second]))]
    path = with_names(write_views(tmp_path / "page.html", views))
    with opened(browser, path) as page:
        page.evaluate(ASKED)
        box, own = page.get_by_label("A phrase of your own"), page.locator(".sentence[data-kind=typed] p")
        box.wait_for()
        assert ("Type a phrase below" in page.locator(".report").inner_text()) == (not sentences)
        before = pixels(page)
        box.fill("  large   nodule ")
        box.press("Enter")
        box.fill("left-sided mass?")                       # the answer to the first is still on its way
        box.press("Enter")
        page.locator(".sentence[data-kind=typed] p", has_text=second).wait_for()
        assert own.all_text_contents() == [first, second] and page.evaluate("sent.at(-1)") == [first, second] and trait(page, "typed") == [first, second]
        assert trait(page, "selection")["sentences"] == [len(sentences) + 1] and box.input_value() == ""
        page.mouse.move(2, 2)
        np.testing.assert_allclose(changed_at(before, pixels(page)), place_of("fine", planted("fine", len(sentences) + 1)), atol=0.05)
        box.fill(" ?! ")
        box.press("Enter")
        assert "at least one word" in page.locator("[role=status]").text_content() and trait(page, "typed") == [first, second]
        page.get_by_role("button", name="Leave this phrase out").first.click()
        page.locator(".sentence[data-kind=typed]").nth(1).wait_for(state="detached")      # the page forbids what wait_for_function does
        assert own.all_text_contents() == [second] and trait(page, "selection")["sentences"] == []
        shot(page, f"typed-{len(sentences)}")
