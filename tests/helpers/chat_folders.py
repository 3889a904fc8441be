"""Tiny model folders with chat templates, like those of the Hub: padding that is the end, a tokenizer that adds <s>."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_TOOLS = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson + '\n' }}{% endif %}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + (' ' + message.name if message.name else '') + '\n' }}"
    "{% if message.reasoning_content %}{{ '(' + message.reasoning_content + ')' }}{% endif %}{{ message['content'] }}"
    "{% for call in message.tool_calls or [] %}{{ call.id }}{{ call.function | tojson }}{% endfor %}"
    "{{ message.tool_call_id or '' }}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<s>", "<|im_start|>", "<|im_end|>", "<unk>")


def chat_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Bytes and chat tokens; it frames texts with <s> by itself, and pads with the token that ends a turn."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: at for at, token in enumerate([*SPECIAL, *alphabet])}, merges=[]))
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>", pad_token="<|im_end|>", unk_token="<unk>"
    )
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def chat_folder(folder: Path, template: str | None = CHATML) -> Path:
    """A Llama of two layers with such a tokenizer, drawn with a fixed seed."""
    torch.manual_seed(0)
    tokenizer = chat_tokenizer(template)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=32, max_position_embeddings=256, bos_token_id=0, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
