"""A page that draws one prompt unguided and guided, side by side, and shows how the candidates were scored.

    python demo/app.py [--port 7860] [--model shapes] [--reward shapes-drm]

The page needs nothing from the network.  Needs the `demo` extra: pip install -c constraints.txt -e ".[demo]"
"""

import argparse
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from queue import SimpleQueue
from threading import Event, Lock, Thread, main_thread
from typing import Any

import gradio as gr
import numpy as np
import torch
from diffusers import DiffusionPipeline
from matplotlib.figure import Figure
from PIL import Image

from rsm_guidance import ODE, SAMPLERS, GuidedPipelineOutput, Unguided, make_sampler, resolve_reward
from rsm_guidance.evaluation.generate import Generation
from rsm_guidance.evaluation.report.traces import draw_trace
from rsm_guidance.io.config import read_setting
from rsm_guidance.io.names import model_name
from rsm_guidance.pipelines.load import load_pipeline
from rsm_guidance.samplers import Progress, Sampler
from rsm_guidance.shapes import parse_caption, verify

EXAMPLES = (  # one of each category of the grammar
    "a green triangle left of a red star",
    "two blue squares and a yellow star",
    "a blue square and a yellow triangle",
    "a circle with a star",
    "a photo of a purple cross",
    "a drawing of a triangle",
)
HEADERS = ("image", "reward", "verifier", "NFE", "seconds")
PREVIEW_EVERY = 2
CSS = ".picture img { width: 100%; height: 100%; object-fit: contain; }"
ABOUT = """# Guided sampling
One prompt, one seed, drawn twice: with the sampler you choose, and without guidance. *Reward* is the proxy reward that
guides, so a higher one alone proves little; the *verifier* is a gold reward that reads the finished picture by rule. It
speaks only for the embedded model and for captions like the examples. *NFE* is the number of denoiser evaluations."""


@dataclass(frozen=True)
class Preview:
    """Where a run stands; `image` is the decoded estimate of the guided image, or None."""

    status: str
    image: Image.Image | None = None


@dataclass(frozen=True)
class Outcome:
    """Two finished runs of the same prompt, seed and transition."""

    guided: GuidedPipelineOutput
    unguided: GuidedPipelineOutput


class Abandoned(Exception):
    """Nobody waits for this run any more."""


def build_sampler(name: str, candidates: int) -> Sampler:
    """The sampler of that name with its defaults, and as large as asked where it has a size."""
    size = SAMPLERS[name].budget_field if name in SAMPLERS else None
    return make_sampler(name, **({size: candidates} if size else {}))


@torch.no_grad()
def decode(pipe: DiffusionPipeline, latents: torch.Tensor) -> Image.Image | None:
    """A preview of clean latents [1, C, H, W]; None for pipelines whose latents are packed."""
    if latents.ndim != 4:
        return None
    config = pipe.vae.config
    latents = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
    decoded = pipe.vae.decode(latents.to(pipe.vae.dtype), return_dict=False)[0]
    image: Image.Image = pipe.image_processor.postprocess(decoded)[0]
    return image


def generate(
    pipe: DiffusionPipeline, call: dict[str, Any], sampler: Sampler, report: Callable[[Preview], None], stop: Event
) -> Outcome:
    """Both runs, in the calling thread; a pipeline call may not change threads, so previews are decoded here too."""

    def guided_step(event: Progress) -> None:
        unguided_step(event)
        if event.level % PREVIEW_EVERY == 0 or event.level == event.levels:
            best = "" if event.scores is None else f", best score of this step {event.scores.max():.2f}"
            report(Preview(f"{sampler.name}: step {event.level} of {event.levels}{best}", decode(pipe, event.x0)))

    def unguided_step(_: Progress) -> None:
        if stop.is_set() or not main_thread().is_alive():  # nobody listens, or Ctrl-C
            raise Abandoned

    guided = pipe(**call, sampler=sampler, on_step=guided_step)
    report(Preview("the same seed without guidance"))
    plain = Unguided(getattr(sampler, "transition", ODE()))
    return Outcome(guided, pipe(**call, sampler=plain, on_step=unguided_step))


def in_thread(work: Callable[[Callable[[Preview], None], Event], Outcome]) -> Iterator[Preview | Outcome]:
    """Run `work` in its own thread and yield what it reports, then its result; its exceptions are raised here."""
    events: SimpleQueue[Preview | Outcome | BaseException] = SimpleQueue()
    stop = Event()

    def run() -> None:
        try:
            events.put(work(events.put, stop))
        except BaseException as error:  # handed over to the reader
            events.put(error)

    Thread(target=run, daemon=False).start()  # a daemon killed inside torch would abort the process
    try:
        while True:
            event = events.get()
            if isinstance(event, BaseException):
                raise event
            yield event
            if isinstance(event, Outcome):
                return
    finally:
        stop.set()


def verdict(image: Image.Image, prompt: str) -> str:
    """What the verifier of the shapes world says; a dash for a prompt it cannot read."""
    try:
        parse_caption(prompt)
    except ValueError:
        return "–"
    found = verify(np.asarray(image.convert("RGB")), prompt)
    return f"{'correct' if found.correct else 'not correct'} ({found.score:.2f})"


def table(outcome: Outcome, prompt: str, verifiable: bool) -> list[list[str]]:
    """One row per image, under HEADERS."""
    rows = []
    for name, out in (("unguided", outcome.unguided), ("guided", outcome.guided)):
        reward = "–" if out.rewards is None else f"{out.rewards[0]:.3f}"
        checked = verdict(out.images[0], prompt) if verifiable else "–"
        rows.append([name, reward, checked, f"{out.ledger.evaluations:.1f}", f"{out.ledger.seconds:.2f}"])
    return rows


