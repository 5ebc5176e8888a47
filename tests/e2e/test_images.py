"""Image–text experts: what real engines answer to real images is what a transformers mixture answers."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from PIL import Image
from playwright.async_api import Browser, expect

from decar.router import Ensemble, load_trained_images
from decar.router.features import TfidfFeatures
from decar.router.files import Centroids, Classifier, TrainedRouter, write_router
from decar.router.images import PixelFeatures
from decar.training.data.digits import write_digits
from tests.browser import opened
from tests.helpers import EXACT, Server, assert_error
from tests.images import ImageReference, data_url, digit_images, image_chat, make_image_ensemble
from tests.reference import Decoded

pytestmark = pytest.mark.engines

MAX_TOKENS = 16
MARGIN = 0.01
"""Nats by which every chosen token leads. Both sides compute in float32, and differ by some 1e-6."""
LOGPROB = 1e-3
"""Nats. Both sides compute in float32; this leaves room for sums in another order on other machines."""
QUESTIONS = ("Which digit is this?", "Is it even?", "Is it larger than four?")


TERMS = ("digit", "even", "four")
SIDE = 8  # pixels that the router for images sees
RNG = np.random.default_rng(0)
OF_TEXT = Classifier(RNG.normal(size=(2, 3)).astype("f4"), RNG.normal(size=2).astype("f4"), 0.7)
OF_IMAGES = Classifier(RNG.normal(size=(2, 5)).astype("f4"), RNG.normal(size=2).astype("f4"), 0.3)
COMPONENTS = RNG.normal(size=(5, SIDE * SIDE * 3)).astype("f4")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> ImageReference:
    """K=2 LLaVAs with a router for texts and one for images."""
    directory = make_image_ensemble(tmp_path_factory.mktemp("images") / "llava", (0.4, 0.6))
    reference = ImageReference.load(directory)
    ones = np.ones(3, dtype="f4")
    pixels = PixelFeatures(SIDE, np.full(COMPONENTS.shape[1], 0.5, dtype="f4"), COMPONENTS)
    for folder, features, classifier in (
        ("router", TfidfFeatures(TERMS, ones, np.eye(3, dtype="f4")), OF_TEXT),
        ("router/image", pixels, OF_IMAGES),
    ):
        (directory / folder).mkdir()
        router: TrainedRouter[Any] = TrainedRouter(
            reference.experts, features, classifier, Centroids(classifier.weight, "cosine", 1.0)
        )
        write_router(router, directory / folder)
    return reference


def routed(features: np.ndarray, classifier: Classifier, prior: Sequence[float]) -> list[float]:
    """Weights [K] by a calibrated logistic regression on ``features`` [D], from their definition."""
    unit = features / np.linalg.norm(features)
    scores = np.log(prior) + (classifier.weight @ unit + classifier.bias) / classifier.temperature
    weights: list[float] = (np.exp(scores) / np.exp(scores).sum()).tolist()
    return weights


@pytest.fixture(scope="module")
def digits_server(digits: ImageReference, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    # Chunks shorter than most prompts, so that images, questions and their scores are computed in several steps.
    flags = (*EXACT, "--max-num-batched-tokens", "32", "--max-num-seqs", "16")
    server = Server.start(digits.directory, tmp_path_factory.mktemp("logs") / "digits.log", flags)
    try:
        yield server
        assert server.stop() == 0, server.log_tail()
    finally:
        server.kill()


@dataclass
class Case:
    """A question about images, and the answer it has to get."""

    images: Sequence[Image.Image]
    text: str
    inputs: dict[str, torch.Tensor]
    answer: Decoded

    @property
    def messages(self) -> list[dict[str, Any]]:
        parts = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in self.images]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": self.text}]}]


def case(
    reference: ImageReference,
    images: Sequence[Image.Image],
    text: str,
    weights: Sequence[float] | None = None,
    posterior: bool = True,
) -> Case:
    """Decoded from ``weights`` (default: those that the prompt leaves), which the answer moves on if ``posterior``."""
    inputs = reference.encode(images, text)
    if weights is None:
        log_weights = reference.prompt_log_weights(inputs)
    else:
        log_weights = torch.tensor(weights).double().log()
    return Case(images, text, inputs, reference.decode(inputs, log_weights, MAX_TOKENS, posterior))


@pytest.fixture(scope="module")
def cases(digits: ImageReference) -> list[Case]:
    """Questions about one image, about two, and about none, whose answers are decided clearly."""
    pictures = digit_images(12)
    asked = [case(digits, [picture], QUESTIONS[i % 3]) for i, picture in enumerate(pictures)]
    asked += [case(digits, pictures[i : i + 2], "Which one is larger?") for i in range(0, 6, 2)]
    asked += [case(digits, [], question) for question in QUESTIONS]
    clear = [one for one in asked if one.answer.margin > MARGIN]
    assert {len(one.images) for one in clear} == {0, 1, 2}
    assert len(clear) >= 10
    return clear


async def ask(
    server: Server, questions: Sequence[Case], decar: dict[str, Any] | None, model: str = "llava"
) -> list[Any]:
    """The choices that all ``questions``, asked at once, get."""
    async with server.async_openai() as client:
        responses = await asyncio.gather(
            *(
                client.chat.completions.create(
                    model=model,
                    messages=one.messages,
                    max_tokens=MAX_TOKENS,
                    temperature=0,
                    logprobs=True,
                    extra_body={
                        "ignore_eos": True,
                        "return_token_ids": True,
                        "decar": {"trace": True, **(decar or {})},
                    },
                )
                for one in questions
            )
        )
    return [response.choices[0] for response in responses]


def check(choice: Any, expected: Decoded) -> None:
    assert choice.model_extra["token_ids"] == expected.tokens
    assert [token.logprob for token in choice.logprobs.content] == pytest.approx(
        expected.logprobs, abs=LOGPROB
    )
    weights = torch.tensor(choice.model_extra["decar"]["weights"])
    assert torch.allclose(weights, torch.tensor(expected.weights), atol=1e-3)


async def test_answers_about_images_are_the_mixtures(digits_server: Server, cases: list[Case]) -> None:
    """Twice: prompts that experts score as they compute them, and prompts whose scores are known."""
    for _ in range(2):
        for choice, one in zip(await ask(digits_server, cases, None), cases, strict=True):
            check(choice, one.answer)


async def test_internvl(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Another kind of model, which puts marks around an image's places."""
    directory = tmp_path_factory.mktemp("images")
    path = make_image_ensemble(directory / "internvl", (0.4, 0.6), "internvl")
    reference = ImageReference.load(path, "internvl")
    asked = [case(reference, [picture], QUESTIONS[0]) for picture in digit_images(8)]
    clear = [one for one in asked if one.answer.margin > MARGIN]
    assert len(clear) >= 3
    server = Server.start(reference.directory, directory / "internvl.log")
    try:
        for choice, one in zip(await ask(server, clear, None, "internvl"), clear, strict=True):
            check(choice, one.answer)
        assert server.stop() == 0, server.log_tail()
    finally:
        server.kill()


