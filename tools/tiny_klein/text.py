"""The text side of tiny-klein: a byte-level BPE tokenizer and a tiny Qwen3 with frozen random weights.

Random features are enough here: every word is a token of its own, and the transformer learns what to read
from them. 28 layers, so that FLUX.2 klein's default ``text_encoder_out_layers=(9, 18, 27)`` exist.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from liftkit.data import demo
from tools.tiny_klein import common

MAX_TOKENS = 12
LAYERS = (9, 18, 27)
CHAT_TEMPLATE = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"


def tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE trained on the 160 prompts: 8 to 9 tokens a prompt, any other text in bytes."""
    import json

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Chat templates put no space before the first word; both forms of it get a token.
    prompts = [scene.prompt for scene in demo.all_scenes()]
    bpe.train_from_iterator(prompts, trainer)
    model = json.loads(bpe.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_TOKENS,
        padding_side="right",
    )


def encoder(vocabulary: int) -> Qwen3ForCausalLM:
    """A frozen random Qwen3: 28 layers of width 32."""
    torch.manual_seed(common.SEED)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=28,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_()
    # What is stored is bfloat16: train on the features that the stored weights give.
    return model.to(torch.bfloat16).float().eval().requires_grad_(False)


@torch.no_grad()
def embed(prompts: list[str]) -> Tensor:
    """Prompts to (n, 12, 96) features, by the stock pipeline's own function."""
    from diffusers import Flux2KleinPipeline

    words = tokenizer()
    return Flux2KleinPipeline._get_qwen3_prompt_embeds(
        encoder(len(words)), words, prompts, max_sequence_length=MAX_TOKENS, hidden_states_layers=list(LAYERS)
    )


def captions(scenes: list[demo.Scene]) -> tuple[Tensor, Tensor]:
    """The number of each scene's caption, (n,), and the features of all captions, (161, 12, 96), the empty one last."""
    order = {scene: index for index, scene in enumerate(demo.all_scenes())}
    numbers = torch.tensor([order[scene] for scene in scenes])
    return numbers, embed([scene.prompt for scene in demo.all_scenes()] + [""])
