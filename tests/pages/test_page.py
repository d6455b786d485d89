"""Pages as a browser shows them: marks in their frames, words inside the picture, light and dark."""

from __future__ import annotations

import re

import pytest

from moe.pages import png
from moe.pages.figure import COLOURS, Figure, Series, svg
from moe.pages.page import Page, Section, Table, html, markdown
from moe.pages.scale import scale, told
from tests.pages.browser import look, needs_browser, picture, said

LINE = [(float(x), 1.0 + 10.0 / x) for x in (1, 2, 5, 10, 40)]
FIGURES = [
    Figure("dots", "Dots & bars <1>", "x", "y", [Series("a", LINE, spans=[(y * 0.9, y * 1.1) for _, y in LINE])], caption="One & two."),
    Figure("lines", "Lines", "FLOPs", "loss", [Series(f"{n} experts", [(x * 1e15, y + n) for x, y in LINE], "both", n) for n in range(8)],
           "log", "log"),
    Figure("band", "Band", "experts", "share", [Series("wide", LINE, "band", spans=[(0, 3)] * 5), Series("inner", LINE, "line", 2)],
           "log2"),
]  # fmt: skip
TABLE = Table(
    "Figures", ["name", "number", "why"], [["a|b", 1.23456789, "short"], ["<b>", 2, "a sentence that is long enough to be broken in two"]]
)
PAGE = Page(
    "A <page>", "of 2 & more", ["The answer.", "Its reason."], False, [Section("Part", ["Words."], [TABLE], FIGURES, "moe study run")]
)