async def test_an_image_weighs_the_experts(cases: list[Case]) -> None:
    """The same question about different images starts from different weights: the test above tells them apart."""
    first = [one.answer.weights[0][0] for one in cases if len(one.images) == 1 and one.text == QUESTIONS[0]]
    assert max(first) - min(first) > 0.05


async def test_fixed_weights(digits: ImageReference, digits_server: Server, cases: list[Case]) -> None:
    expected = [case(digits, one.images, one.text, (0.5, 0.5), posterior=False) for one in cases[:6]]
    clear = [one for one in expected if one.answer.margin > MARGIN]
    assert clear
    decar = {"weights": {"expert0": 1.0, "expert1": 1.0}}
    for choice, one in zip(await ask(digits_server, clear, decar), clear, strict=True):
        check(choice, one.answer)


async def test_routers_look_at_images_and_else_at_text(
    digits: ImageReference, digits_server: Server, cases: list[Case]
) -> None:
    def weights_of(one: Case) -> list[float]:
        if not one.images:
            counts = np.array([one.text.lower().count(term) for term in TERMS])
            return routed(1.0 * (counts > 0), OF_TEXT, digits.prior)
        directions = []
        for image in one.images:
            small = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR), dtype=np.float64) / 255
            projected = COMPONENTS @ (small.ravel() - 0.5)
            directions.append(projected / np.linalg.norm(projected))
        return routed(np.sum(directions, axis=0), OF_IMAGES, digits.prior)

    weights = [weights_of(one) for one in cases]
    assert np.std([expected[0] for expected in weights]) > 0.01
    answers = await ask(digits_server, cases, {"route": "classifier"})
    for choice, expected in zip(answers, weights, strict=True):
        assert choice.model_extra["decar"]["weights"][0] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("decar", "with_images"),
    [
        ({"route": "classifier"}, False),
        ({"route": "centroid"}, False),
        ({"scope": "output", "start": "classifier"}, False),
        ({"prune": 0.2}, True),
        ({"scope": "output"}, True),
    ],
    ids=str,
)
async def test_one_beam_is_the_greedy_answer(
    digits_server: Server, cases: list[Case], decar: dict[str, Any], with_images: bool
) -> None:
    """A router looks at what the user has asked, and not at the beam; a beam has its prompt's images."""
    asked = [one for one in cases if bool(one.images) == with_images][:4]
    assert asked
    greedy = await ask(digits_server, asked, decar)
    for choice, one in zip(greedy, asked, strict=True):
        body = {"model": "llava", "messages": one.messages, "max_tokens": MAX_TOKENS, "temperature": 0}
        body |= {"use_beam_search": True, "ignore_eos": True, "return_token_ids": True, "decar": decar}
        response = await asyncio.to_thread(digits_server.http.post, "/v1/chat/completions", json=body)
        assert response.json()["choices"][0]["token_ids"] == choice.model_extra["token_ids"]


