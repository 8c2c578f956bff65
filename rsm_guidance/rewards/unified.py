"""A judge behind an OpenAI-compatible server (vLLM, SGLang, llama.cpp): the expected level of its answer.

The server is asked for the log-probabilities of the answer's tokens.  At the place of the level, with p_k those of the level
tokens among the most likely ones, the score is sum_k p_k value_k / sum_k p_k (Q-Align, arXiv 2312.17090; Z-Reward,
arXiv 2606.09076).  Parsing the text instead would give ties; and what cannot be read is an error, never a score.
"""

import functools
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor

from rsm_guidance.core.errors import UsageError
from rsm_guidance.rewards.base import RewardError
from rsm_guidance.rewards.builtin import BuiltInReward
from rsm_guidance.rewards.http import Server
from rsm_guidance.rewards.wire import png_texts

_TOP = 20  # log-probabilities for each token; the most that the protocol has
QUESTION = (
    'Rate from 1 (bad) to 5 (excellent) how well this image shows "{prompt}", and how good it looks. '
    "Answer with the number alone."
)


@dataclass(frozen=True)
class Unified(BuiltInReward):
    """Scores between the least and the greatest value.

    Attributes:
        url: of the API, such as http://localhost:8000/v1.
        model: as the server names it.
        question: asked with every image; {prompt} stands for its prompt.
        levels: answers that count, each one token; letter case and spaces do not matter.
        values: of the levels; None for the levels as numbers.
        max_tokens: of an answer; its last level token counts, so that a judge may reason before.
        mass: least probability that all levels together must have.
        key_variable: environment variable that holds the key of the API, where it needs one.
        timeout: seconds for an answer.
        retries: further attempts where there is none.
        parallel: requests at once.
    """

    url: str = ""
    model: str = ""
    question: str = QUESTION
    levels: tuple[str, ...] = ("1", "2", "3", "4", "5")
    values: tuple[float, ...] | None = None
    max_tokens: int = 1
    mass: float = 0.5
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 120.0
    retries: int = 2
    parallel: int = 8

    name = "unified"
    about = "expected level that a judge behind an OpenAI-compatible server answers"
    needs = "url=http://HOST:PORT/v1 and model=NAME of a server that gives log-probabilities"
    range = (-inf, inf)
    reads_prompt = True

    def __post_init__(self) -> None:
        if len(set(map(_plain, self.levels))) < max(2, len(self.levels)):
            raise UsageError(f"unified: levels must be at least two different answers; got {self.levels}")
        if self.values is not None and len(self.values) != len(self.levels):
            raise UsageError(f"unified: {len(self.levels)} levels need as many values; got {len(self.values)}")
        if not (self.max_tokens >= 1 and self.parallel >= 1 and 0 < self.mass <= 1):
            raise UsageError("unified: max_tokens and parallel must be at least 1, and mass in (0, 1]")
        _ = self.worth

    @functools.cached_property
    def worth(self) -> dict[str, float]:
        """Value of each level."""
        try:
            values = self.values or tuple(map(float, self.levels))
        except ValueError as error:
            raise UsageError(f"unified: the levels {self.levels} are no numbers; give their values") from error
        return dict(zip(map(_plain, self.levels), values, strict=True))

    @functools.cached_property
    def server(self) -> Server:
        """Where requests go."""
        if not self.url or not self.model:
            raise UsageError(
                "the reward unified needs url=... and model=..., as in unified:url=http://localhost:8000/v1:model=judge"
            )
        key = os.environ.get(self.key_variable)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return Server(self.name, self.url, self.timeout, self.retries, headers)

    def load(self) -> "Unified":
        _ = self.server
        return self

    def scores(self, images: Tensor, prompts: list[str], **columns: list[Any]) -> Tensor:
        with ThreadPoolExecutor(self.parallel) as pool:
            return torch.tensor(list(pool.map(self.judged, png_texts(images), prompts)), dtype=torch.float64)

    def judged(self, png: str, prompt: str) -> float:
        """The expected value of one image, base64 of a PNG file.

        Raises:
            RewardError: if there is no answer, or none with enough probability on the levels.
        """
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png}"}},
            {"type": "text", "text": self.question.replace("{prompt}", prompt)},
        ]
        asked = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": _TOP,
        }
        return self.expected(self.server.ask("/chat/completions", json.dumps(asked).encode()))

    def expected(self, answer: Any) -> float:
        """The expected value in a chat completion with log-probabilities."""
        try:
            tokens = answer["choices"][0]["logprobs"]["content"]
            found = [(t["token"], {e["token"]: float(e["logprob"]) for e in t["top_logprobs"]}) for t in tokens]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise RewardError(
                f"unified: {self.url} gives no log-probabilities of its answer's tokens, but {str(answer)[:120]!r}"
            ) from error
        places = [top for token, top in found if _plain(token) in self.worth]
        top = places[-1] if places else found[0][1] if len(found) == 1 else {}
        shares = {token: math.exp(value) for token, value in top.items() if _plain(token) in self.worth}
        mass = sum(shares.values())
        if not mass >= self.mass:
            text = "".join(token for token, _ in found)
            raise RewardError(
                f"unified: the answer {text[-80:]!r} has probability {mass:.2g} on the levels {', '.join(self.levels)}, "
                f"less than mass={self.mass:g}"
            )
        return sum(share * self.worth[_plain(token)] for token, share in shares.items()) / mass


def _plain(token: str) -> str:
    return token.strip(" ▁Ġ\n").lower()
