"""The report of a real run in headless Chromium: on a phone and a desk, in light and in dark."""

import shutil
import warnings

import pytest
import torch
from torch import nn

import evolvenet

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
LONG = "a_module_with_a_very_long_name_that_fits_no_phone_if_it_is_not_wrapped_or_cut"

LOOK = """() => {
  const all = (query, root = document) => [...root.querySelectorAll(query)];
  const box = element => element.getBoundingClientRect();
  const seen = element => box(element).width > 0 && box(element).height > 0;
  const light = color => {
    const [r, g, b] = color.match(/[\\d.]+/g).map(Number);
    return (0.2 * r + 0.7 * g + 0.1 * b) / 255;
  };
  const ground = element => {
    const color = getComputedStyle(element).backgroundColor;
    return /, 0\\)$/.test(color) && element.parentElement ? ground(element.parentElement) : color;
  };
  const distance = (element, name) => Math.abs(light(getComputedStyle(element)[name]) - light(ground(element)));
  const cover = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 2
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3;
  const texts = all("svg text"), read = text => text.textContent.replace(/\\s+/g, "");
  return {
    overflow: document.documentElement.scrollWidth - innerWidth,
    outside: texts.map(text => [read(text), box(text), box(text.closest("figure"))])
      .filter(([name, a, b]) => a.left < b.left || a.right > b.right).map(([name]) => name),
    overlaps: all("svg").map(svg => all("text", svg)).flatMap(found => found.flatMap((one, k) =>
      found.slice(k + 1).filter(other => cover(box(one), box(other))).map(other => [read(one), read(other)]))),
    smallest: Math.min(...texts.map(text => box(text).height)),
    headings: all("h2").filter(seen).map(heading => heading.textContent),
    drawings: all("figure svg").filter(seen).length,
    contrast: Math.min(...all("p, td, dd, summary, figcaption, .tile b").filter(seen).map(e => distance(e, "color"))),
    ink: Math.min(...texts.map(text => distance(text, "fill"))),
    open: all("details[open]").length,
    folded: all("details").length,
    text: document.body.innerText,
  };
}"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of a plain loop, with names that are hard to show."""
    torch.manual_seed(0)
    model = nn.Sequential()
    for place, name in enumerate(("_stem", "$\\frac$", "<b>[/x]&amp;", LONG)):
        model.add_module(name, nn.Linear(12 if place == 0 else 48, 48))
        model.add_module(f"relu{place}", nn.ReLU())
    model.add_module("head", nn.Linear(48, 3))
    optimizer, teacher = torch.optim.AdamW(model.parameters(), 3e-3), nn.Linear(12, 3)
    evolver = evolvenet.Evolver(model, optimizer, evolvenet.Threshold(prune=0.05, start=0.1), torch.zeros(1, 12))
    losses = []
    for step in range(60):
        x = torch.randn(64, 12)
        loss = nn.functional.cross_entropy(model(x), teacher(x).argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        evolver.observe(x)
        losses.append((step, loss.item()))
        if step % 10 == 9:
            evolver.step(at=step, progress=step / 60)
    assert sum(bool(event.changes) for event in evolver.history.events) >= 3
    folder = tmp_path_factory.mktemp("report")
    return evolver.report(
        folder, "A <run> & more", {"training loss": losses}, baselines={"training loss": 0.4}, seconds=3.5
    )


@pytest.fixture(scope="module")
def browser():
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        yield None
        return
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_report_is_readable(page, browser, width, scheme):
    if browser is None:
        warnings.warn("No Chromium or Chrome here, so the report is not opened: make browser", stacklevel=1)
        return
    shown = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    problems, requests = [], []
    shown.on("console", lambda message: problems.append(message.text))
    shown.on("request", lambda request: requests.append(request.url))
    shown.goto(page.as_uri())
    look = shown.evaluate(LOOK)
    assert (problems, len([url for url in requests if not url.startswith("data:")])) == ([], 1)
    assert look["overflow"] <= 0, "nothing is wider than the screen"
    assert (look["outside"], look["overlaps"]) == ([], [])
    assert look["smallest"] >= 9, "pixels of text in drawings"
    assert look["drawings"] >= 3 + 4 + 2, "costs and loss, spectra, network and changes"
    assert {"Network before and after", "The run", "Spectra", "Events", "Wall clock", "How this was made"} <= set(
        look["headings"]
    )
    assert min(look["contrast"], look["ink"]) > 0.3
    assert (look["open"], look["folded"] >= 3) == (0, True), "decisions are folded"
    assert "A <run> & more" in look["text"]
    shown.locator("summary").first.click()
    opened = shown.evaluate("document.querySelector('details[open] li').innerText")
    assert "→" in opened
    names = shown.evaluate("[...document.querySelectorAll('td:first-child')].map(cell => cell.innerText)")
    assert {f"width {name}" for name in ("_stem", "$\\frac$", "<b>[/x]&amp;", LONG)} <= set(names)
    shown.close()
