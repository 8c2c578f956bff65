"""Rewards on another machine: the same scores as here, and clear failures, never a made-up score."""

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

import rsm_guidance as rg
from rsm_guidance.core.errors import UsageError
from rsm_guidance.rewards import RewardError, resolve_reward
from rsm_guidance.rewards.images import eight_bit
from rsm_guidance.rewards.serve import reward_server
from rsm_guidance.rewards.wire import pack_latents, unpack_latents
from rsm_guidance.samplers import StepwiseSampling

IMAGES = torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(0))
PROMPTS = ["one", "two", "drei ü"]


def lengths(images: torch.Tensor, prompts: list[str], *, extra: list[int], **columns: list[Any]) -> torch.Tensor:
    return images.double().mean((1, 2, 3)) + torch.tensor([len(p) for p in prompts]) + torch.tensor(extra)


lengths.requires = ("extra",)  # type: ignore[attr-defined]


@contextmanager
def serving(reward: Any) -> Iterator[str]:
    with reward_server(rg.rewards.as_reward(reward)) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_scores_are_those_of_the_eight_bit_images_here() -> None:
    with serving(lengths) as url:
        remote = resolve_reward(f"remote:url={url}:batch=2")
        assert remote.requires == ("extra",)
        found = remote(IMAGES, PROMPTS, extra=[1, 2, 3])
    assert torch.equal(found, lengths(eight_bit(IMAGES), PROMPTS, extra=[1, 2, 3]))


def test_what_the_server_refuses_is_an_error_here() -> None:
    def picky(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        raise {"crash": ZeroDivisionError("by zero"), "bad": UsageError("not this one")}[prompts[0]]

    def nowhere(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return torch.full((len(prompts),), torch.nan)

    with serving(picky) as url:
        remote = resolve_reward(f"remote:url={url}:retries=0")
        with pytest.raises(RewardError, match="refused: status 400, not this one"):
            remote(IMAGES[:1], ["bad"])
        with pytest.raises(RewardError, match="after 1 attempt .status 500, ZeroDivisionError: by zero.*nothing was"):
            remote(IMAGES[:1], ["crash"])
    with serving(nowhere) as url, pytest.raises(RewardError, match="status 400, nowhere returned nan for item 0"):
        resolve_reward(f"remote:url={url}")(IMAGES, PROMPTS)


@contextmanager
def answering(*answers: bytes | Callable[[BaseHTTPRequestHandler], None]) -> Iterator[tuple[str, list[str]]]:
    """A server that says these things, one after the other and the last for ever, to requests for scores."""
    facts = json.dumps({"protocol": 1, "requires": [], "latents": False, "share": 0}).encode()
    left, asked = list(answers), []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(facts)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            asked.append(self.path)
            answer = left.pop(0) if len(left) > 1 else left[0]
            self.reply(answer) if isinstance(answer, bytes) else answer(self)

        def reply(self, body: bytes, status: int = 200) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"<html>gateway</html>", "no JSON but b'<html>"),
        (b"[0.1, 0.2, 0.3]", "answers with '\\[0.1"),
        (b'{"scores": [1, 2]}', "2 scores for 3 images"),
        (b'{"scores": [1, NaN, 3]}', "image 1 is nan"),
        (b'{"scores": [1, 2, Infinity]}', "image 2 is inf"),
        (b'{"scores": [1, 2, null]}', "image 2 is None"),
        (b'{"scores": [1, true, 2]}', "image 1 is True"),
        (b'{"scores": "none"}', "answers with"),
        (b"", "no JSON but b''"),
        (b'{"error": "busy"}', "answers with"),
    ],
)
def test_nonsense_is_refused(answer: bytes, words: str) -> None:
    with answering(answer) as (url, asked):
        with pytest.raises(RewardError, match=words):
            resolve_reward(f"remote:url={url}")(IMAGES, PROMPTS)
        assert len(asked) == 1


def test_what_may_pass_is_tried_again_so_many_times() -> None:
    def busy(handler: Any) -> None:
        handler.reply(b'{"error": "busy"}', 503)

    good = b'{"scores": [1, 2, 3]}'
    with answering(busy, busy, good) as (url, asked):
        assert resolve_reward(f"remote:url={url}")(IMAGES, PROMPTS).tolist() == [1, 2, 3]
    with answering(busy) as (url, asked):
        with pytest.raises(RewardError, match="after 3 attempts .status 503, busy"):
            resolve_reward(f"remote:url={url}")(IMAGES, PROMPTS)
        assert len(asked) == 3