def trace_plot(trace: dict[str, Any]) -> Figure:
    """The run as a picture, or a note that it compared nothing."""
    try:
        return draw_trace(trace)
    except ValueError:
        figure = Figure(figsize=(7, 2), layout="constrained")
        figure.text(0.5, 0.5, "this run compared no candidates", ha="center", color="gray")
        return figure


def build_demo(model: str = "shapes", reward: str = "shapes-drm") -> gr.Blocks:
    """The page for a model (hub id, folder or "shapes") and a reward; a ValueError says what cannot be loaded."""
    embedded = model_name(model) == "shapes"
    pipe = load_pipeline(model)
    scorer = resolve_reward(reward, pipe)
    defaults = Generation.for_model(model)
    stock_steps = inspect.signature(type(pipe).__call__).parameters["num_inference_steps"].default
    busy = Lock()  # a pipeline serves one call at a time; an abandoned run may still be ending

    def handler(
        prompt: str, sampler: str, candidates: float, seed: float | None, steps: float, column: str
    ) -> Iterator[tuple]:
        if seed is None:
            raise gr.Error("the seed is empty; give a whole number", print_exception=False)
        if not prompt.strip():
            raise gr.Error("the prompt is empty; say what to draw", print_exception=False)
        try:
            columns = {name: [value] for name, value in map(read_setting, filter(str.strip, column.splitlines()))}
        except ValueError as error:
            raise gr.Error(f"in what the reward reads besides: {error}", print_exception=False) from error

        def work(report: Callable[[Preview], None], stop: Event) -> Outcome:
            call = replace(defaults, steps=int(steps)).call()
            call |= {"prompt": prompt, "reward": scorer, "seed": int(seed), "reward_columns": columns}
            with busy:
                return generate(pipe, call, build_sampler(sampler, int(candidates)), report, stop)

        yield None, None, f"{sampler}: starting", None, None
        try:
            for event in in_thread(work):
                if isinstance(event, Preview):
                    image = gr.skip() if event.image is None else event.image
                    yield gr.skip(), image, event.status, gr.skip(), gr.skip()
                else:
                    rows = table(event, prompt, embedded)
                    status = f"Done: {sampler}, seed {int(seed)}, {int(steps)} steps."
                    images = event.unguided.images[0], event.guided.images[0]
                    yield *images, status, rows, trace_plot(event.guided.trace)
        except ValueError as error:
            yield None, None, "Nothing was drawn.", None, None
            raise gr.Error(str(error), print_exception=False) from error

    with gr.Blocks(title="rsm-guidance", analytics_enabled=False) as demo:
        gr.Markdown(ABOUT)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                prompt = gr.Textbox(EXAMPLES[0], label="Prompt", lines=2, max_length=1000)
                gr.Examples([[text] for text in EXAMPLES], [prompt])
                names, hint = list(SAMPLERS), "The preview of best-of-n is its first."
                sampler = gr.Dropdown(names, value="stepwise", label="Sampler", info=hint)
                candidates = gr.Slider(
                    1, 16, value=4, step=1, label="K", info="Candidates, particles, simulations or rounds."
                )
                seed = gr.Number(0, label="Seed", precision=0)
                steps = gr.Slider(1, 100, value=defaults.steps or stock_steps, step=1, label="Steps")
                column = gr.Textbox(
                    "",
                    label="Read by the reward besides",
                    info=f"A line NAME=VALUE for each column ({', '.join(scorer.requires)}).",
                    lines=2,
                    max_length=10_000,
                    visible=bool(scorer.requires),
                )
                button = gr.Button("Generate", variant="primary")
            with gr.Column(scale=5):
                with gr.Row():
                    picture: dict[str, Any] = {"format": "png", "height": 320, "elem_classes": "picture"}
                    picture |= {"interactive": False, "buttons": ["download", "fullscreen"]}
                    unguided = gr.Image(label="Unguided", **picture)
                    guided = gr.Image(label="Guided", **picture)
                status = gr.Markdown("Press Generate.")
                results = gr.Dataframe(headers=list(HEADERS), interactive=False, label="Reward and cost")
                gr.Markdown("A value model's calls count by their share of the denoiser. Seconds include the previews.")
                plot = gr.Plot(label="What was tried", show_label=False)
                gr.Markdown("Scores compare the candidates of one step; from step to step they need not be comparable.")
        inputs, outputs = [prompt, sampler, candidates, seed, steps, column], [unguided, guided, status, results, plot]
        button.click(handler, inputs, outputs, api_name="generate", concurrency_limit=1, show_progress_on=status)
    return demo.queue(max_size=8)


def main() -> None:
    """Serve the page until Ctrl-C."""
    parser = argparse.ArgumentParser(description="Draw a prompt unguided and guided, side by side, in the browser.")
    parser.add_argument("--port", type=int, help="port on 127.0.0.1; default: the first free one from 7860")
    parser.add_argument(
        "--model", default="shapes", help="hub id or folder of a diffusers pipeline; shapes is the embedded one"
    )
    parser.add_argument("--reward", default="shapes-drm", help="name, folder or hub id, or package.module:object")
    options = parser.parse_args()
    try:
        demo = build_demo(options.model, options.reward)
        demo.launch(server_name="127.0.0.1", server_port=options.port, css=CSS, ssr_mode=False, share=False)
    except (ValueError, OSError) as error:  # nothing to load; no free port
        parser.error(str(error))


if __name__ == "__main__":
    main()
