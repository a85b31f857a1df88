"""Components as people have them: variants, shards, null entries, and what an interrupted download left out."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import liftkit
from liftkit.checkpoint.components import read_component
from liftkit.checkpoint.model import find_model
from liftkit.checkpoint.weights import read_weights
from liftkit.conversion.audit import audit
from liftkit.conversion.plan import make_plan
from liftkit.embedded import TINY_KLEIN, TINY_PIXEL
from liftkit.errors import UsageError
from liftkit.models import load
from liftkit.models.loaded import load_pipeline
from liftkit.models.sampling import sample
from liftkit.options import ConvertOptions, SampleOptions
from tests import tiny

WORDS = [
    "<|startoftext|>",
    "<|endoftext|>",
    "a</w>",
    "red</w>",
    "seven</w>",
    *"ardsevn",
    *(f"{c}</w>" for c in "ardsevn"),
]


def clip_side(folder: Path, number: str, width: int) -> None:
    """A CLIP text encoder and a tokenizer of vocab.json and merges.txt, as they lie in SD3's folders."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(WORDS), hidden_size=width, intermediate_size=16, projection_dim=width, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=77, eos_token_id=1, bos_token_id=0,
    )  # fmt: skip
    CLIPTextModelWithProjection(config).save_pretrained(folder / f"text_encoder{number}")
    tokenizer = folder / f"tokenizer{number}"
    tokenizer.mkdir()
    (tokenizer / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(WORDS)}))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")
    (tokenizer / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "unk_token": "<|endoftext|>"})
    )


@pytest.fixture(scope="module")
def sd3_without_t5(model_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SD3 with two CLIP encoders and a null T5; not to be changed."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sd3") / "model"
    shutil.copytree(model_folders["sd3"], folder)
    index = json.loads((folder / "model_index.json").read_text())
    for number in ("", "_2"):
        clip_side(folder, number, 8)
        index[f"text_encoder{number}"] = ["transformers", "CLIPTextModelWithProjection"]
        index[f"tokenizer{number}"] = ["transformers", "CLIPTokenizer"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def klein(tmp_path: Path) -> Path:
    """The embedded model, to be changed."""
    return Path(shutil.copytree(TINY_KLEIN, tmp_path / "klein"))


def to_variant(folder: Path, component: str, shards: bool = False, keep: bool = False) -> None:
    """Give the weights of a component the names of an fp16 variant, in two shards where asked for."""
    from safetensors.torch import load_file, save_file

    single = next((folder / component).glob("*.safetensors"))
    stem, tensors = single.name.removesuffix(".safetensors"), load_file(single)
    if not keep:
        single.unlink()
    if not shards:
        save_file(tensors, folder / component / f"{stem}.fp16.safetensors", {"format": "pt"})
        return
    names = sorted(tensors)
    where = {name: f"{stem}.fp16-0000{1 + place % 2}-of-00002.safetensors" for place, name in enumerate(names)}
    for shard in set(where.values()):
        part = {name: tensors[name] for name in names if where[name] == shard}
        save_file(part, folder / component / shard, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / component / f"{stem}.safetensors.index.fp16.json").write_text(json.dumps(index))


def convert(folder: Path, output: Path, **more: Any) -> Path:
    if (folder / "tokenizer" / "chat_template.jinja").is_file():
        more["lift"] = TINY_PIXEL / "lift.safetensors"
    liftkit.convert(str(folder), output, images="demo", num_images=8, device="cpu", proof="projections", **more)
    return output


def is_plain(folder: Path) -> bool:
    return not [path for path in folder.rglob("*") if "fp16" in path.name]


@pytest.mark.parametrize(
    "variants",
    [
        {"text_encoder": {}},
        {"vae": {}, "text_encoder": {"shards": True}},
        {"transformer": {"shards": True}, "vae": {"shards": True}, "text_encoder": {"shards": True}},
        {"vae": {"keep": True}, "transformer": {}},
    ],
)
def test_variants_of_any_components_load_before_and_after(
    variants: dict[str, dict[str, bool]], klein: Path, tmp_path: Path
) -> None:
    from diffusers import DiffusionPipeline

    for component, how in variants.items():
        to_variant(klein, component, **how)
    stock = load.load_pipeline(find_model(str(klein)), torch.float32)
    output = convert(klein, tmp_path / "out")
    assert is_plain(output)
    found = DiffusionPipeline.from_pretrained(output)
    for name in ("text_encoder",):
        want, have = getattr(stock, name).state_dict(), getattr(found, name).state_dict()
        assert want.keys() == have.keys()
        assert all(torch.equal(have[key], value) for key, value in want.items())
    assert load.load_latent_vae(find_model(str(output))).state_dict().keys() == stock.vae.state_dict().keys()
    assert audit(output, str(klein)).ok


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("klein.safetensors", "rename it to diffusion_pytorch_model.safetensors"),
        ("diffusion_pytorch_model-00001-of-00002.safetensors", "fetch the model again"),
        ("klein-Q4.gguf", "klein-Q4.gguf is unfinished or of another format"),
        ("diffusion_pytorch_model.safetensors.incomplete", "is unfinished or of another format"),
    ],
)
def test_weights_under_another_name_are_named(name: str, said: str, klein: Path, tmp_path: Path) -> None:
    shutil.copytree(klein, tmp_path / "model")
    weights = tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name(name))
    with pytest.raises(UsageError, match=re.escape(said)):
        read_weights(weights.parent)


