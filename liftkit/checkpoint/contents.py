"""What a safetensors file holds, by the names and dtypes in its header alone: changes of weights, or quantized weights.

Trainers write the change of a module as several tensors whose names end alike: ``<module>.lora_A.weight``,
``<module>.lokr_w1``, ``<module>.alpha``. :func:`part_of` knows those ends. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from liftkit.checkpoint.header import TensorEntry, shown

A, B, B_BIAS, MAGNITUDE, ALPHA = "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector", "alpha"
"""Parts of a module's change under peft's names, whatever the file calls them."""
DIFF, DIFF_B = "diff", "diff_b"

# Kind of change; part, or None for the kind's own end of the name; and how such a name ends.
_ENDS: tuple[tuple[str, str | None, str], ...] = (
    (
        "LoRA",
        A,
        r"\.lora_(?:A|down)(?:\.[\w-]+)?\.weight|(?:\.lora(?:_linear_layer)?|(?<=_lora)|(?<=_lora[12]))\.down\.weight",
    ),
    (
        "LoRA",
        B,
        r"\.lora_(?:B|up)(?:\.[\w-]+)?\.weight|(?:\.lora(?:_linear_layer)?|(?<=_lora)|(?<=_lora[12]))\.up\.weight",
    ),
    ("LoRA", B_BIAS, r"\.lora_(?:B|up)(?:\.[\w-]+)?\.bias"),
    ("DoRA", MAGNITUDE, r"\.dora_scale|\.lora_magnitude_vector(?:\.[\w-]+){0,2}"),
    ("alpha", ALPHA, r"\.(?:lora_|lora\.)?alpha"),
    ("LoHa", None, r"\.hada_w[12]_[ab]"),
    ("LoKr", None, r"\.lokr_w[12](?:_[ab])?"),
    ("difference", DIFF, r"\.diff"),
    ("difference", DIFF_B, r"\.diff_b"),
    ("Tucker decomposition", None, r"\.lora_mid\.weight|\.(?:hada|lokr)_t[12]?"),
    ("OFT", None, r"\.b?oft_\w+(?:\.[\w-]+){0,2}"),
    ("IA3", None, r"\.ia3_l(?:\.[\w-]+)?|\.on_input"),
    ("GLoRA", None, r"\.[ab][12]\.weight"),
    ("VeRA", None, r"\.vera_lambda_[bd](?:\.[\w-]+)?"),
    ("AdaLoRA", None, r"\.lora_[ABE]|\.ranknum"),
    ("difference of a norm", None, r"\.[wb]_norm"),
    ("whole weights", None, r"\.(?:set|reshape)_weight"),
)
_END = re.compile("(?:" + "|".join(f"(?P<end{number}>{end})" for number, (_, _, end) in enumerate(_ENDS)) + r")\Z")
FOLDED = ("LoRA", "DoRA", "alpha", "LoHa", "LoKr", "difference")
"""Kinds of change that a LoRA can hold exactly."""

_QUANTIZED: tuple[tuple[str, str], ...] = (
    ("SVDQuant", r"\.(?:wscales|wcscales|wtscale|smooth_factor(?:_orig)?)"),
    ("GPTQ or AWQ", r"\.(?:qweight|qzeros|g_idx)"),
    ("bitsandbytes 4 bits (nf4, fp4)", r"\.(?:nested_)?(?:absmax|quant_map)|\.quant_state\..*"),
    ("bitsandbytes 8 bits", r"\.(?:SCB|weight_format)"),
    ("quanto or HQQ", r"\.weight\._(?:data|scale|shift)|\.W_q"),
    ("nvfp4", r"\.weight_scale_2"),
    ("scaled by ComfyUI", r"\.comfy_quant"),
    ("scaled 8 bits", r"(?:.*\.)?(?:scale_weight|weight_scale(?:_inv)?|scale_input|input_scale|scaled_fp8)"),
)
_PLAIN_INTEGERS = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")

# What a file may hold in place of a transformer, by names of tensors: most of a VAE's or a text encoder's are such, and some of
# a network's that steers a transformer, whose other names are the transformer's own.
_NO_TRANSFORMER: tuple[tuple[str, float, re.Pattern[str]], ...] = (
    ("a VAE", 0.5, re.compile(
        r"(?:encoder|decoder)\.(?:conv_(?:in|out|norm_out)|norm_out|(?:down|up)(?:_blocks|samples)?\.\d|mid(?:_block|dle)?\.|"
        r"conv1|head|layers\.\d+\.(?:conv|\d|weight|bias)|\d+\.)|(?:post_)?quant_conv\.|taesd_(?:en|de)coder\.|conv[12]\.")),
    ("a text encoder", 0.5, re.compile(
        r"(?:text_model|language_model|vision_model|visual|vision_tower|embed_tokens|lm_head|shared|logit_scale|"
        r"text_projection|multi_modal_projector|token_embedding|positional_embedding|ln_final)\b|"
        r"(?:en|de)coder\.(?:block|embed_tokens|final_layer_norm)\b|resblocks\.\d|"
        r"layers\.\d+\.(?:self_attn|mlp|input_layernorm|post_attention_layernorm)\.|norm\.weight\Z")),
    ("a ControlNet", 0.0, re.compile(
        r"controlnet_|control_(?:model\.|layers|noise_refiner|all_x_embedder)|input_hint_block|zero_convs|pos_embed_input\.|"
        r"vace_")),
    ("an IP-Adapter", 0.0, re.compile(r"(?:image_proj(?:_model)?|ip_adapter)\.")),
)  # fmt: skip
_WRAPPER = re.compile(r"(?:model\.diffusion_model|diffusion_model|transformer|model)\.")


@dataclass(frozen=True)
class Part:
    """One tensor of a module's change.

    Args:
        stem: what the file calls the module.
        kind: of change, such as ``LoRA`` or ``LoKr``.
        name: of the part: one of :data:`A` to :data:`DIFF_B`, or LyCORIS' own name.
    """

    stem: str
    kind: str
    name: str


def part_of(key: str) -> Part | None:
    """What a tensor is in a module's change, by its name; None if the name is that of no such part."""
    match = _END.search(key)
    if match is None or not match.start():
        return None
    kind, name, _ = _ENDS[int(str(match.lastgroup).removeprefix("end"))]
    return Part(key[: match.start()], kind, name or match[0].removeprefix("."))


