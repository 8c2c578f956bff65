"""A server for one reward, for `remote` on other machines; the protocol is in `rewards.wire`.  It has no access control."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from rsm_guidance.core.contracts import Reward
from rsm_guidance.core.errors import UsageError
from rsm_guidance.rewards.base import check_rows, scored
from rsm_guidance.rewards.wire import JSON, PROTOCOL, SAFETENSORS, unpack_images, unpack_latents

_LARGEST_BODY = 256 * 2**20
_SILENCE = 60.0  # seconds after which a client that sends nothing is dropped


def reward_server(reward: Reward, host: str = "127.0.0.1", port: int = 0) -> ThreadingHTTPServer:
    """A server that answers while its `serve_forever` runs; port 0 is any free one (see `server_port`).

    Requests are scored one after the other.

    Raises:
        UsageError: if the address cannot be used.
    """
    try:
        server = ThreadingHTTPServer((host, port), _Handler)
    except (OSError, OverflowError) as error:
        raise UsageError(f"cannot listen at {host}:{port}: {error}") from error
    server.daemon_threads = True
    server.service = Service(reward)  # type: ignore[attr-defined]
    return server


class Service:
    """What a server says, whatever carries it."""

    def __init__(self, reward: Reward) -> None:
        self.reward = reward
        self.lock = threading.Lock()

    def facts(self) -> dict[str, Any]:
        """What the reward says of itself."""
        return {
            "protocol": PROTOCOL,
            "name": self.reward.name,
            "requires": list(self.reward.requires),
            "reads_prompt": bool(getattr(self.reward, "reads_prompt", True)),
            "latents": hasattr(self.reward, "score") and hasattr(self.reward, "value"),
            "share": float(self.reward.share),
            "latent_share": float(getattr(self.reward, "latent_share", 0.0)),
            "image_size": getattr(self.reward, "image_size", None),
        }

    def scores(self, body: bytes, kind: str) -> list[float]:
        """Checked scores of a request.

        Raises:
            UsageError: if it cannot be read or scored.
        """
        with self.lock, torch.no_grad():
            if kind == SAFETENSORS:
                latents, timestep, prompts, grid = unpack_latents(body)
                drm: Any = self.reward
                if not self.facts()["latents"]:
                    raise UsageError(f"{drm.name} scores images, not latents")
                found = scored(lambda: drm.score(latents, timestep, prompts, grid=grid), len(prompts), drm.name)
            elif kind == JSON:
                images, prompts, columns = unpack_images(body)
                check_rows(self.reward, prompts, columns)
                own = {name: columns[name] for name in self.reward.requires}
                found = scored(lambda: self.reward(images, prompts, **own), len(prompts), self.reward.name)
            else:
                raise UsageError(f"a request is {JSON} or {SAFETENSORS}; got {kind!r}")
        numbers: list[float] = found.tolist()
        return numbers


class _Handler(BaseHTTPRequestHandler):
    timeout = _SILENCE

    def do_GET(self) -> None:
        if self.path == "/v1/reward":
            self._say(200, self._service.facts())
        else:
            self._say(404, {"error": f"there is no {self.path}; ask /v1/reward or /v1/score"})

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if self.path != "/v1/score":
            self._say(404, {"error": f"there is no {self.path}; ask /v1/reward or /v1/score"})
        elif not length.isdigit() or int(length) > _LARGEST_BODY:
            self._say(413, {"error": f"a request needs a Content-Length of at most {_LARGEST_BODY}"})
        else:
            self._score(self.rfile.read(int(length)))

    def _score(self, body: bytes) -> None:
        kind = self.headers.get("Content-Type", "").partition(";")[0].strip()
        try:
            answer = {"scores": self._service.scores(body, kind)}
        except (ValueError, TypeError) as error:  # what was sent cannot be scored
            self._say(400, {"error": str(error)})
        except Exception as error:  # of the reward: the client is told, and may come again
            self._say(500, {"error": f"{type(error).__name__}: {error}"})
        else:
            self._say(200, answer)

    @property
    def _service(self) -> Service:
        service: Service = self.server.service  # type: ignore[attr-defined]
        return service

    def _say(self, status: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        with contextlib.suppress(ConnectionError):  # the client has gone
            self.send_response(status)
            self.send_header("Content-Type", JSON)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: a request per step would bury what matters."""