MARKS = """[...document.querySelectorAll('svg.figure')].map(svg => {
  const box = svg.querySelector('path.edge[d*="V"]').getBoundingClientRect(), inner = svg.getBoundingClientRect();
  const marks = [...svg.querySelectorAll('.marks > *')].map(mark => mark.getBoundingClientRect());
  const texts = [...svg.querySelectorAll('text')].map(text => text.getBoundingClientRect());
  const within = (a, b, slack) => a.left >= b.left - slack && a.right <= b.right + slack &&
    a.top >= b.top - slack && a.bottom <= b.bottom + slack;
  const meets = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1;
  return {marks: marks.length, texts: texts.length, outside: marks.filter(mark => !within(mark, box, 8)).length,
          lost: texts.filter(text => !within(text, inner, 0.5)).length, over: texts.filter(text => meets(text, box)).length,
          together: texts.some((a, i) => texts.some((b, j) => i < j && meets(a, b)))}
})"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(html(PAGE))
    return path


def check_figures(found, figures):
    assert len(found) == figures
    for one in found:
        assert one["marks"] > 0
        assert one["texts"] > 5
        assert (one["outside"], one["lost"], one["over"]) == (0, 0, 0)
        assert not one["together"]


@needs_browser
def test_every_figure_has_its_marks_in_its_frame_and_its_words_around_it(page):
    check_figures(look(page, MARKS), len(FIGURES))
    check_figures(look(page, MARKS, wide=390), len(FIGURES))


@needs_browser
def test_the_page_opens_without_a_word_on_the_console(page):
    assert said(page) == []


@needs_browser
def test_a_phone_need_not_scroll_sideways(page):
    assert look(page, "document.querySelector('main').scrollWidth", wide=390) <= 390


@needs_browser
def test_light_and_dark_differ_and_can_be_read(page):
    script = """[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,
                 getComputedStyle(document.querySelector('svg.figure text')).fill]"""
    for dark in (False, True):
        paper, *inks = ([int(n) for n in re.findall(r"\d+", colour)[:3]] for colour in look(page, script, dark=dark))
        assert (sum(paper) < 150) == dark
        for ink in inks:
            assert contrast(paper, ink) > 4.5


@needs_browser
@pytest.mark.slow
def test_light_and_dark_pictures_differ(page, tmp_path):
    light, dark = (picture(page, tmp_path / f"{d}.png", dark=d, high=800).read_bytes() for d in (False, True))
    assert light != dark


def contrast(one, other):
    """Of two colours, as the accessibility guidelines define it."""

    def luminance(colour):
        parts = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_colours_stand_out_from_the_paper(dark):
    paper = (13, 17, 23) if dark else (255, 255, 255)
    for pair in COLOURS:
        assert contrast(paper, [int(pair[dark][at : at + 2], 16) for at in (1, 3, 5)]) > 3.0


@pytest.mark.parametrize("kind", ["line", "dots", "band"])
def test_every_mark_of_many_has_a_rule_of_its_style(kind):
    many = [Series(f"{n}", LINE, kind, n, spans=[(y, y + 1) for _, y in LINE], hollow=n % 2 == 1) for n in range(60)]
    text = svg(Figure("many", "Many", "x", "y", many), alone=True)
    used = {name for names in re.findall(r'class="([^"]+)"', text) for name in names.split() if re.fullmatch(r"[sfhbd]\d+", name)}
    assert len(used) >= 8
    assert all(re.search(rf"\.figure \.{name} {{", text) for name in used)


def test_many_lines_and_dots_can_be_told_apart():
    def marks(kind, count):
        text = svg(Figure("many", "Many", "x", "y", [Series("", [(1, 1), (2, 2)], kind, n) for n in range(count)]))
        return re.findall(r"<(?:path|circle) [^>]+>", text.split('class="marks"')[1])

    assert len(set(marks("line", 29))) == 29  # in one place all, so that styles alone differ
    assert len(set(marks("dots", 36))) == 2 * 36


@needs_browser
def test_lines_of_many_styles_are_visible(tmp_path):
    path = tmp_path / "many.html"
    many = Figure("many", "Many", "x", "y", [Series(f"{n}", [(1, n), (2, n)], "line", n) for n in range(24)])
    path.write_text(html(Page("Many", "", ["Lines."], False, [Section("Part", figures=[many])])))
    strokes = look(
        path, "[...document.querySelectorAll('.marks path')].map(p => [getComputedStyle(p).stroke, getComputedStyle(p).strokeDasharray])"
    )
    assert len({tuple(stroke) for stroke in strokes}) == 24
    assert "none" not in {colour for colour, _ in strokes}


def test_nothing_is_fetched_and_nothing_runs():
    text = html(PAGE)
    assert not re.search(r"(src|href)=\"(?!data:,)|@import|url\(|<script", text)
    assert "&lt;page&gt;" in text
    assert "<b>" not in text


def test_the_same_words_as_markdown():
    text = markdown(PAGE, "figures")
    assert "**The answer.**" in text
    assert "| a\\|b | 1.2346 | short |" in text
    assert "![Lines](figures/lines.svg)" in text


def test_a_figure_alone_brings_its_style():
    assert "prefers-color-scheme" in svg(FIGURES[0], alone=True)
    assert "prefers-color-scheme" not in svg(FIGURES[0], alone=True, dark=True)
    assert "<style>" not in svg(FIGURES[0])


@pytest.mark.skipif(not png.can(), reason=png.WHY_NOT)
def test_a_picture_is_a_png_of_twice_the_size(tmp_path):
    png.write(FIGURES[1], tmp_path / "lines.png")
    head = (tmp_path / "lines.png").read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(head[16:20], "big") == 880


@pytest.mark.parametrize(("values", "kind"), [
    ([1, 40], "linear"), ([0, 0.001], "linear"), ([3, 3], "linear"), ([-5, 7], "linear"), ([1.5, 2.5], "log"), ([3e12, 1e15], "log"),
    ([1e3, 1e20], "log"), ([5], "log"), ([1, 64], "log2"), ([1, 2**14], "log2"), ([float("nan"), 1, 2], "linear"), ([], "linear"),
])  # fmt: skip
def test_axes_hold_their_values_and_few_round_ticks(values, kind):
    axis = scale(values, kind)
    shares = [axis.share(value) for value in values if value == value]
    assert all(0 <= share <= 1 for share in shares)
    assert 1 <= len(axis.ticks) <= 7
    assert all(-1e-9 <= axis.share(tick) <= 1 + 1e-9 for tick in axis.ticks)


@pytest.mark.parametrize(("value", "text"), [
    (0, "0"), (0.25, "0.25"), (32, "32"), (2e6, "2M"), (1e15, "10¹⁵"), (3e13, "3·10¹³"), (-0.5, "-0.5"), (1e-5, "10⁻⁵"), (50_000, "50k"),
])  # fmt: skip
def test_ticks_are_told_briefly(value, text):
    assert told(value) == text
