"""The demo page, driven headless through its own web interface."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio")

from gradio_client import Client
from gradio_client.exceptions import AppError

from rsm_guidance import SAMPLERS
from rsm_guidance.shapes import CATEGORIES, parse_caption

PROMPT = "a green triangle left of a red star"


@pytest.fixture(scope="module")
def app() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_app", Path(__file__).parents[2] / "demo" / "app.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def client(app: ModuleType) -> Iterator[Client]:
    demo = app.build_demo()
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False, server_name="127.0.0.1")
    try:
        yield Client(url, verbose=False)
    finally:
        demo.close()


def run(
    client: Client,
    prompt: str = PROMPT,
    sampler: str = "stepwise",
    candidates: int = 3,
    seed: int | None = 1,
    steps: int = 4,
    columns: str = "",
) -> list[Any]:
    """Every output of one generation, the last one included."""
    job = client.submit(prompt, sampler, candidates, seed, steps, columns, api_name="/generate")
    seen = list(job)
    job.result()  # raises what the page would show as an error
    return seen


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def column(rows: dict[str, Any], name: str) -> list[str]:
    return [row[rows["headers"].index(name)] for row in rows["data"]]


def test_streams_previews_and_ends_with_both_images_rewards_and_plot(client: Client) -> None:
    *before, (unguided, guided, status, rows, plot) = run(client)
    previews = [image for _, image, *_ in before if isinstance(image, str)]
    assert len(previews) == 2  # every second of four steps
    assert any("step 2 of 4" in status for _, _, status, *_ in before)
    assert status.startswith("Done")
    assert pixels(unguided).shape == pixels(guided).shape == (64, 64, 3)
    assert plot["type"] == "matplotlib" and plot["plot"].startswith("data:image/")
    assert column(rows, "image") == ["unguided", "guided"]
    assert all(np.isfinite(float(r)) for r in column(rows, "reward"))
    assert all("correct" in v for v in column(rows, "verifier"))
    # CFG counts two a step; guiding adds the scores of three candidates at three steps
    first, second = map(float, column(rows, "NFE"))
    assert 8 <= first < second


def test_the_same_seed_gives_the_same_images_and_rewards(client: Client) -> None:
    first, second, other = run(client)[-1], run(client)[-1], run(client, seed=2)[-1]
    for k in (0, 1):
        assert np.array_equal(pixels(first[k]), pixels(second[k]))
        assert not np.array_equal(pixels(first[k]), pixels(other[k]))
    assert column(first[3], "reward") == column(second[3], "reward")


NEVER_UNGUIDED = {  # at size one they still follow a gradient, or go through several rounds
    "smc", "reward-gradient", "noise-optimization", "noise-search", "psi", "backtracking",
}  # fmt: skip


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_every_sampler_of_size_one_is_the_unguided_run_but_for_those_that_never_are(
    client: Client, sampler: str
) -> None:
    unguided, guided, *_ = run(client, sampler=sampler, candidates=1)[-1]
    if sampler not in NEVER_UNGUIDED:
        assert np.array_equal(pixels(unguided), pixels(guided))
    elif sampler in ("smc", "reward-gradient"):  # a gradient moves every image; rounds may find nothing better
        assert not np.array_equal(pixels(unguided), pixels(guided))


def test_a_run_of_one_step_compares_nothing_and_still_ends(client: Client) -> None:
    *_, (unguided, guided, status, _, plot) = run(client, steps=1)
    assert status.startswith("Done") and plot["type"] == "matplotlib"
    assert np.array_equal(pixels(unguided), pixels(guided))


def test_a_prompt_outside_the_grammar_gets_no_verdict(client: Client) -> None:
    rows = run(client, prompt="a dog", sampler="best-of-n", candidates=2)[-1][3]
    assert column(rows, "verifier") == ["–", "–"]


@pytest.mark.parametrize(("wrong", "message"), [({"prompt": "  "}, "prompt is empty"), ({"seed": None}, "seed")])
def test_bad_input_gives_a_clear_error_and_the_page_works_on(client: Client, wrong: dict, message: str) -> None:
    with pytest.raises(AppError, match=message):
        run(client, **wrong)
    assert run(client)[-1][2].startswith("Done")


def test_a_reward_gets_the_columns_that_it_reads(app: ModuleType, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    demo = app.build_demo(reward="color-histogram")
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False, server_name="127.0.0.1")
    try:
        client = Client(url, verbose=False)
        rows = run(client, columns=f"reference={tmp_path / 'red.png'}\n")[-1][3]
        assert all(0 < float(score) < 1 for score in column(rows, "reward"))
        for text, message in (("", "reference"), ("red", "sets nothing")):
            with pytest.raises(AppError, match=message):
                run(client, columns=text)
    finally:
        demo.close()


def test_examples_are_captions_the_verifier_reads(app: ModuleType) -> None:
    assert {parse_caption(text).category for text in app.EXAMPLES} == set(CATEGORIES)


def test_a_run_nobody_waits_for_ends(app: ModuleType) -> None:
    ended = Event()

    def work(report: Any, stop: Event) -> Any:
        report(app.Preview("started"))
        if stop.wait(10):
            ended.set()
        raise app.Abandoned

    events = app.in_thread(work)
    assert next(events).status == "started"
    events.close()
    assert ended.wait(10)


def test_an_unknown_model_is_one_clear_sentence(app: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot load a pipeline"):
        app.build_demo(str(tmp_path))
