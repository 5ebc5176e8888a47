"""The playground in Chromium: before real engines, and before a scripted app for what no engine does on demand."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import numpy as np
import pytest
from axe_playwright_python.base import AXE_SCRIPT
from playwright.async_api import Browser, Page, Route, expect

from tests.browser import opened
from tests.helpers import Server, wait_until
from tests.server.fake_engine import FakeServer
from tests.server.scripted import Script, scripted_app
from tests.server.test_middleware import listening

pytestmark = [pytest.mark.timeout(300)]

HTML = '<img src="x" onerror="window.hacked = true"><script>window.hacked = true</script>'
NOTHING_SPECIAL = {"0": -100, "1": -100, "2": -100}  # whose tokens have no text
KEEP_STREAMS = """() => {
    const real = window.fetch;
    window.streams = [];
    window.fetch = async (...asked) => {
        const response = await real(...asked);
        if (asked[0].endsWith("completions")) window.streams.push(response.clone().text());
        return response;
    };
}"""
NARROW = {"viewport": {"width": 400, "height": 800}}
DARK = {"color_scheme": "dark"}
APART, PAIR_APART = 0.03, 0.15
"""OKLab distance of any two experts' colours, and of the first two's; 0.02 is about what can just be told apart."""

# sRGB (linear) as seen by readers who lack one kind of cone: Machado, Oliveira, Fernandes, 2009, severity 1.
VISIONS = {
    "normal": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.01182, 0.04294, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.3039],
    ],
}
TO_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
FROM_CONES = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


# ---------------------------------------------------------------------------------------------- what a user does


@asynccontextmanager
async def connected(browser: Browser, url: str, **options: Any) -> AsyncIterator[Page]:
    async with opened(browser, f"{url}/", **options) as page:
        await expect(page.locator("#health")).to_contain_text("experts up")
        yield page


@asynccontextmanager
async def scripted(
    browser: Browser, script: Script, *keys: str, server: FakeServer | None = None, **options: Any
) -> AsyncIterator[Page]:
    """A page of a scripted app."""
    app = scripted_app(server or FakeServer(0.5, 0.5), script, *keys)
    async with listening(app) as port, opened(browser, f"http://127.0.0.1:{port}/", **options) as page:
        yield page


async def ask(page: Page, text: str, mode: str = "Chat") -> None:
    await page.get_by_role("radio", name=mode).check()
    await page.locator("#prompt").fill(text)
    await page.locator("#prompt").press("Control+Enter" if mode == "Completion" else "Enter")


async def answered(page: Page) -> None:
    await expect(page.get_by_role("button", name="Answer again")).to_be_visible(timeout=60_000)


async def texts(page: Page) -> list[str]:
    """What the answers say, without what their style adds."""
    given: list[str] = await page.eval_on_selector_all(
        ".answer", "all => all.map(a => [...a.querySelectorAll('.token')].map(t => t.textContent).join(''))"
    )
    return given


async def colours(page: Page) -> list[list[float]]:
    """[L, a, b] of every token's background, as the browser has computed it."""
    given: list[str] = await page.eval_on_selector_all(
        ".token", "all => all.map(token => getComputedStyle(token).backgroundColor)"
    )
    assert all(text.startswith("oklab(") for text in given), given
    return [[float(value) for value in text[len("oklab(") : -1].split()] for text in given]


async def palette(page: Page, theme: str) -> Any:
    module = "const {colour} = await import('/playground/colours.js');"
    return await page.evaluate(
        f"(async () => {{{module} return [0,1,2,3,4,5,6,7].map(k => colour(k, '{theme}'))}})()"
    )


async def request_of(page: Page) -> dict[str, Any]:
    """The body of the request that the page would send."""
    await page.get_by_role("button", name="As code").click()
    await page.get_by_role("radio", name="curl").check()
    code = await page.locator("#code").text_content()
    assert code is not None
    await page.get_by_role("button", name="Close").click()
    body: dict[str, Any] = json.loads(code.split("<<'JSON'\n")[1].removesuffix("JSON\n"))
    return body


def text_of(choice: dict[str, Any]) -> str:
    """What a chunk's choice adds to the answer."""
    return str(choice["text"] if "text" in choice else choice["delta"].get("content") or "")


# ---------------------------------------------------------------------------------------------- real engines