def test_integers_in_the_place_of_weights_are_refused(klein: Path, tmp_path: Path) -> None:
    shutil.copytree(klein / "transformer", tmp_path / "transformer")
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    save_file({**state, "context_embedder.weight": state["context_embedder.weight"].int()}, file)
    with pytest.raises(UsageError, match=r"integers \(I32\), such as tensor 'context_embedder.weight'"):
        read_weights(file.parent)


def test_another_variant_beside_the_plain_weights_stays_behind_and_is_named(klein: Path, tmp_path: Path) -> None:
    to_variant(klein, "text_encoder", keep=True)
    (klein / "text_encoder" / "pytorch_model.bin").write_bytes(b"PK")
    plan = make_plan(str(klein), tmp_path / "out", ConvertOptions(images="demo", device="cpu"))
    assert plan.left_out.to_json()["left_out"] == [
        {"reason": "weights of another variant", "count": 1, "examples": ["text_encoder/model.fp16.safetensors"]},
        {"reason": "pickles", "count": 1, "examples": ["text_encoder/pytorch_model.bin"]},
    ]
    assert "text_encoder/model.safetensors" in plan.copied_files


def test_sd3_without_t5_converts_samples_and_says_how_it_loads(sd3_without_t5: Path, tmp_path: Path) -> None:
    plan = make_plan(str(sd3_without_t5), tmp_path / "out", ConvertOptions(images="demo", device="cpu"))
    assert len(plan.limits) == 1
    assert "text_encoder_3=None" in plan.limits[0]
    assert "tokenizer_3=None" in plan.limits[0]
    output = convert(sd3_without_t5, tmp_path / "out")
    images = sample(
        load_pipeline(find_model(str(output))), ["a red seven"], SampleOptions(steps=1, height=16, width=16)
    )
    assert images.shape == (1, 3, 16, 16)
    assert audit(output).ok


