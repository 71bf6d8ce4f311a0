"""The page in a real browser: open, generate, slider to 0 -> equal texts, slider elsewhere -> different ones."""

import json
import os
import shutil
from collections.abc import Iterator

import pytest
from peft import get_peft_model
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from tiny import randomize
from transformers import AutoModelForCausalLM

from peft_steer import SteerConfig
from peft_steer.play.page import launch
from peft_steer.play.session import load


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver on the PATH")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]


@pytest.fixture(scope="module")
def page(tiny_llama, tmp_path_factory) -> Iterator[webdriver.Chrome]:
    """The page of a tiny model with two random vectors."""
    folder, adapters = tmp_path_factory.mktemp("play"), {}
    for seed, name in enumerate(["happy", "sad"]):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), SteerConfig(kind="vector"))
        randomize(model, std=0.5, seed=seed)
        model.save_pretrained(folder / name)
        adapters[name] = str(folder / name)
    served = launch(
        load(tiny_llama, tiny_llama, adapters, "float32", None),
        "127.0.0.1",
        None,
        prevent_thread_lock=True,
        quiet=True,
    )
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    for flag in (*FLAGS, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(DRIVER, env={**os.environ, "no_proxy": "127.0.0.1"}))
    driver.set_window_size(1300, 1100)
    driver.get(served.local_url)
    WebDriverWait(driver, 60).until(lambda d: d.find_elements(By.CSS_SELECTOR, "#generate"))
    yield driver
    driver.quit()
    served.close()


def value(page, name: str) -> str:
    return page.execute_script("return document.querySelector(arguments[0]).value", f"#{name} textarea")


def fill(page, selector: str, text: str) -> None:
    box = page.find_element(By.CSS_SELECTOR, selector)
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(text)


def done(page, before: str | None):
    """Waits for another divergence than `before`, which is shown when all is generated."""
    mean = "return document.querySelector('#tokens')?.dataset.mean ?? null"
    WebDriverWait(page, 60).until(lambda d: d.execute_script(mean) not in (None, before))
    return page.execute_script(mean)


def set_strength(page, number: str) -> None:
    """As a user does: by the number beside the slider."""
    fill(page, "#strength input[type=number]", number)
    page.find_element(By.CSS_SELECTOR, "#strength input[type=number]").send_keys(Keys.TAB)


def test_generate_and_move_the_slider(page):
    fill(page, "#prompt textarea", "Once upon a time")
    fill(page, "#tokens-new input[type=number]", "16")
    page.find_element(By.CSS_SELECTOR, "#generate").click()
    first = done(page, None)
    base, steered = value(page, "base"), value(page, "steered")
    assert base
    assert steered != base
    assert float(first) > 0.01
    spans = page.find_elements(By.CSS_SELECTOR, "#tokens span")
    assert len(spans) == 16
    assert "nats" in spans[0].get_attribute("title")

    set_strength(page, "0")
    zero = done(page, first)
    assert float(zero) == 0
    assert value(page, "steered") == value(page, "base") == base

    set_strength(page, "-2")
    minus = done(page, zero)
    assert value(page, "base") == base
    assert value(page, "steered") not in (base, steered)
    assert float(minus) > 0.01


def test_adapters_are_switched(page):
    before = page.execute_script("return document.querySelector('#tokens').dataset.mean")
    text = value(page, "steered")
    boxes = page.find_elements(By.CSS_SELECTOR, "#adapters input")
    assert [box.is_selected() for box in boxes] == [True, False]
    boxes[1].click()
    both = done(page, before)
    assert value(page, "steered") != text or both != before
    for box in page.find_elements(By.CSS_SELECTOR, "#adapters input"):
        before = page.execute_script("return document.querySelector('#tokens').dataset.mean")
        box.click()
        done(page, before)
    assert value(page, "steered") == value(page, "base")


def test_a_mistake_is_a_message(page):
    fill(page, "#blocks textarea, #blocks input", "40")
    page.find_element(By.CSS_SELECTOR, "#generate").click()
    message = "return document.querySelector('.toast-body, .toast-wrap')?.innerText ?? ''"
    WebDriverWait(page, 30).until(lambda d: "are not steered" in d.execute_script(message))


def test_nothing_is_asked_of_another_machine(page):
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    own = page.current_url.rstrip("/")
    assert any(url.startswith(own) for url in urls)
    assert [url for url in urls if not url.startswith((own, "data:", "blob:", "chrome:"))] == []
