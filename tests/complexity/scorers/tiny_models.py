"""Tiny causal language models of the real classes, saved to disk with a tokenizer trained on the spot.

Every token is a direction of its own, and the output layer maps it to the tokens that may follow, so that a
model can be made to reply in a given form. Attention and MLP stay random: the score depends on the caption.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from cat_fast.complexity import rubric_text

SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DIGITS = {str(digit): math.exp(-abs(digit - 6) / 2) for digit in range(1, 10)}
REPLIES: dict[str, dict[str, float]] = {
    "Ċ": {"Score": 1},
    "Score": {":": 1},
    ".": {"<|im_end|>": 1},
}
NONSENSE = REPLIES | {"Ċ": {"Ġimage": 1}, "Ġimage": {"Ġof": 1}, "Ġof": {"Ġimage": 1}}


def save_tokenizer(folder: Path, *, spaced_digits: bool, template: bool = True) -> PreTrainedTokenizerFast:
    """Save a byte-level BPE tokenizer in which " 7" is one token (`spaced_digits`) or two."""
    tokenizer = Tokenizer(BPE())
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        steps if spaced_digits else [pre_tokenizers.Digits(individual_digits=True), *steps]
    )
    tokenizer.decoder = decoders.ByteLevel()
    examples = [f"Score: {digit} out of {digit}. A dog." for digit in range(1, 11)] * 20
    trainer = BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([rubric_text(), *examples], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>", padding_side="left"
    )
    if template:
        fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return fast


def save_model(
    folder: Path,
    kind: str = "llama",
    following: Mapping[str, Mapping[str, float]] | None = None,
    *,
    spaced_digits: bool = True,
    template: bool = True,
    positions: int = 4096,
) -> Path:
    """Save a model whose next tokens have the probabilities `following`; by default, a random one."""
    tokenizer = save_tokenizer(folder, spaced_digits=spaced_digits, template=template)
    vocabulary = tokenizer.get_vocab()
    size = -(-len(tokenizer) // 16) * 16
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": size,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": positions,
        "tie_word_embeddings": False,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    model = (
        LlamaForCausalLM(LlamaConfig(**common))
        if kind == "llama"
        else Qwen2ForCausalLM(Qwen2Config(**common))
    )
    if following is not None:
        with torch.no_grad():
            model.model.embed_tokens.weight.copy_(torch.eye(len(tokenizer), size))
            for name, weight in model.model.layers.named_parameters():
                if "norm" not in name:
                    weight.normal_(0, 0.012)
            table = torch.zeros(len(tokenizer), size)
            for token, choices in digit_steps(spaced_digits, following).items():
                for text, probability in choices.items():
                    table[vocabulary[text], vocabulary[token]] = (14 + math.log(probability)) / math.sqrt(
                        size
                    )
            model.lm_head.weight.copy_(table + torch.randn_like(table) * 0.02)
    model.generation_config.repetition_penalty = 1.5  # published ones have such settings; scores ignore them
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    return folder


def digit_steps(spaced: bool, following: Mapping[str, Mapping[str, float]]) -> dict[str, Mapping[str, float]]:
    """Return the steps around the digit, whose space may be a token of its own."""
    if spaced:
        digits = {f"Ġ{digit}": p for digit, p in DIGITS.items()}
        return {**following, ":": digits} | {f"Ġ{digit}": {".": 1.0} for digit in DIGITS}
    return {**following, ":": {"Ġ": 1.0}, "Ġ": DIGITS} | {digit: {".": 1.0} for digit in DIGITS}
