"""The report in headless Chromium: something is seen, nothing is fetched, nothing overflows; dark, narrow, printed."""

import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest

from qad.report.command import report_command
from tests.helpers_report import Made
from tests.helpers_runtimes import needs

if TYPE_CHECKING:
    from playwright.sync_api import Browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip(
    "playwright.sync_api", reason="the browser tests need playwright: pip install 'qad[dev]'"
)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="the browser tests need chromium: apt-get install chromium"),
    needs("llamacpp"),
]
NARROW, WIDE = 400, 1280
Scheme = Literal["light", "dark"]


@pytest.fixture(scope="module")
def page_file(report_records: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a page of all kinds of records, with names long enough to overflow."""
    folder = tmp_path_factory.mktemp("browser")
    long = folder / ("a-run-with-a-very-long-name-that-no-phone-is-wide-enough-for" * 2)
    shutil.copytree(report_records.run, long)
    paths = [long, *report_records.all[1:], report_records.alone]
    report_command(paths, folder / "page.html", title=None, command="qad report " + "x" * 300)
    return folder / "page.html"


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


class Shown:
    """A page opened at a width in a colour scheme.

    Attributes:
        page: To ask.
        said: On the console, errors among it.
        asked: Addresses of all requests.
    """

    def __init__(self, browser: "Browser", file: Path, width: int, scheme: Scheme) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(file.as_uri())


def pixels(png: bytes) -> list[int]:
    """Return the brightness of some thousand pixels."""
    import io

    from PIL import Image

    return list(Image.open(io.BytesIO(png)).convert("L").resize((100, 100)).tobytes())


@pytest.mark.parametrize("width", [NARROW, WIDE])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_seen_and_asks_for_nothing(browser: "Browser", page_file: Path, width: int, scheme: Scheme) -> None:
    shown = Shown(browser, page_file, width, scheme)
    png = shown.page.screenshot(full_page=True)
    assert shown.said == []
    assert shown.asked == [page_file.as_uri()]
    assert statistics.pstdev(pixels(png)) > 5
    assert (statistics.fmean(pixels(png)) < 80) == (scheme == "dark")
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= width
    shown.context.close()


# What reaches over the page's right edge, or over its box, without a box around it that scrolls.
OVERFLOWING = """
() => [...document.querySelectorAll('body *')].filter(one => {
  if (one.closest('svg, .scroll, nav ul')) return false;
  return one.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5
    || (one.scrollWidth > one.clientWidth + 1 && getComputedStyle(one).display !== 'inline');
}).map(one => one.tagName + ' ' + one.className)
"""
# Words of a plot that leave it, or lie on each other.
CLASHING = """
() => [...document.querySelectorAll('svg.plot')].flatMap(plot => {
  const frame = plot.getBoundingClientRect();
  const boxes = [...plot.querySelectorAll('text')].map(text => [text.textContent, text.getBoundingClientRect()]);
  const found = boxes.filter(([, box]) => box.left < frame.left - 1 || box.right > frame.right + 1
    || box.top < frame.top - 1 || box.bottom > frame.bottom + 1).map(([text]) => text + ' leaves the plot');
  boxes.forEach(([one, a], index) => boxes.slice(index + 1).forEach(([other, b]) => {
    if (a.left < b.right && b.left < a.right && a.top < b.bottom - 2 && b.top < a.bottom - 2)
      found.push(one + ' lies on ' + other);
  }));
  return found;
})
"""


@pytest.mark.parametrize("width", [320, NARROW, 768, WIDE])
def test_nothing_overflows(browser: "Browser", page_file: Path, width: int) -> None:
    shown = Shown(browser, page_file, width, "light")
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= width
    assert shown.page.evaluate(OVERFLOWING) == []
    assert shown.page.evaluate(CLASHING) == []
    shown.context.close()


def test_a_page_that_overflows_would_be_noticed(browser: "Browser", page_file: Path) -> None:
    shown = Shown(browser, page_file, NARROW, "light")
    shown.page.add_style_tag(content="body, h1 { overflow-wrap: normal; } h1 { white-space: nowrap; }")
    assert shown.page.evaluate("document.documentElement.scrollWidth") > NARROW
    assert shown.page.evaluate(OVERFLOWING)
    shown.page.add_style_tag(content=".plot text { font-size: 40px !important; }")
    assert shown.page.evaluate(CLASHING)
    shown.context.close()


def test_it_can_be_printed(browser: "Browser", page_file: Path) -> None:
    shown = Shown(browser, page_file, WIDE, "dark")
    pdf = shown.page.pdf(format="A4", print_background=True)
    assert pdf.startswith(b"%PDF")
    assert pdf.count(b"/Type /Page\n") >= 2
    # On paper also a dark screen's page is white.
    shown.page.emulate_media(media="print", color_scheme="dark")
    assert statistics.fmean(pixels(shown.page.screenshot(full_page=True))) > 200
    assert shown.page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    shown.context.close()
