"""The page in a headless Chromium: what a person does with it, and that it asks no other host."""

import json
import os
import shutil
import subprocess

import pytest
from uploaded import picture

PROGRAMS = ("chromium", "chromedriver")
TRAFFIC = "performance"  # the log that holds it
# The tests take ten seconds; installing Chromium takes longer, and is not for `make test`.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    reason = _install()
    if reason and os.environ.get("CI"):
        pytest.fail(f"in CI the browser's tests must run: {reason}")
    if reason:
        pytest.skip(reason)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    profile = tmp_path_factory.mktemp("chromium")
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu",
        "--window-size=1280,1000", f"--user-data-dir={profile}",
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", TRAFFIC: "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


def _install() -> str | None:
    """Install Chromium where we may; the reason when there is none."""
    if all(shutil.which(program) for program in PROGRAMS):
        return None
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return "needs Debian's chromium and chromium-driver"
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    packages = ["install", "-y", "--no-install-recommends", "chromium", "chromium-driver"]
    for command in (["update"], packages):
        result = subprocess.run(
            ["apt-get", "-qq", *command], env=environment, capture_output=True, text=True
        )
    return None if result.returncode == 0 else f"apt-get: {result.stderr.strip()[-200:]}"


class Page:
    """The page of a server in the browser."""

    def __init__(self, browser, served):
        self.browser, self.address = browser, f"http://127.0.0.1:{served.port}/"
        for kind in ("browser", TRAFFIC):
            browser.get_log(kind)  # what earlier tests left
        browser.get(self.address)
        self.until(lambda: self("#release").text)

    def __call__(self, selector):
        return self.browser.find_element("css selector", selector)

    def until(self, condition):
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.browser, 20).until(lambda _: condition())

    def fill(self, selector, text):
        self(selector).clear()
        self(selector).send_keys(text)

    def click(self, selector):
        self.browser.execute_script("arguments[0].click()", self(selector))

    def generate(self):
        self.click("#generate")
        self.until(lambda: self("#generate").is_enabled())

    def widths(self):
        """Pixels across each picture that is drawn."""
        return self.browser.execute_script(
            "return [...document.querySelectorAll('#pictures img')].map(i => i.naturalWidth)"
        )

    def check_quiet(self):
        """No error in the console, and no request to another host."""
        assert not self.browser.get_log("browser")
        messages = [json.loads(e["message"])["message"] for e in self.browser.get_log(TRAFFIC)]
        urls = [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]
        assert f"{self.address}api/release" in urls
        # The browser's own empty page is the first that it shows.
        own = (self.address, "data:", "chrome:")
        assert not [url for url in urls if not url.startswith(own)]


def test_a_prompt_becomes_pictures(browser, served, tmp_path):
    page = Page(browser, served)
    page.fill("#prompt", "red heart")
    page.fill("#n", "6")
    page.generate()
    assert page.widths() == [8] * 6 and page("#status").text == "6 of 6 pictures"
    assert page("#pictures li:nth-child(6) figcaption").text.startswith("index 5, seed 0")
    assert page("#pictures a").get_attribute("download") == "picture-0-seed-0.png"
    assert page("#command").text.endswith("'red heart' -n 6 --seed 0")
    page.check_quiet()


def test_an_image_is_completed_where_it_is_painted_over(browser, served, generator, tmp_path):
    from PIL import Image
    from selenium.webdriver import ActionChains, Keys

    path = picture(24, 16, tmp_path)
    page = Page(browser, served)
    page.click("#completion summary")
    page("#file").send_keys(str(path))
    page.until(lambda: page("#canvas").is_displayed())
    page.fill("#prompt", "red heart")
    page.fill("#n", "1")
    page("#canvas").send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.SPACE)
    quarter = page("#canvas").size["width"] // 4
    ActionChains(browser).move_to_element_with_offset(
        page("#canvas"), quarter // 2, quarter // 2
    ).click_and_hold().move_by_offset(quarter, 0).release().perform()
    url = browser.execute_script("return maskUrl()")
    (tmp_path / "mask.png").write_bytes(_data(url))
    page.generate()
    with Image.open(path) as image, Image.open(tmp_path / "mask.png") as mask:
        kept_N = generator.kept(image, None, mask).codes_N
        expected = generator.complete(image, "red heart", keep_mask=mask)[0].image
    # The cell of the keyboard, and the stroke below the middle.
    free = [cell for cell in range(16) if kept_N[cell] < 0]
    assert 8 in free and {10, 11} <= set(free) and 0 not in free
    with Image.open(_file(browser, tmp_path)) as made:
        assert made.tobytes() == expected.tobytes()
    assert "--keep-mask mask.png" in page("#command").text
    page.click('input[value="rows"]')
    page.generate()
    assert page.widths() == [8] and "--rows 2" in page("#command").text
    page.check_quiet()


def test_strokes_paint_all_that_they_pass_and_take_paint_away(browser, served, tmp_path):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.actions.action_builder import ActionBuilder

    page = Page(browser, served)
    page.click("#completion summary")
    page("#file").send_keys(str(picture(16, 16, tmp_path)))
    page.until(lambda: page("#canvas").is_displayed())
    browser.execute_script("document.querySelector('#brush').value = 1")
    canvas = page("#canvas")
    across = canvas.size["width"] // 4

    def stroke(first, last, row):
        """In one jump, as a quick pointer does."""
        builder = ActionBuilder(browser, duration=0)
        at = ActionChains(browser)
        at.w3c_actions = builder
        down = int((row - 1.5) * across)
        at.move_to_element_with_offset(canvas, int((first - 1.5) * across), down).click_and_hold()
        at.move_to_element_with_offset(canvas, int((last - 1.5) * across), down).release()
        at.perform()
        found = browser.execute_script("return painted")
        return [cell for cell in range(16) if found[cell]]

    assert stroke(0, 3, row=1) == [4, 5, 6, 7]
    assert stroke(1, 2, row=1) == [4, 7]
    assert stroke(0, 0, row=2) == [4, 7, 8]
    page.click("#clear")
    assert browser.execute_script("return painted.some(Boolean)") is False


def _data(url):
    import base64

    return base64.b64decode(url.split(",")[1])


def _file(browser, folder):
    source = browser.execute_script("return document.querySelector('#pictures img').src")
    (folder / "made.png").write_bytes(_data(source))
    return folder / "made.png"


def test_waiting_cancelling_and_errors_are_shown(browser, served):
    page = Page(browser, served)
    page.generate()
    assert "prompt is empty" in page("#error").text
    page.fill("#prompt", "red heart")
    page.fill("#n", "99")
    page.generate()
    assert page("#error").text == "N: 99 is not in 1 to 64"
    # Chromium itself notes each answer of 4xx.
    assert all("400" in entry["message"] for entry in browser.get_log("browser"))
    served.gate.clear()
    _, first = served.ask(body={"prompt": "first"})
    page.fill("#n", "4")
    page.click("#generate")
    page.until(lambda: page("#status").text == "Waiting: 1 request before yours.")
    page.click("#cancel")
    page.until(lambda: page("#status").text == "Cancelled.")
    served.gate.set()
    assert b'"done"' in first.read()
    page.generate()
    assert page.widths() == [8] * 4


@pytest.mark.parametrize("width", [1280, 380])
def test_nothing_is_cut_off_on_screens_of_any_width(browser, served, width):
    browser.set_window_size(width, 1000)
    page = Page(browser, served)
    page.fill("#prompt", "red heart")
    page.generate()
    page.click("#sampling-top_p")
    script = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert browser.execute_script(script) <= 0
    page.check_quiet()