@pytest.mark.engines
@pytest.mark.parametrize(("mode", "theme"), [("Chat", "light"), ("Completion", "dark")])
async def test_a_token_has_the_mixture_of_its_experts_colours(
    browser: Browser, trio_server: Server, mode: str, theme: str
) -> None:
    async with connected(browser, trio_server.url, color_scheme=theme) as page:
        await page.locator("[name=seed]").fill("5")
        await page.locator("[name=max_tokens]").fill("24")
        await with_fields(page, logit_bias=NOTHING_SPECIAL)
        await page.evaluate(KEEP_STREAMS)
        await ask(page, "import os", mode)
        await answered(page)
        lines = str(await page.evaluate("window.streams[0]")).splitlines()
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        assert await texts(page) == ["".join(map(text_of, choices))]
        traces = [choice["decar"] for choice in choices if "decar" in choice]
        weights = np.array([each for trace in traces for each in trace["weights"]])
        leaders = [leader for trace in traces for leader in trace["leaders"]]
        shown = np.array(await colours(page))
        assert len(weights) == len(shown) == 24
        expected = weights @ np.array((await palette(page, theme))[:3])
        assert np.abs(shown - expected).max() < 2e-3
        assert np.ptp(shown, axis=0).max() > 0.01, "they are not all the same"

        await page.locator(".token").nth(3).hover()
        tip = page.get_by_role("tooltip")
        await expect(tip).to_contain_text(f"led by {leaders[3]}")
        for name, weight in zip(("maths", "code", "prose"), weights[3], strict=True):
            said = await tip.get_by_role("listitem").filter(has_text=name).text_content() or ""
            assert float(said.removeprefix(name).removesuffix(" %")) == pytest.approx(100 * weight, abs=0.51)
        alternatives = await tip.locator(".bars").nth(1).get_by_role("listitem").count()
        assert alternatives in (5, 6)  # vLLM adds the token itself where it is not among them


@pytest.mark.engines
async def test_stop_ends_the_answer_and_the_request(browser: Browser, duo_server: Server) -> None:
    async with connected(browser, duo_server.url) as page:
        await page.locator("[name=max_tokens]").fill("400")
        await with_fields(page, ignore_eos=True)
        with duo_server.standing_still() as move:  # or its answer might be whole before it is stopped
            await ask(page, "import os", "Completion")
            while await page.locator(".token").count() < 3:
                move(0.01)
            await page.get_by_role("button", name="Stop").click()
            await answered(page)
        await expect(page.locator(".facts")).to_contain_text("stopped by you")
        assert 3 <= await page.locator(".token").count() < 400
        await asyncio.to_thread(wait_until, duo_server.is_idle, 30, "the server has noticed")


@pytest.mark.engines
async def test_html_that_a_model_says_is_text(browser: Browser, duo_server: Server) -> None:
    async with connected(browser, duo_server.url) as page:
        await page.locator("[name=max_tokens]").fill("100")
        await with_fields(page, structured_outputs={"choice": [HTML]})
        await ask(page, HTML)
        await answered(page)
        assert await texts(page) == [HTML]
        await expect(page.locator(".asked p")).to_have_text(HTML)
        await page.get_by_text("Who spoke where, in words").click()
        await page.locator(".token").first.hover()
        await expect(page.get_by_role("tooltip")).to_be_visible()
        assert await page.evaluate("window.hacked") is None
        assert await page.locator("#turns img, #turns script, #tip img").count() == 0


@pytest.mark.engines
async def test_the_ensemble_beside_one_expert(browser: Browser, duo_server: Server) -> None:
    async with connected(browser, duo_server.url) as page:
        await page.locator("[name=max_tokens]").fill("12")
        await page.locator("[name=temperature]").fill("0")
        await page.locator("[name=beside]").select_option("prose alone")
        await ask(page, "Sort a list.")
        await answered(page)
        assert await page.locator(".answer h2").all_text_contents() == ["The ensemble", "prose alone"]
        client = duo_server.openai()
        expected = []
        for model in ("duo", "duo/prose"):
            response = await asyncio.to_thread(
                client.chat.completions.create,
                model=model,
                messages=[{"role": "user", "content": "Sort a list."}],
                max_tokens=12,
                temperature=0,
            )
            expected.append(response.choices[0].message.content)
        assert await texts(page) == expected
        second = np.array(
            await page.locator(".answer")
            .nth(1)
            .locator(".token")
            .evaluate_all("all => all.map(t => getComputedStyle(t).backgroundColor)")
        )
        assert len(set(second)) == 1, "one expert, one colour"


