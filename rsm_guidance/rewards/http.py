"""One JSON answer of an HTTP server, or a failure that says what happened: never a made-up one."""

import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from rsm_guidance.core.errors import UsageError
from rsm_guidance.rewards.base import RewardError

_LARGEST_ANSWER = 16 * 2**20
_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
_PAUSE = 0.25  # seconds before the second attempt; doubled before each further one


@dataclass(frozen=True)
class Server:
    """A server of JSON.

    Attributes:
        name: of the reward that asks, for messages.
        url: http:// or https:// address.
        timeout: seconds for a whole answer.
        retries: further attempts after one that got no answer, or a status that may pass (429, 500, 503, ...).
        headers: sent with every request.
    """

    name: str
    url: str
    timeout: float = 120.0
    retries: int = 2
    headers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in ("http", "https") or not urlsplit(self.url).netloc:
            raise UsageError(f"{self.name}: url must be an http:// or https:// address; got {self.url!r}")
        if not 0 < self.timeout < math.inf or self.retries < 0:
            raise UsageError(
                f"{self.name}: timeout must be positive and retries at least 0; got {self.timeout} and {self.retries}"
            )

    def ask(self, path: str, body: bytes | None = None, kind: str = "application/json") -> Any:
        """The JSON that answers a POST of `body`, or a GET where it is None.

        Raises:
            RewardError: after the last attempt, or at once for an answer that another attempt would not change.
        """
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(_PAUSE * 2 ** (attempt - 1))
            try:
                return self._once(path, body, kind)
            except urllib.error.HTTPError as error:
                told = _told(error)
                if error.code not in _AGAIN:
                    raise RewardError(f"{self.name}: {self.url} refused: {told}") from error
                last = told
            except (OSError, HTTPException) as error:  # refused, reset, timed out, cut short
                last = str(getattr(error, "reason", None) or error) or type(error).__name__
        tries = f"{self.retries + 1} attempt{'s' * bool(self.retries)}"
        raise RewardError(f"{self.name}: no answer from {self.url} after {tries} ({last}); nothing was scored")

    def _once(self, path: str, body: bytes | None, kind: str) -> Any:
        """One attempt."""
        ends = time.monotonic() + self.timeout
        headers = {"Content-Type": kind, **self.headers} if body is not None else dict(self.headers)
        request = urllib.request.Request(self.url.rstrip("/") + path, body, headers)
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            answer = bytearray()
            while piece := response.read1(1 << 16):
                answer += piece
                if time.monotonic() > ends:  # the timeout of the socket is for each piece
                    raise TimeoutError(f"no whole answer within {self.timeout:g} s")
                if len(answer) > _LARGEST_ANSWER:
                    raise RewardError(f"{self.name}: {self.url} answers with more than {_LARGEST_ANSWER >> 20} MiB")
        try:
            return json.loads(answer)
        except ValueError as error:
            start = bytes(answer[:60])
            raise RewardError(f"{self.name}: {self.url} answers with no JSON but {start!r}") from error


def numbers_of(answer: Any, count: int, name: str) -> Sequence[float]:
    """The scores [count] of {"scores": [...]}.

    Raises:
        RewardError: unless they are as many finite numbers.
    """
    scores = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(scores, list) or len(scores) != count:
        found = f"{len(scores)} scores" if isinstance(scores, list) else f"{str(answer)[:80]!r}"
        raise RewardError(f"{name}: the server answers with {found} for {count} images")
    for index, score in enumerate(scores):
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise RewardError(f"{name}: the server's score of image {index} is {score!r}, not a finite number")
    return scores


def _told(error: urllib.error.HTTPError) -> str:
    """What a server says with an error status."""
    try:
        text = error.read(4096).decode("utf-8", "replace")
    except (OSError, HTTPException):
        text = ""
    try:
        found = json.loads(text)["error"]
        message = found.get("message", found) if isinstance(found, dict) else found
    except (ValueError, KeyError, TypeError):
        message = " ".join(text.split())[:200]
    return f"status {error.code}" + (f", {message}" if message else "")
