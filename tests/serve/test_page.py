"""The web page in headless Chromium: a chat with the packaged model, and the live view of a simulated device.

One browser session for all tests. They skip where Chromium, its driver or selenium is not installed.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from vkllm import LLMEngine
from vkllm.batching import BatchEngine
from vkllm.homeostasis import HomeostasisConfig
from vkllm.sensors.simulated import SimulatedSensor, ThermalPlant
from vkllm.serve.pacing import HomeostasisPacer

HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--window-size=1200,800"),
)
WAIT_S = 60


class SlowPacer(HomeostasisPacer):
    """A pacer with longer rests where a test wants them."""

    least_s = 0.0

    def pace(self, busy_s: float) -> float:
        return max(self.least_s, super().pace(busy_s))


class Device:
    """A simulated device with a clock of its own, and the pacer that holds it."""

    def __init__(self) -> None:
        self.now_s, self.plant = 1000.0, ThermalPlant(ambient_c=35.0)
        sensor = SimulatedSensor(self.plant, clock=lambda: self.now_s)
        self.pacer = SlowPacer(sensor, HomeostasisConfig(), clock=lambda: self.now_s, start=False)

    def run(self, seconds: float, busy: float) -> None:
        for _ in range(round(2 * seconds)):
            self.now_s += 0.5
            share = min(busy, self.pacer.state.duty)
            self.plant.step(0.5, share)
            self.pacer.pace(0.5 * share)
            self.pacer.poll()


class Staged:
    """The application, except for prompts that ask for what a small model cannot be made to do. `endless`: fields of a
    request that make it go on."""

    def __init__(self, app: Any, endless: dict[str, Any]) -> None:
        self.app, self.endless = app, endless

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] != "/v1/chat/completions":
            return await self.app(scope, receive, send)
        message = await receive()
        asked = message["body"].decode()
        if "be hostile" in asked:
            pieces = ["```html\n", HOSTILE, "\n```\n", HOSTILE, " and **bold**"]
            return await answer(send, 200, b"text/event-stream", events(pieces))
        if "be busy" in asked:
            body = json.dumps({"error": {"message": "the device is too hot to take work"}})
            return await answer(send, 503, b"application/json", body, (b"retry-after", b"1"))
        if "for ever" in asked:
            message["body"] = json.dumps(json.loads(asked) | self.endless).encode()

        async def again() -> Any:
            nonlocal message
            given, message = message, None
            return given or await receive()

        return await self.app(scope, again, send)


def events(pieces: list[str]) -> str:
    chunks = [{"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]} for piece in pieces]
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


async def answer(send: Any, status: int, kind: bytes, body: str, *more: tuple[bytes, bytes]) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind), *more]})
    await send({"type": "http.response.body", "body": body.encode()})


class Page:
    """The browser with the page in it."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver, self.url = driver, url

    def all(self, css: str) -> list[Any]:
        return list(self.driver.find_elements("css selector", css))

    def one(self, css: str) -> Any:
        return self.driver.find_element("css selector", css)

    def until(self, true: Any) -> Any:
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        wait = WebDriverWait(self.driver, WAIT_S, 0.05, [StaleElementReferenceException, IndexError])
        return wait.until(lambda _: true())

    def open(self) -> None:
        self.driver.get(self.url)
        self.until(lambda: self.one("#state").text in ("ready", "degraded"))

    def say(self, text: str) -> None:
        self.one("#text").send_keys(text)
        self.one("#send").click()

    def set(self, **settings: object) -> None:
        for name, value in settings.items():
            script = "const e = document.getElementById(arguments[0]); e.value = arguments[1]"
            script += "; e.dispatchEvent(new Event('input'))"
            self.driver.execute_script(script, name, str(value))

    def idle(self) -> bool:
        return str(self.one("#send").text) == "Send"

    def complaints(self) -> list[str]:
        """What the console says: errors of scripts, refused by the policy, not found."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    from selenium.webdriver.chrome.service import Service

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if not chromium or not chromedriver:
        pytest.skip("Chromium or its driver is not installed: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    # Chromium looks at Vulkan devices too; its mistakes are not ours.
    without_layers = {name: value for name, value in os.environ.items() if not name.startswith("VK_")}
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # selenium's own
        found = webdriver.Chrome(options=options, service=Service(chromedriver, env=without_layers))
        yield found
        found.quit()


@pytest.fixture(scope="module")
def hot() -> Device:
    return Device()


@pytest.fixture(scope="module")
def batch(session_server: object, single: LLMEngine, hot: Device) -> Iterator[BatchEngine]:
    with BatchEngine(single, pacer=hot.pacer) as found:
        yield found


@pytest.fixture(scope="module")
def site(batch: BatchEngine, hot: Device) -> Iterator[str]:
    from vkllm.serve.app import ServerOptions, create_app
    from vkllm.serve.command import Address, Server
    from vkllm.serve.metrics import Metrics

    endless = {"logit_bias": {str(i): -100 for i in batch.tokenizer.eos_ids}}
    app = Staged(create_app(batch, ServerOptions("tiny"), Metrics()), endless)
    server = Server(app, Address(port=0), stop_s=5.0)
    hot.run(240, 1.0)
    hot.run(60, 0.0)
    server.start()
    yield f"http://127.0.0.1:{server.port}/"
    server.stop()


@pytest.fixture
def page(driver: Any, site: str, hot: Device) -> Page:
    found = Page(driver, site)
    driver.get(site)
    driver.execute_script("sessionStorage.clear()")
    found.complaints()
    found.open()
    return found


def test_a_chat_streams_and_nothing_complains(page: Page, hot: Device) -> None:
    hot.pacer.least_s = 0.2  # so that the pieces do not come at once
    page.set(temperature=0, max_tokens=60, system="Be brief.")
    page.driver.execute_script(
        "window.seen = new Set(); const look = () => window.seen.add(document.querySelector('.assistant .body')?.textContent);"
        "new MutationObserver(look).observe(document.getElementById('log'), {childList: true, subtree: true})"
    )
    page.say("Who is a cat?")
    page.until(lambda: page.all(".assistant .meta") and page.idle())
    hot.pacer.least_s = 0.0
    text = page.one(".assistant .body").text
    assert text and page.one(".user .body").text == "Who is a cat?" and "tokens" in page.one(".assistant .meta").text
    seen = page.driver.execute_script("return [...window.seen].filter(s => s)")
    assert len(seen) > 1 and all(text.startswith(s.strip()) for s in seen), "it came in pieces"
    page.one("#new").click()
    assert not page.all(".message")
    assert page.complaints() == []


def test_stop_and_go_on(page: Page, batch: BatchEngine, hot: Device) -> None:
    page.set(max_tokens=400)
    hot.pacer.least_s = 0.1  # 40 s at least
    try:
        page.say("Go on for ever")
        page.until(lambda: page.one("#send").text == "Stop" and page.one(".assistant .body").text)
        page.one("#send").click()
        page.until(page.idle)
        page.until(lambda: batch.stats.requests.get("cancelled") == 1 and batch.pool.n_free == batch.pool.n_block)
    finally:
        hot.pacer.least_s = 0.0
    assert "stopped" in page.one(".assistant .meta").text
    page.set(max_tokens=3)
    page.say("Go on for ever and ever")
    page.until(lambda: len(page.all(".assistant .meta")) == 2)
    assert "cut off" in page.all(".assistant .meta")[1].text


def test_text_of_a_model_stays_text(page: Page) -> None:
    page.say("be hostile " + HOSTILE)
    page.until(lambda: page.all(".assistant .meta"))
    assert HOSTILE in page.one(".user .body").text
    assert page.one(".assistant pre code").text == HOSTILE and page.one(".assistant strong").text == "bold"
    assert page.one(".assistant .body").text.count(HOSTILE) == 2
    assert not page.all("#log img, #log script") and "owned" not in page.driver.title
    script = "const s = document.createElement('script'); s.textContent = 'document.title = \"owned\"'; document.body.append(s)"
    page.driver.execute_script(script)
    assert "owned" not in page.driver.title, "and the policy would stop it"


def test_busy_is_told_kindly(page: Page) -> None:
    page.say("be busy")
    notice = page.until(lambda: page.one(".notice.patience"))
    assert "too hot" in notice.text and not page.all(".assistant")
    again = page.one(".notice button")
    assert not again.is_enabled() or again.text == "Try again"
    page.until(again.is_enabled)
    page.say("Who is a dog?")
    page.until(lambda: page.all(".assistant .meta"))


def test_graphs_and_state(page: Page, hot: Device) -> None:
    points = "return [...document.querySelectorAll('.curve')].map(c => c.points.length)"
    counts = page.until(lambda: found if len(found := page.driver.execute_script(points)) == 4 else None)
    assert all(n >= 500 for n in counts), "the history from before the page was opened"
    values = {title: shown for title, _, shown in (g.text.partition("\n") for g in page.all(".graph figcaption"))}
    assert values["Temperature"].endswith("°C") and values["Power"].endswith("W") and values["Duty"].endswith("%")
    assert "holding 75 °C" in page.one("#facts").text and "KV cache" in page.one("#facts").text
    hot.run(30, 1.0)
    page.until(lambda: sum(page.driver.execute_script(points)) >= sum(counts) + 4 * 60)
    hot.plant.die_c = hot.plant.sink_c = 99.0
    hot.run(3, 0.0)
    page.driver.refresh()
    page.until(lambda: page.one("#state").text == "tripped" and "resting" in page.one("#facts").text)
    hot.plant.die_c = hot.plant.sink_c = 40.0
    hot.run(60, 0.0)
    page.driver.refresh()
    page.until(lambda: page.one("#state").text == "ready")


def test_small_and_dark(page: Page) -> None:
    page.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 640, "deviceScaleFactor": 1, "mobile": True}
    )
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    try:
        assert not page.one("#live").is_displayed() and page.one("#text").is_displayed()
        page.one("#live-button").click()
        assert page.one("#live").is_displayed() and page.one("#text").is_displayed()
        width, ground = page.driver.execute_script(
            "return [document.documentElement.scrollWidth, getComputedStyle(document.body).backgroundColor]"
        )
        assert width <= 360 and ground == "rgb(23, 22, 20)"
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_the_key_stays_in_the_tab(page: Page) -> None:
    page.set(key="sesame")
    page.open()
    assert page.one("#key").get_attribute("value") == "sesame"
    assert page.driver.execute_script("return localStorage.length") == 0 and page.driver.get_cookies() == []
    page.driver.execute_script("sessionStorage.clear()")


def test_the_page_needs_no_key_and_asks_nobody_else(session_server: Any) -> None:
    httpx = pytest.importorskip("httpx", reason="httpx is not installed")
    from vkllm.serve.page import FILES

    for path in FILES:
        reply = httpx.get(session_server.url + path)
        policy = reply.headers["Content-Security-Policy"]
        assert reply.status_code == 200 and "unsafe" not in policy and policy.startswith("default-src 'none'")
        links = [line for line in reply.text.splitlines() if "://" in line and "www.w3.org" not in line]
        assert links == [] and "innerHTML" not in reply.text