@pytest.mark.engines
@pytest.mark.parametrize("mode", ["Chat", "Completion"])
async def test_code_that_is_shown_gives_the_answer_that_is_shown(
    browser: Browser, duo_server: Server, mode: str
) -> None:
    async with connected(browser, duo_server.url) as page:
        await page.locator("[name=max_tokens]").fill("12")
        await page.locator("[name=temperature]").fill("0")
        await page.locator("[name=route]").select_option("fixed")
        await page.locator("[name='weight:code']").fill("80")
        await page.get_by_role("radio", name=mode).check()
        await page.locator("#prompt").fill('It\'s a "test"\nof `quotes` $HOME \\ é 𝄞 JSON\nJSON')
        codes = {}
        await page.get_by_role("button", name="As code").click()
        for language in ("curl", "Python"):
            await page.get_by_role("radio", name=language).check()
            codes[language] = await page.locator("#code").text_content() or ""
        await page.get_by_role("button", name="Close").click()
        await page.locator("#send").click()
        await answered(page)
        [said] = await texts(page)
        assert said
        run = {"curl": ["bash", "-c", codes["curl"]], "Python": [sys.executable, "-c", codes["Python"]]}
        done = {
            language: await asyncio.to_thread(
                subprocess.run, command, capture_output=True, timeout=120, check=False
            )
            for language, command in run.items()
        }
        # As bytes: what a model says may have carriage returns, which reading as text would change.
        assert done["Python"].stdout.decode().removesuffix("\n") == said, done["Python"].stderr
        events = [line for line in done["curl"].stdout.decode().splitlines() if line.startswith("data: {")]
        choices = [
            choice for event in events for choice in json.loads(event.removeprefix("data: "))["choices"]
        ]
        assert "".join(map(text_of, choices)) == said
        assert '"code": 0.8' in codes["curl"]


@pytest.mark.engines
async def test_what_the_server_refuses_is_said_where_it_can_be_mended(
    browser: Browser, duo_server: Server
) -> None:
    async with connected(browser, duo_server.url) as page:
        await page.locator("[name=route]").select_option("fixed")
        for slider in await page.locator("#weights input").all():
            await slider.fill("0")
        await ask(page, "Sort a list.")
        error = page.locator(".error")
        await expect(error).to_contain_text("could not use this request")
        await expect(error).to_contain_text("give at least one expert a positive weight")
        await expect(page.locator("[name=route]")).to_have_attribute("aria-invalid", "true")
        await page.locator("#weights input").first.fill("50")
        await page.locator("[name=max_tokens]").fill("4")
        await page.get_by_role("button", name="Answer again").click()
        await expect(page.locator(".facts")).to_contain_text("4 tokens", timeout=60_000)
        await expect(error).to_have_count(0)


async def with_fields(page: Page, **fields: Any) -> None:
    """Have requests carry what the page has no control for."""

    async def more(route: Route) -> None:
        await route.continue_(post_data=json.dumps({**route.request.post_data_json, **fields}))

    await page.route("**/v1/*completions", more)
    await page.route("**/v1/chat/completions", more)


# ---------------------------------------------------------------------------------------------- scripted answers


async def test_a_key_is_asked_for_used_and_kept_in_the_tab_alone(browser: Browser) -> None:
    script = Script()
    async with scripted(browser, script, "secret") as page:
        dialog = page.get_by_role("dialog")
        await expect(dialog).to_contain_text("asks for an API key")
        await dialog.get_by_label("Key").fill("wrong")
        await dialog.get_by_role("button", name="Use this key").click()
        await expect(page.locator("#health")).to_contain_text("needs an API key")
        await expect(dialog).to_be_visible()
        await dialog.get_by_label("Key").fill("secret")
        await dialog.get_by_label("Key").press("Enter")
        await expect(page.locator("#health")).to_contain_text("2 of 2 experts up")
        await ask(page, "Hi")
        await answered(page)
        assert await texts(page) == ["Hello there"]
        await page.get_by_role("button", name="As code").click()
        code = await page.locator("#code").text_content() or ""
        assert "Bearer $OPENAI_API_KEY" in code
        assert "secret" not in await page.content()
        assert await page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        await page.reload()
        await expect(page.locator("#health")).to_contain_text("2 of 2 experts up")
        other = await browser.new_page()
        await other.goto(page.url)
        await expect(other.get_by_role("dialog")).to_contain_text("asks for an API key")
        await other.close()