def test_a_model_without_what_prompts_need_converts_and_the_plan_says_what_it_cannot(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    plan = make_plan(str(model_folders["sd3"]), tmp_path / "out", ConvertOptions(images="demo", device="cpu"))
    assert plan.limits[0].startswith("it cannot be sampled, finetuned or compared: text_encoder and tokenizer")
    with pytest.raises(UsageError, match="no text_encoder and tokenizer"):
        load_pipeline(find_model(str(model_folders["sd3"])))


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def without_a_shard(component: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        to_variant(folder, component, shards=True)
        next((folder / component).glob("*-00002-of-00002.safetensors")).unlink()

    return change


def without_an_index(folder: Path) -> None:
    to_variant(folder, "text_encoder", shards=True)
    (folder / "text_encoder" / "model.safetensors.index.fp16.json").unlink()


def half_of_the_tensors(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    save_file({name: tensors[name] for name in sorted(tensors)[::2]}, path, {"format": "pt"})


def half_a_vocabulary(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "tokenizer" / "vocab.json").write_text('{"a": 0}')


def quantized(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "text_encoder" / "model.safetensors"
    save_file(load_file(path) | {"lm_head.weight_scale": torch.ones(1)}, path, {"format": "pt"})


def float8(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({k: v.to(torch.float8_e4m3fn) for k, v in load_file(path).items()}, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (remove("text_encoder/model.safetensors"), "text_encoder: model.safetensors is missing"),
        (remove("text_encoder/config.json"), "text_encoder/config.json: cannot be read"),
        (
            without_a_shard("text_encoder"),
            "text_encoder/model.fp16-00002-of-00002.safetensors: missing, 1 of the 2 shards",
        ),
        (without_a_shard("vae"), "vae/diffusion_pytorch_model.fp16-00002-of-00002.safetensors: missing"),
        (without_an_index, "neither model.safetensors nor an index"),
        (half_of_the_tensors, "tensors of the Qwen3ForCausalLM are missing, such as"),
        (remove("tokenizer/tokenizer.json"), "tokenizer: no vocabulary"),
        (half_a_vocabulary, "vocab.json alone does not do"),
        (write("tokenizer/tokenizer.json", ""), "tokenizer.json: no valid JSON"),
        (
            write("tokenizer/tokenizer.json", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
            "git lfs pull",
        ),
        (
            write("text_encoder/config.json", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
            "git lfs pull",
        ),
        (write("tokenizer/tokenizer.json", "{}"), "tokenizer.json: it holds no vocabulary"),
        (write("tokenizer/tokenizer.json", "version https://git-lfs.github.com/spec/v1\n"), "tokenizer.json"),
        (remove("scheduler/scheduler_config.json"), "scheduler_config.json"),
        (quantized, "quantized"),
        (float8, "quantized"),
    ],
)
def test_what_is_incomplete_is_named_before_anything_is_written(
    change: Callable[[Path], None], said: str, klein: Path, tmp_path: Path
) -> None:
    change(klein)
    with pytest.raises(UsageError) as caught:
        make_plan(str(klein), tmp_path / "out", ConvertOptions(images="demo", device="cpu"))
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [remove("tokenizer/tokenizer.json"), half_of_the_tensors])
def test_sampling_and_verifying_look_at_the_same(change: Callable[[Path], None], klein: Path, tmp_path: Path) -> None:
    output = convert(klein, tmp_path / "out")
    change(output)
    with pytest.raises(UsageError):
        load_pipeline(find_model(str(output)))
    checks = {check.name: check for check in audit(output).checks}
    assert checks["components"].problems


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    from transformers import T5Config, T5EncoderModel

    folder = tmp_path / "model"
    tiny.save(tiny.flux2_pipeline(), folder)
    T5EncoderModel(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).save_pretrained(
        folder / "text_encoder"
    )
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "text_encoder": ["transformers", "T5EncoderModel"]}))
    part = read_component(find_model(str(folder)), "text_encoder")
    assert part.weights is not None
    assert "encoder.embed_tokens.weight" not in part.weights.where
    assert load.load_component(find_model(str(folder)), "text_encoder").shared.weight.shape == (8, 8)


def test_an_adapter_merged_into_a_variant_leaves_plain_names(klein: Path, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    from liftkit.formats.adapters import fuse
    from tests.adapters import random_adapter

    to_variant(klein, "transformer", shards=True)
    to_variant(klein, "text_encoder", shards=True)
    random_adapter(klein).save(tmp_path / "adapter", "# card\n")
    output = fuse(tmp_path / "adapter", str(klein), tmp_path / "out").output
    assert is_plain(output)
    assert DiffusionPipeline.from_pretrained(output).transformer is not None


@pytest.mark.parametrize("mark", [b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff"])
@pytest.mark.parametrize(
    "name",
    ["model_index.json", "vae/config.json", "tokenizer/tokenizer_config.json", "scheduler/scheduler_config.json"],
)
def test_a_byte_order_mark_that_libraries_do_not_read_is_named(name: str, mark: bytes, klein: Path) -> None:
    text = (klein / name).read_text()
    encoding = {b"\xef": "utf-8", b"\xff": "utf-16-le", b"\xfe": "utf-16-be"}[mark[:1]]
    (klein / name).write_bytes(mark + text.encode(encoding))
    with pytest.raises(UsageError, match=f"{name}: begins with a byte-order mark"):
        load_pipeline(find_model(str(klein)))


def test_tokens_that_the_text_encoder_has_no_embedding_of_are_named(klein: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights, config = klein / "text_encoder" / "model.safetensors", klein / "text_encoder" / "config.json"
    tensors = load_file(weights)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:20].clone()
    save_file(tensors, weights, {"format": "pt"})
    config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": 20}))
    with pytest.raises(UsageError, match="embeddings of 20 tokens, and its tokenizer gives number"):
        sample(load_pipeline(find_model(str(klein))), ["a red seven"], SampleOptions(steps=1))


@pytest.mark.parametrize(
    ("component", "key", "value"),
    [
        ("transformer", "pos_embed_max_size", 10**6),
        ("transformer", "sample_size", 10**6),
        ("transformer", "num_layers", 10**9),
        ("transformer", "axes_lens", [10**9, 512]),
        ("transformer", "some_width", 10**30),
        ("vae", "num_blocks", [1, 10**7]),
        ("text_encoder", "max_position_embeddings", 10**12),
    ],
)
def test_numbers_of_a_config_that_allocate_have_an_end(component: str, key: str, value: Any, klein: Path) -> None:
    config = klein / component / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), key: value}))
    with pytest.raises(UsageError, match=f"config.json: {key} is "):
        load_pipeline(find_model(str(klein)))


def test_a_fault_of_our_own_while_loading_is_not_blamed_on_the_files(
    klein: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "_check_complete", FunctionType((lambda part, found: {}["a fault"]).__code__, vars(load)))
    with pytest.raises(KeyError):
        load_pipeline(find_model(str(klein)))
