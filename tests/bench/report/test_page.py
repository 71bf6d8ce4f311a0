"""The HTML report in a real browser: figures are drawn, tables sort, nothing is fetched, names stay names."""

import json
import shutil
from collections.abc import Iterator

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from synthetic_bench import GRID, cell, failed, result, sweep_and_test

from peft_steer.bench.report import write_report


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver on the PATH: make browser"),
]
EVIL = "<b>x</b></script><script>document.title = 'run'</script> & $y_1$"
WIDTHS = {"desktop": (1400, 1000), "phone": (420, 900)}


@pytest.fixture(scope="module", params=WIDTHS)
def page(request, tmp_path_factory) -> Iterator[webdriver.Chrome]:
    """The page of two tasks, one of them with a sweep of methods with difficult names."""
    folder = tmp_path_factory.mktemp("page")
    long = "a method whose name says everything about its rank, its site, its kind and its positions"
    pairs = [(cell("base"), result(cell("base"), 0.2))]
    for number, name in enumerate(["LoRA", "LoReFT", long, EVIL]):
        pairs += sweep_and_test(name, {1e-3: 0.3, 1e-2: 0.4 + 0.05 * number}, 1e-2)
    lost = cell("lost")
    alone = cell("LoRA", task="boolq")
    pairs += [(lost, failed("RuntimeError: <i>NaN</i>")), (alone, result(alone, 0.5))]
    cells, results = zip(*pairs, strict=True)
    write_report(GRID, cells, results, folder)
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
    ]
    for flag in (*flags, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_window_size(*WIDTHS[request.param])
    driver.get_log("performance")  # of the empty tab
    driver.get((folder / "report.html").as_uri())
    drawn = "return document.querySelectorAll('.main-svg').length > 0 && document.readyState === 'complete'"
    WebDriverWait(driver, 120).until(lambda d: d.execute_script(drawn))
    yield driver
    driver.quit()


def columns(page: webdriver.Chrome) -> dict[str, list[str]]:
    entries = "row => [...row.cells].map(cell => cell.innerText.trim())"
    names, *lines = page.execute_script(f"return [...document.querySelector('table').rows].map({entries})")
    return dict(zip(names, map(list, zip(*lines, strict=True)), strict=True))


def click_head(page: webdriver.Chrome, name: str) -> None:
    head = page.find_element(By.XPATH, f"//table//th/button[normalize-space()='{name}']")
    page.execute_script("arguments[0].scrollIntoView({block: 'center', inline: 'center'})", head)
    head.click()


def test_nothing_is_fetched_and_nothing_is_wrong(page):
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert page.current_url in urls
    assert [url for url in urls if not url.startswith(("file:", "data:", "blob:"))] == []
    assert page.get_log("browser") == []
    assert page.title == "Comparison of PEFT methods"  # a name has not become a script


def test_the_figures_are_drawn(page):
    titles = [title.text for title in page.find_elements(By.CSS_SELECTOR, ".figures h3")]
    assert titles == [
        *("Score and trainable parameters", "Score and cost", "Every pair"),
        *("Learning rates, on the validation split", "Training loss", "Gain against loss"),
        *("Score and trainable parameters", "Score and cost", "Training loss"),
    ]
    count = (
        "return [...document.querySelectorAll('.figures section')].map(s => s.querySelectorAll(arguments[0]).length)"
    )
    points, lines = (page.execute_script(count, mark) for mark in (".scatterlayer .point", ".scatterlayer .js-line"))
    assert points == [4, 4, 0, 8, 0, 4, 1, 1, 0]
    assert lines == [0, 0, 0, 4, 12, 1, 0, 0, 1]
    assert page.execute_script(count, ".errorbar")[:4] == [4, 4, 0, 8]
    assert page.execute_script(count, ".heatmaplayer image")[2] == 1
    wide = "return [...document.querySelectorAll('.figures section')].map(s => [s.clientWidth, s.scrollWidth])"
    assert all(inner <= outer for outer, inner in page.execute_script(wide))
    assert page.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")


def test_another_cost(page):
    axis = "return document.querySelectorAll('.js-plotly-plot')[1].layout.xaxis.title.text"
    assert page.execute_script(axis) == "training, seconds"
    page.execute_script("document.querySelectorAll('.js-plotly-plot')[1].scrollIntoView()")
    figure = page.find_elements(By.CSS_SELECTOR, ".js-plotly-plot")[1]
    figure.find_element(By.CSS_SELECTOR, ".updatemenu-header").click()
    choices = figure.find_elements(By.CSS_SELECTOR, ".updatemenu-dropdown-button")
    next(choice for choice in choices if choice.text == "peak memory, bytes").click()
    WebDriverWait(page, 20).until(lambda d: d.execute_script(axis) == "peak memory, bytes")
    data = "document.querySelectorAll('.js-plotly-plot')[1].data.filter(trace => trace.visible)"
    shown = page.execute_script(f"return {data}.map(trace => trace.x[0])")
    assert len(shown) == 4
    assert all(x > 2e9 for x in shown)


def test_a_click_on_a_column_sorts(page):
    before = columns(page)
    assert before["method"][0] == "base"
    assert before["method"][-2:] == [EVIL, "lost"]
    click_head(page, "acc ± s.e.")
    means = [entry.split(" ")[0] for entry in columns(page)["acc ± s.e."]]
    assert means[-1] == "failed"
    assert means[:-1] == sorted(means[:-1], reverse=True)
    click_head(page, "acc ± s.e.")
    assert columns(page)["acc ± s.e."][0] == "failed"
    click_head(page, "method")
    assert columns(page)["method"] == sorted(before["method"], key=str.lower)
    assert sorted(zip(*columns(page).values(), strict=True)) == sorted(zip(*before.values(), strict=True))
    click_head(page, "trainable")
    numbers = [int(entry.replace(",", "")) for entry in columns(page)["trainable"] if entry != "–"]
    assert numbers == sorted(numbers, reverse=True)


def test_what_failed_is_shown_as_text(page):
    (line,) = page.find_elements(By.CSS_SELECTOR, ".failures li")
    assert "RuntimeError: <i>NaN</i>" in line.text