def test_no_router_can_look_at_a_beams_images(digits_server: Server, cases: list[Case]) -> None:
    one = next(one for one in cases if one.images)
    body = {"model": "llava", "messages": one.messages, "max_tokens": 2, "use_beam_search": True}
    body["decar"] = {"route": "classifier"}
    error = assert_error(digits_server.http.post("/v1/chat/completions", json=body), 400, "beam", "images")
    assert error["param"] == "use_beam_search"


def test_an_image_that_one_expert_has_seen_before(digits_server: Server) -> None:
    """Every engine gets an image that it lacks, whatever others have got before."""
    image = digit_images(20)[-1]
    client = digits_server.openai()
    options: dict[str, Any] = {"messages": image_chat(image, QUESTIONS[0]), "max_tokens": 2}
    for model in ("llava/expert0", "llava", "llava/expert1", "llava"):
        assert client.chat.completions.create(model=model, **options).choices[0].message.content


def test_prompt_logprobs(digits: ImageReference, digits_server: Server, cases: list[Case]) -> None:
    """Of every text token, by weights that images leave as they are."""
    one = next(one for one in cases if len(one.images) == 2)
    body = {"model": "llava", "messages": one.messages, "max_tokens": 1, "prompt_logprobs": 0}
    response = digits_server.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    ids = one.inputs["input_ids"][0]
    rows = digits.rows(one.inputs, [])[:, :-1]
    is_text = digits.is_text(one.inputs)[1:]
    said = rows.gather(2, ids[None, 1:, None].expand(2, -1, 1))[..., 0]  # [K, T - 1]
    moves = torch.where(is_text, said, 0.0)
    before = torch.cat([torch.zeros(2, 1), moves.cumsum(dim=1)[:, :-1]], dim=1)
    log_weights = (torch.tensor(digits.prior).double().log()[:, None] + before).log_softmax(dim=0)
    expected = torch.logsumexp(log_weights + said, dim=0)
    found = response.json()["prompt_logprobs"]
    assert found[0] is None
    assert len(found) == len(ids)
    for t in torch.nonzero(is_text).flatten().tolist():
        assert found[t + 1][str(int(ids[t + 1]))]["logprob"] == pytest.approx(
            float(expected[t]), abs=LOGPROB
        ), t


def bomb() -> str:
    """The URL of an image that is small to send and large to look at."""
    return data_url(Image.new("1", (10_000, 10_000)))


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("data:image/png;base64,bm8gaW1hZ2U=", ("image", "cannot identify")),
        ("data:image/png;base64,%%%", ("image", "base64")),
        (bomb(), ("image", "10000x10000", "pixels")),
        # A server that fetched these would be a way into the network that it is in.
        ("http://127.0.0.1:9/secret.png", ("data:", "--allowed-media-domains")),
        ("HTTPS://example.invalid/digit.png", ("data:", "--allowed-media-domains")),
        ("file:///etc/hostname", ("--allowed-local-media-path",)),
        ("ftp://example.invalid/digit.png", ("data",)),
    ],
    ids=["no image", "no base64", "bomb", "http", "https", "file", "ftp"],
)
def test_an_unreadable_image_is_the_clients_error(digits_server: Server, url: str, words: Any) -> None:
    parts = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "Which digit is this?"},
    ]
    body = {"model": "llava", "messages": [{"role": "user", "content": parts}], "max_tokens": 2}
    error = assert_error(digits_server.http.post("/v1/chat/completions", json=body), 400, *words)
    assert " at 0x" not in error["message"]