def test_servers_that_hang_or_drip_run_into_the_timeout() -> None:
    over = threading.Event()

    def hang(handler: Any) -> None:
        over.wait(20)

    def drip(handler: Any) -> None:
        handler.send_response(200)
        handler.end_headers()
        while not over.wait(0.05):
            handler.wfile.write(b" ")
            handler.wfile.flush()

    for answer in (hang, drip):
        over.clear()
        with answering(answer) as (url, _):
            remote = resolve_reward(f"remote:url={url}:timeout=0.4:retries=1")
            began = time.monotonic()
            with pytest.raises(RewardError, match="no answer .* after 2 attempts"):
                remote(IMAGES, PROMPTS)
            assert time.monotonic() - began < 5
            over.set()


def test_a_server_that_is_killed_in_mid_run_ends_the_run_with_an_error(guided: DiffusionPipeline) -> None:
    command = [sys.executable, "-m", "rsm_guidance", "serve-reward", "color:color=red", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        remote = resolve_reward(f"remote:url={url}:retries=1:timeout=10")
        here = resolve_reward("color:color=red")
        assert torch.allclose(remote(IMAGES, PROMPTS), here(eight_bit(IMAGES), PROMPTS).double(), atol=1e-6)
        levels: list[int] = []

        def kill(event: Any) -> None:
            levels.append(event.level)
            if len(levels) == 2:
                process.kill()
                process.wait()

        with pytest.raises(RewardError, match="no answer from .* after 2 attempts.*nothing was scored"):
            guided("a star", num_inference_steps=6, sampler=StepwiseSampling(2), reward=remote, seed=0, on_step=kill)
        assert levels == [1, 2]
    finally:
        process.kill()
        process.wait()


def test_a_diffusion_reward_model_elsewhere_guides_as_it_does_here(
    guided: DiffusionPipeline, drm: rg.DiffusionRewardModel
) -> None:
    call: dict[str, Any] = {"prompt": ["a red star"], "seed": 0, "num_inference_steps": 5, "guidance_scale": 3.0}
    with serving(drm) as url:
        remote = resolve_reward(f"remote:url={url}")
        there = guided(**call, sampler=StepwiseSampling(3), reward=remote)
        finished = resolve_reward(f"remote:url={url}:latents=false")
        assert finished.image_size == remote.image_size == drm.image_size == 64
        image = torch.rand(1, 3, 64, 64)
        assert torch.allclose(finished(image, ["a star"]).float(), drm.score_images(eight_bit(image), ["a star"]))
        with pytest.raises(RewardError, match="refused: status 400"):
            remote.score_at_level(torch.zeros(1, 9, 3, 3), 0, ["a"], _schedule(guided), None)
    here = guided(**call, sampler=StepwiseSampling(3), reward=drm)
    assert there.rewards == pytest.approx(here.rewards, abs=1e-5)
    assert there.ledger.evaluations == here.ledger.evaluations
    assert there.images[0].tobytes() == here.images[0].tobytes()


def _schedule(pipe: DiffusionPipeline) -> Any:
    from rsm_guidance.core.schedule import NoiseSchedule

    return NoiseSchedule.flow(4)


def test_latents_and_what_goes_with_them_survive_the_journey() -> None:
    latents = torch.randn(2, 16, 4).bfloat16()
    back, timestep, prompts, grid = unpack_latents(pack_latents(latents, 301.25, ["a", "ü"], (4, 4)))
    assert torch.equal(back, latents) and (timestep, prompts, grid) == (301.25, ["a", "ü"], (4, 4))
    for body in (b"", b"{}", pack_latents(latents, 1.0, ["a"], None)[:40]):
        with pytest.raises(UsageError, match="no request for scores of latents"):
            unpack_latents(body)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("remote", "needs url="),
        ("remote:url=localhost", "http:// or https:// address"),
        ("remote:url=http://localhost:9:timeout=0", "timeout must be positive"),
        ("remote:url=http://localhost:9:batch=0", "batch must be at least 1"),
    ],
)
def test_bad_options_are_refused(spec: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        resolve_reward(spec)


def test_no_server_and_another_server_are_told_apart() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(RewardError, match="no answer from http://127.0.0.1.* after 1 attempt .*refused"):
        resolve_reward(f"remote:url=http://127.0.0.1:{port}:retries=0")

    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"hello": "world"}')

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        with pytest.raises(RewardError, match="no reward server of protocol 1"):
            resolve_reward(f"remote:url=http://127.0.0.1:{server.server_port}")
        server.shutdown()