async def test_a_busy_server_is_asked_again(browser: Browser) -> None:
    server, script = FakeServer(0.5, 0.5), Script()
    async with scripted(browser, script, server=server) as page:
        await expect(page.locator("#health")).to_contain_text("experts up")
        with ExitStack() as others:
            for _ in range(server.client.queue.length + server.client.slots.total):
                others.enter_context(server.client.queue.admitted())
            await ask(page, "Hi")
            error = page.locator(".error")
            await expect(error).to_contain_text("The server is busy")
            await expect(error).to_contain_text("ask again in a moment")
            assert script.bodies == []
        await error.get_by_role("button", name="Try again").click()
        await answered(page)
        assert await texts(page) == ["Hello there"]


async def test_an_answer_that_breaks_off_stays_and_says_so(browser: Browser) -> None:
    breaks = asyncio.Event()
    async with scripted(browser, Script(breaks=breaks)) as page:
        await expect(page.locator("#health")).to_contain_text("experts up")
        await ask(page, "Hi")
        await expect(page.locator(".token")).to_have_text(["Hello", " there"])
        breaks.set()  # a browser drops what it has not handed on when a connection breaks
        await expect(page.locator(".error")).to_contain_text("before the answer was whole")
        assert await texts(page) == ["Hello there"]


async def test_a_server_that_is_gone(browser: Browser) -> None:
    async with scripted(browser, Script()) as page:
        await expect(page.locator("#health")).to_contain_text("experts up")
        await page.context.set_offline(True)
        await ask(page, "Hi")
        await expect(page.locator(".error")).to_contain_text("The server is out of reach")
        await expect(page.locator("#health")).to_contain_text("out of reach")
        await page.context.set_offline(False)
        await page.get_by_role("button", name="Try again").click()
        await answered(page)
        await expect(page.locator("#health")).to_contain_text("2 of 2 experts up")


async def test_it_streams_and_stops(browser: Browser) -> None:
    script = Script(pauses=asyncio.Event())
    async with scripted(browser, script) as page:
        await ask(page, "Hi")
        await expect(page.locator(".token")).to_have_text(["Hello"])
        await expect(page.locator(".answer")).to_have_attribute("aria-busy", "true")
        await page.get_by_role("button", name="Stop").click()
        await expect(page.locator(".facts")).to_contain_text("stopped by you")
        await asyncio.wait_for(script.left.wait(), 10)
        assert await texts(page) == ["Hello"]


async def test_a_conversation_goes_on_and_begins_anew(browser: Browser) -> None:
    script = Script()
    async with scripted(browser, script) as page:
        await expect(page.locator("#health")).to_contain_text("experts up")
        await page.get_by_label("System prompt").fill("Be kind.")
        for text in ("One", "Two"):
            await ask(page, text)
            await answered(page)
        said = [(message["role"], message["content"]) for message in script.bodies[-1]["messages"]]
        assert said == [
            ("system", "Be kind."),
            ("user", "One"),
            ("assistant", "Hello there"),
            ("user", "Two"),
        ]
        await page.get_by_role("button", name="New").click()
        await expect(page.get_by_role("heading", name="Which expert spoke where?")).to_be_visible()
        await ask(page, "Three")
        await answered(page)
        assert [message["content"] for message in script.bodies[-1]["messages"]] == ["Be kind.", "Three"]


async def test_controls_make_the_request(browser: Browser) -> None:
    async with scripted(browser, Script()) as page:
        await expect(page.locator("#health")).to_contain_text("experts up")
        await page.locator("#prompt").fill("Hi")
        body = await request_of(page)
        assert body["decar"] == {"trace": True}
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("fake", 0.7, 128)
        await page.locator("[name=route]").select_option("posterior")
        await page.locator("[name=scope]").select_option("output")
        await page.locator("[name=start]").select_option("prior")
        await page.locator("[name=rule]").select_option("logit")
        await page.get_by_label("Prune below").fill("0.001")
        await page.get_by_label("Top experts").fill("1")
        expected = {
            "route": "posterior",
            "scope": "output",
            "start": "prior",
            "rule": "logit",
            "prune": 0.001,
        }
        assert (await request_of(page))["decar"] == {**expected, "top_k": 1, "trace": True}
        await page.locator("[name=route]").select_option("fixed")
        await page.locator("[name='weight:a']").fill("30")
        await expect(page.locator("#weights output").first).to_have_text("38 %")  # of 30 and 50
        body = await request_of(page)
        assert body["decar"]["weights"] == {"a": 0.3, "b": 0.5}
        assert not {"route", "scope", "start"} & set(body["decar"])
        await page.locator("[name=model]").select_option("b alone")
        body = await request_of(page)
        assert (body["model"], body["decar"]) == ("fake/b", {"trace": True})


