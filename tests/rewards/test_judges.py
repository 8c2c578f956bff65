"""Vision-language models as rewards: probabilities and expectations by hand, and answers that cannot be read."""

import base64
import io
import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from rsm_guidance.core.errors import UsageError
from rsm_guidance.rewards import RewardError, resolve_reward
from tests.rewards.layouts import PROMPTS, pictures, tensor_of

TEMPLATE = (
    "{% for m in messages %}USER : {% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% else %}"
    "{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}ASSISTANT :"
)


def write_llava(folder: Path, template: str | None = TEMPLATE, words: str = "yes Yes no No") -> Any:
    """A tiny image-text-to-text model, as `save_pretrained` writes it."""
    vocabulary = ["<unk>", "<pad>", "<image>", *words.split(), *"USER ASSISTANT : a red star blue show image ?".split()]
    tokens = Tokenizer(WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    tokens.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, unk_token="<unk>", pad_token="<pad>", additional_special_tokens=["<image>"]
    )
    prepare = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(
        prepare, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template, image_token="<image>",
    )  # fmt: skip
    shared = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=16, patch_size=8, projection_dim=16, **shared),
        text_config=LlamaConfig(vocab_size=len(vocabulary), num_key_value_heads=2, **shared),
        image_token_index=vocabulary.index("<image>"),
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_vqa_is_the_probability_of_yes(tmp_path: Path, template: str | None) -> None:
    model, processor = write_llava(tmp_path, template)
    images = pictures(24, 24)
    reward = resolve_reward(f"vqa:model={tmp_path}")
    found = reward(tensor_of(images), PROMPTS)
    yes = processor.tokenizer.convert_tokens_to_ids(["yes", "Yes"])
    for image, prompt, score in zip(images, PROMPTS, found, strict=True):
        question = f'Does this image show "{prompt}"? Please answer yes or no.'
        text = f"USER : <image> {question} ASSISTANT :" if template else f"<image>\n{question}"
        with torch.no_grad():
            logits = model(**processor(images=image, text=text, return_tensors="pt")).logits[0, -1]
        assert float(score) == pytest.approx(float(logits.softmax(-1)[yes].sum()), abs=1e-5)
    assert found.std() > 1e-4 and not found.requires_grad and ((found >= 0) & (found <= 1)).all()


def test_vqa_asks_any_question_and_refuses_models_without_the_answer(tmp_path: Path) -> None:
    write_llava(tmp_path)
    images = tensor_of(pictures(24, 24))
    plain = resolve_reward(f"vqa:model={tmp_path}")(images, PROMPTS)
    asked = resolve_reward(f"vqa:model={tmp_path}:question='a {{prompt}} ?':answer=red")
    assert not torch.allclose(asked(images, PROMPTS), plain)
    with pytest.raises(UsageError, match="no token of its own for 'perhaps'"):
        resolve_reward(f"vqa:model={tmp_path}:answer=perhaps")
    with pytest.raises(UsageError, match="cannot load '/nowhere/x'"):
        resolve_reward("vqa:model=/nowhere/x")


# --- an OpenAI-compatible server ---


def completion(*tokens: dict[str, float]) -> dict[str, Any]:
    """A chat completion with the probabilities of each token's alternatives, most likely first."""
    content = []
    for alternatives in tokens:
        top = [{"token": t, "logprob": math.log(p), "bytes": None} for t, p in alternatives.items()]
        content.append({**top[0], "top_logprobs": top})
    text = "".join(t["token"] for t in content)
    return {"choices": [{"message": {"role": "assistant", "content": text}, "logprobs": {"content": content}}]}


@contextmanager
def judging(judge: Callable[[dict[str, Any], dict[str, str]], Any]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/chat/completions"
            answer = json.dumps(judge(body, dict(self.headers))).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"unified:url=http://127.0.0.1:{server.server_port}/v1:model=judge"
        server.shutdown()


def test_unified_is_the_expectation_over_the_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "of-the-test")
    images = pictures(20, 30)
    seen: list[str] = []

    def judge(body: dict[str, Any], headers: dict[str, str]) -> Any:
        assert body["logprobs"] and body["top_logprobs"] == 20 and body["temperature"] == 0 and body["model"] == "judge"
        assert headers["Authorization"] == "Bearer of-the-test"
        picture, question = body["messages"][0]["content"]
        data = base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/png;base64,"))
        index = [i.tobytes() for i in images].index(Image.open(io.BytesIO(data)).tobytes())
        assert f'"{PROMPTS[index]}"' in question["text"]
        seen.append(question["text"])
        return completion(
            [{"5": 0.5, "4": 0.3, " 4": 0.1, "good": 0.1}, {"1": 1.0}, {" 3": 0.6, "2": 0.2, "x": 0.2}][index]
        )

    with judging(judge) as spec:
        found = resolve_reward(spec)(tensor_of(images), PROMPTS)
    assert found.tolist() == pytest.approx([(2.5 + 1.6) / 0.9, 1.0, (1.8 + 0.4) / 0.8]) and len(seen) == 3


def test_unified_reads_the_last_level_of_a_longer_answer_and_levels_with_values() -> None:
    long = completion({"Rating": 0.9}, {":": 1.0}, {"2": 0.6, "4": 0.4}, {" of": 1.0}, {"5": 0.9, "4": 0.1})
    images = tensor_of(pictures(8, 8, 1))
    with judging(lambda *_: long) as spec:
        assert resolve_reward(f"{spec}:max_tokens=9")(images, ["a"]).tolist() == pytest.approx([4.9])
    with judging(lambda *_: completion({"Good": 0.6, "bad": 0.2, "so": 0.2})) as spec:
        words = f"{spec}:levels=[good, bad]:values=[1.0, -1.0]"
        assert resolve_reward(words)(images, ["a"]).tolist() == pytest.approx([0.5])


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (completion({"I": 0.9, "5": 0.1}), "'I' has probability 0.1 on the levels"),
        (completion({"I": 1.0}, {" cannot": 1.0}), "'I cannot' has probability 0 "),
        ({"choices": [{"message": {"content": "5"}, "logprobs": None}]}, "gives no log-probabilities"),
        ({"choices": []}, "gives no log-probabilities"),
        ([1, 2], "gives no log-probabilities"),
        (completion(), "has probability 0 "),
    ],
)
def test_answers_without_a_level_are_errors_and_no_scores(answer: Any, words: str) -> None:
    with judging(lambda *_: answer) as spec, pytest.raises(RewardError, match=words):
        resolve_reward(spec)(tensor_of(pictures(8, 8, 1)), ["a"])


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("unified", "needs url=... and model="),
        ("unified:url=http://x/v1:model=m:levels=[a, b]", "give their values"),
        ("unified:url=http://x/v1:model=m:levels=[a, A]:values=[1.0, 2.0]", "two different"),
        ("unified:url=http://x/v1:model=m:values=[1.0]", "as many values"),
        ("unified:url=http://x/v1:model=m:mass=0", "mass in"),
    ],
)
def test_bad_options_are_refused(spec: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        resolve_reward(spec)