def test_more_tokens_than_fit_are_the_clients_error(digits_server: Server) -> None:
    image = digit_images(1)[0]
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}} for _ in range(40)]
    body = {"model": "llava", "messages": [{"role": "user", "content": parts}], "max_tokens": 2}
    assert_error(digits_server.http.post("/v1/chat/completions", json=body), 400, "512")


def test_streams(digits_server: Server, cases: list[Case]) -> None:
    one = next(one for one in cases if len(one.images) == 1)
    stream = digits_server.openai().chat.completions.create(
        model="llava",
        messages=one.messages,
        max_tokens=MAX_TOKENS,
        temperature=0,
        stream=True,
        logprobs=True,
        extra_body={"ignore_eos": True},
    )
    choices = [chunk.choices[0] for chunk in stream if chunk.choices]
    logprobs = [token.logprob for choice in choices if choice.logprobs for token in choice.logprobs.content]
    assert logprobs == pytest.approx(one.answer.logprobs, abs=LOGPROB)


async def test_the_playground_shows_images_to_experts(
    browser: Browser, digits_server: Server, tmp_path: Path
) -> None:
    image = digit_images(1)[0]
    image.save(tmp_path / "digit.png")
    [answer] = await ask(digits_server, [Case([image], QUESTIONS[0], {}, None)], None)  # type: ignore[arg-type]
    async with opened(browser, f"{digits_server.url}/") as page:
        await page.locator("#files").set_input_files(tmp_path / "digit.png")
        await page.locator("[name=temperature]").fill("0")
        await page.locator("[name=max_tokens]").fill(str(MAX_TOKENS))
        await page.locator("#prompt").fill(QUESTIONS[0])
        async with page.expect_request("**/v1/chat/completions") as asked:
            await page.get_by_role("button", name="Send").click()
        await expect(page.get_by_role("button", name="Answer again")).to_be_visible(timeout=60_000)
        [message] = (await asked.value).post_data_json["messages"]
        assert message["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
        said = "".join(await page.locator(".token").all_text_contents())
        assert said
        assert answer.message.content.startswith(said)  # which goes on beyond an end


def test_text_only_models_refuse_images(duo_server: Server) -> None:
    client = duo_server.openai()
    with pytest.raises(openai.BadRequestError, match="not a multimodal model"):
        client.chat.completions.create(
            model="duo", messages=image_chat(digit_images(1)[0], "What?"), max_tokens=1
        )


# ---------------------------------------------------------------------------------------------- trained experts


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> ImageReference:
    """configs/digits.yaml with a tenth of its steps on a fifth of its images."""
    directory = tmp_path_factory.mktemp("trained")
    write_digits(directory / "data", limit=360)
    settings = {
        "work_dir": directory / "run",
        "data.files": f"[{directory}/data/train.jsonl]",
        "training.max_steps": 120,
        "training.save_steps": 120,
    }
    command = [sys.executable, "-m", "decar.training", "run", "configs/digits.yaml"]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    repository = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return ImageReference.load(directory / "run/ensemble")


async def test_trained_experts_answer_as_their_mixture(trained: ImageReference, tmp_path: Path) -> None:
    """From the data to the answer, as a user goes: a router looks at the image, and the answer moves its weights on."""
    pictures = digit_images(12)
    router = load_trained_images(Ensemble.load(trained.directory))["classifier"]
    starts = np.exp(router.log_weights([[picture] for picture in pictures]))
    assert starts.std(axis=0).max() > 0.1  # images of either expert's
    asked = [
        case(trained, [picture], QUESTIONS[i % 2], weights.tolist())
        for i, (picture, weights) in enumerate(zip(pictures, starts, strict=True))
    ]
    clear = [one for one in asked if one.answer.margin > MARGIN]
    assert len(clear) >= 3
    server = Server.start(trained.directory, tmp_path / "log", ("--dtype", "float32", "--enforce-eager"))
    try:
        for choice, one in zip(await ask(server, clear, None, "digits"), clear, strict=True):
            check(choice, one.answer)
        assert server.stop() == 0, server.log_tail()
    finally:
        server.kill()