async def test_tokens_by_keyboard(browser: Browser) -> None:
    words = [(f"w{i} ", (0.1 * i, 1 - 0.1 * i)) for i in range(8)]
    async with scripted(browser, Script(tokens=words)) as page:
        await ask(page, "Hi")
        await answered(page)
        await page.locator("#log").focus()
        await page.keyboard.press("Tab")
        tip = page.get_by_role("tooltip")
        for key, word in (("ArrowRight", 1), ("End", 7), ("ArrowLeft", 6), ("Home", 0), ("ArrowLeft", 0)):
            await page.keyboard.press(key)
            focused = page.locator(".token:focus")
            await expect(focused).to_have_text(f"w{word} ")
            await expect(focused).to_have_attribute("aria-describedby", "tip")
            await expect(tip).to_contain_text(f"“w{word}␣”")
        await expect(tip).to_contain_text("100 %")
        await page.keyboard.press("Escape")
        await expect(tip).to_be_hidden()
        await page.keyboard.press("Tab")
        assert await page.evaluate("document.activeElement.closest('.text')") is None, "an answer is one stop"


async def test_health_of_every_expert(browser: Browser) -> None:
    server = FakeServer(0.75, 0.25)
    async with scripted(browser, Script(), server=server) as page:
        experts = page.locator("#experts li")
        await expect(experts).to_have_count(2)
        await expect(experts.first).to_contain_text("prior 75 %")
        await expect(page.locator("#load")).to_contain_text("0 of 2 slots")
        server.client.experts[1].up = False
        await expect(page.locator("#health")).to_have_text("1 of 2 experts up", timeout=15_000)
        await expect(experts.nth(1)).to_contain_text("down")


async def test_every_expert_has_a_colour_that_all_can_tell_apart(browser: Browser) -> None:
    """Under normal vision and without one kind of cone, in both themes, with enough contrast to the text."""
    async with scripted(browser, Script()) as page:
        for theme in ("light", "dark"):
            await page.emulate_media(color_scheme=theme)  # type: ignore[arg-type]
            ink = await page.evaluate("getComputedStyle(document.body).color")
            text = luminance(linear([int(value) / 255 for value in ink[4:-1].split(",")[:3]]))
            rgb = np.clip(np.array([from_lab(lab) for lab in await palette(page, theme)]), 0, 1)
            for colour in rgb:
                low, high = sorted((luminance(colour), text))
                assert (high + 0.05) / (low + 0.05) >= 4.5
            for vision in VISIONS.values():
                seen = np.array([to_lab(np.clip(np.array(vision) @ colour, 0, 1)) for colour in rgb])
                apart = np.linalg.norm(seen[:, None] - seen[None], axis=-1)
                assert apart[np.triu_indices(8, 1)].min() >= APART
                assert apart[0, 1] >= PAIR_APART


def linear(srgb: list[float]) -> Any:
    values = np.array(srgb)
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def luminance(rgb: Any) -> float:
    return float(rgb @ [0.2126, 0.7152, 0.0722])


def from_lab(lab: list[float]) -> Any:
    return np.linalg.inv(TO_CONES) @ (np.linalg.inv(FROM_CONES) @ lab) ** 3


def to_lab(rgb: Any) -> Any:
    return FROM_CONES @ np.cbrt(TO_CONES @ rgb)


