"""`RewardGuidedPipeline` picks the right class, or says why there is none."""

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline

import rsm_guidance as rg
from rsm_guidance.evaluation.generate import load_pipeline
from rsm_guidance.pipelines.auto import stock_class
from tests.zoo import ZOO

CALL = {"prompt": "a red star", "num_inference_steps": 3, "output_type": "np"}


def index(folder: Path, **entries: object) -> str:
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps(entries))
    return str(folder)


def test_a_saved_pipeline_comes_back_as_its_reward_guided_class(stock: StableDiffusion3Pipeline) -> None:
    pipe = rg.RewardGuidedPipeline.from_pretrained(rg.shapes.model_path(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is rg.RewardGuidedStableDiffusion3Pipeline
    assert type(pipe) is type(load_pipeline(rg.shapes.model_path())), "the commands load the same class"
    reference = stock(**CALL, generator=torch.Generator().manual_seed(0)).images
    assert np.array_equal(pipe(**CALL, generator=torch.Generator().manual_seed(0), sampler="none").images, reference)
    half = rg.RewardGuidedPipeline.from_pretrained(Path(rg.shapes.model_path()), torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


def test_what_was_saved_without_a_component_loads_without_it(tmp_path: Path) -> None:
    parts = ZOO["sd3"].build().components | {"text_encoder_3": None, "tokenizer_3": None}
    stock = StableDiffusion3Pipeline(**parts)
    stock.save_pretrained(tmp_path)
    pipe = rg.RewardGuidedPipeline.from_pretrained(tmp_path)
    call = ZOO["sd3"].call() | {"generator": torch.Generator().manual_seed(0), "output_type": "np"}
    assert pipe.text_encoder_3 is None and np.isfinite(pipe(**call, sampler="none").images).all()
    again = rg.RewardGuidedPipeline.from_pretrained(tmp_path, tokenizer_3=ZOO["sd3"].build().tokenizer_3)
    assert again.tokenizer_3 is not None, "what is given counts"


@pytest.mark.parametrize("name", [n for n in ZOO if n != "qwenimage_edit"])  # whose stand-in processor is not saved
def test_every_family_by_its_configuration(name: str, tmp_path: Path) -> None:
    pipe = ZOO[name].build()
    pipe.save_config(tmp_path)
    base, config = stock_class(tmp_path)
    assert base is type(pipe) and config["scheduler"][1] == type(pipe.scheduler).__name__


@pytest.mark.parametrize("name", list(ZOO))
def test_from_pipe_shares_modules_and_dtype(name: str) -> None:
    pipe = ZOO[name].build().to(torch.bfloat16)
    guided = rg.RewardGuidedPipeline.from_pipe(pipe)
    assert type(guided) is rg.reward_guided(type(pipe)) and guided.dtype == torch.bfloat16
    assert all(getattr(guided, k) is v for k, v in pipe.components.items() if isinstance(v, torch.nn.Module))


def test_from_pipe_of_guided_pipelines_and_of_subclasses() -> None:
    guided = rg.RewardGuidedPipeline.from_pipe(ZOO["sd15"].build())
    assert type(rg.RewardGuidedPipeline.from_pipe(guided)) is type(guided), "not guided twice"

    class Mine(diffusers.StableDiffusionPipeline):
        """A class that diffusers does not export."""

    mine = Mine(**ZOO["sd15"].build().components, requires_safety_checker=False)
    assert issubclass(type(rg.RewardGuidedPipeline.from_pipe(mine)), Mine)


def test_arguments_of_from_pipe_are_the_stock_ones() -> None:
    pipe = ZOO["sd15"].build()
    scheduler = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    assert rg.RewardGuidedPipeline.from_pipe(pipe, scheduler=scheduler).scheduler is scheduler
    assert rg.RewardGuidedPipeline.from_pipe(pipe, dtype=torch.float16).dtype == torch.float16


def test_it_has_no_instances() -> None:
    with pytest.raises(OSError, match=r"from_pretrained\(model\) or RewardGuidedPipeline.from_pipe\(pipe\)"):
        rg.RewardGuidedPipeline(**ZOO["sd15"].build().components)


def test_what_cannot_be_guided_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    load = rg.RewardGuidedPipeline.from_pretrained
    with pytest.raises(ValueError, match="MyOwnPipeline, which diffusers .* does not export.*from_pipe"):
        load(index(tmp_path / "own", _class_name="MyOwnPipeline"))
    with pytest.raises(ValueError, match="AutoencoderKL, which diffusers .* does not export"):  # exported, no pipeline
        load(index(tmp_path / "vae", _class_name="AutoencoderKL"))
    with pytest.raises(ValueError, match="MyOwnPipeline, which"):  # as saved by a class in a file of the folder
        load(index(tmp_path / "file", _class_name=["pipeline", "MyOwnPipeline"]))
    with pytest.raises(ValueError, match="StableCascadeCombinedPipeline, which cannot be guided: .*no denoising loop"):
        load(index(tmp_path / "cascade", _class_name="StableCascadeCombinedPipeline"))
    with pytest.raises(ValueError, match="no such folder, and it is no hub id"):
        load(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    for folder in (str(tmp_path / "empty"), index(tmp_path / "nameless")):
        with pytest.raises(ValueError, match="cannot load a pipeline from .*none of diffusers"):
            load(folder)
    with pytest.raises(ValueError, match="leave custom_pipeline out"):
        load(rg.shapes.model_path(), custom_pipeline=rg.custom_pipeline("stable_diffusion_3"))
    for wrong in (ZOO["sd15"].build().unet, None):
        with pytest.raises(ValueError, match="a diffusers pipeline is needed, not"):
            rg.RewardGuidedPipeline.from_pipe(wrong)
    cascade = diffusers.StableCascadeCombinedPipeline
    with pytest.raises(ValueError, match="StableCascadeCombinedPipeline cannot be guided"):
        rg.RewardGuidedPipeline.from_pipe(cascade.__new__(cascade))


def test_where_to_look_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}

    def load_config(model: str, **where: object) -> dict[str, object]:
        seen.update(where, model=model)
        return {"_class_name": "StableDiffusion3Pipeline"}

    def from_pretrained(model: str, **kwargs: object) -> str:
        return f"loaded {model} at {kwargs['revision']} in {kwargs['dtype']}"

    monkeypatch.setattr(DiffusionPipeline, "load_config", load_config)
    monkeypatch.setattr(rg.RewardGuidedStableDiffusion3Pipeline, "from_pretrained", from_pretrained)
    loaded = rg.RewardGuidedPipeline.from_pretrained("org/name", revision="v2", token="t", dtype=torch.float16)
    assert loaded == "loaded org/name at v2 in torch.float16"
    assert seen == {"model": "org/name", "revision": "v2", "token": "t"}