def kinds_of_change(names: Iterable[str]) -> list[str]:
    """The kinds of change of weights that names of tensors belong to, such as ``["LoRA"]``; empty for a checkpoint."""
    names = list(names)
    parts = [part for part in map(part_of, names) if part is not None]
    found = {part.kind for part in parts if part.kind not in ("alpha", "GLoRA")}
    alone = bool(names) and len(parts) == len(names)
    like = any("lora" in name.lower() for name in names) and _quantized_by_name(names) is None
    if not found and (alone or like):
        found = {"LoRA"}
    return sorted(found)


def no_transformer(names: Collection[str]) -> str:
    """In words, what a checkpoint holds in place of a transformer, and what to do; empty where nothing tells.

    Args:
        names: of all its tensors.
    """
    plain = {_WRAPPER.sub("", name, count=1) if _WRAPPER.match(name) else name for name in names}
    for what, share, pattern in _NO_TRANSFORMER:
        matching = [name for name in plain if pattern.match(name)]
        if len(matching) > share * len(plain):
            return (
                f"{what} alone, no transformer, by tensors such as {shown(min(matching))}; give the file of the model's "
                "transformer, all else comes from its diffusers folder"
            )
    return ""


def cannot_fold(kind: str, key: str) -> str:
    """Why a kind of change that is none of :data:`FOLDED` is refused."""
    return (
        f"{kind}, such as tensor {shown(key)}: liftkit reads LoRA, DoRA, LoHa, LoKr and differences of matrices; merge it into "
        "its model with its trainer's tools first"
    )


def quantization(tensors: Mapping[str, TensorEntry]) -> str | None:
    """In words, how weights are quantized, with a tensor that shows it; None for full or half precision."""
    named = _quantized_by_name(tensors)
    if named is not None:
        return named
    for name, entry in tensors.items():
        if entry.dtype.startswith("F8_"):
            return f"8-bit floats ({entry.dtype}), such as tensor {shown(name)}"
        if entry.dtype in _PLAIN_INTEGERS and len(entry.shape) > 1 and name.endswith("weight"):
            return f"integers ({entry.dtype}), such as tensor {shown(name)}"
    return None


def _quantized_by_name(names: Iterable[str]) -> str | None:
    for kind, end in _QUANTIZED:
        pattern = re.compile(end if end.startswith("(?:.*") else f".*(?:{end})", re.DOTALL)
        first = next((name for name in names if pattern.fullmatch(name)), None)
        if first is not None:
            return f"{kind}, such as tensor {shown(first)}"
    return None