@pytest.mark.parametrize("options", [{}, DARK, NARROW], ids=["light", "dark", "narrow"])
async def test_axe_finds_nothing_serious(browser: Browser, options: dict[str, Any]) -> None:
    """In every state that the page has; in the dark, of what differs there."""
    rules = ["color-contrast"] if options is DARK else None
    # axe makes elements of HTML to measure with, which the page's own policy refuses.
    async with scripted(browser, Script(), bypass_csp=True, **options) as page:
        await expect(page.locator("#health")).to_contain_text("experts up")
        await page.evaluate(AXE_SCRIPT)
        settings = page.get_by_role("button", name="Settings")
        if options is NARROW:
            await settings.click()
        await page.locator("[name=route]").select_option("fixed")
        await page.locator("[name=beside]").select_option("b alone")
        await assert_accessible(page, rules)
        if options is NARROW:
            await settings.click()
        await ask(page, "Hi")
        await answered(page)
        await page.get_by_text("Who spoke where, in words").first.click()
        await page.locator(".token").first.hover()
        await assert_accessible(page, rules)
        await page.locator("[name=temperature]").evaluate("slider => slider.value = 2")
        await ask(page, "Hi")
        await expect(page.locator(".error").first).to_be_visible()
        for button in ("API key", "As code"):
            await page.get_by_role("button", name=button).click()
            await assert_accessible(page, rules)
            await page.keyboard.press("Escape")
        await assert_accessible(page, rules)


async def assert_accessible(page: Page, rules: list[str] | None) -> None:
    found = await page.evaluate("rules => axe.run(rules ? {runOnly: rules} : {})", rules)
    serious = [
        (violation["id"], [node["html"] for node in violation["nodes"]])
        for violation in found["violations"]
        if violation["impact"] in ("moderate", "serious", "critical")
    ]
    assert not serious
    assert "color-contrast" in {rule["id"] for rule in found["passes"]}


@pytest.mark.parametrize("width", [320, 400])
async def test_nothing_is_wider_than_a_narrow_window(browser: Browser, width: int) -> None:
    tokens = [("def " + "x" * 300, (0.5, 0.5)), ("\n", (0.9, 0.1)), (" end", (0.1, 0.9))]
    options = {"viewport": {"width": width, "height": 800}}
    async with scripted(browser, Script(tokens=tokens), **options) as page:
        await expect(page.locator("#health")).to_contain_text("experts up")
        await assert_fits(page)
        await page.get_by_role("button", name="Settings").click()
        await page.locator("[name=route]").select_option("fixed")
        await page.locator("[name=beside]").select_option("b alone")
        await assert_fits(page)
        await page.get_by_role("button", name="Settings").click()
        await ask(page, "y" * 300)
        await answered(page)
        await page.locator(".token").last.hover()
        await expect(page.get_by_role("tooltip")).to_be_visible()
        await assert_fits(page)
        await page.get_by_role("button", name="As code").click()
        await assert_fits(page)


async def assert_fits(page: Page) -> None:
    over = await page.evaluate(
        """[...document.querySelectorAll("html, body, #log, #settings, #composer, dialog[open], #tip")]
            .filter(box => box.scrollWidth > box.clientWidth).map(box => box.id || box.tagName)"""
    )
    assert not over


async def test_an_image_goes_with_the_message(browser: Browser) -> None:
    server, script = FakeServer(0.5, 0.5), Script()
    for expert in server.client.ensemble.experts:
        expert.reads_images = True  # type: ignore[misc]
    async with scripted(browser, script, server=server) as page:
        picture = {"name": "digit.svg", "mimeType": "image/svg+xml", "buffer": b"<svg/>"}
        await expect(page.get_by_role("button", name="Add image")).to_be_visible()
        await page.locator("#files").set_input_files([picture, {**picture, "name": "other.svg"}])  # type: ignore[list-item]
        await page.get_by_role("button", name="Remove other.svg").click()
        await page.locator("#files").set_input_files(
            {**picture, "name": "text.txt", "mimeType": "text/plain"}
        )  # type: ignore[arg-type]
        await expect(page.get_by_role("alert")).to_contain_text("text.txt is not an image")
        await ask(page, "Which digit?")
        await answered(page)
        [message] = script.bodies[-1]["messages"]
        assert message["content"] == [
            {"type": "image_url", "image_url": {"url": "data:image/svg+xml;base64,PHN2Zy8+"}},
            {"type": "text", "text": "Which digit?"},
        ]
        await expect(page.locator(".asked img")).to_have_attribute("alt", "digit.svg")
        await expect(page.locator("#attached")).to_be_hidden()
        await page.get_by_role("radio", name="Completion").check()
        await expect(page.get_by_role("button", name="Add image")).to_be_hidden()


async def test_experts_without_eyes_are_shown_nothing(browser: Browser) -> None:
    async with scripted(browser, Script()) as page:
        await expect(page.locator("#health")).to_contain_text("experts up")
        await expect(page.get_by_role("button", name="Add image")).to_be_hidden()
