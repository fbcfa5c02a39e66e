"""Which tiny random models do the tests run on? One saved folder each, made here, never downloaded.

The sizes are unequal and d_mlp is 3 x d_model (BLOOM and MPT hard-code 4), so that a transposed or
exchanged tensor cannot pass for the right one.
"""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

TEXT = """The cat sat on the mat while the rain fell on the roof of the old house by the river.
A feed-forward layer reads with its keys and writes with its values; what is between them is a memory.
In 1869 the two ends of the railway met, and a golden spike was driven through the last tie.
Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. ☕ costs 3€; naïve, façade, 東京.
"""

GATED = {"intermediate_size": 36, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES = {  # what each configuration calls d_model = 12 (16 where heads need it), 3 layers, d_mlp = 36 (48)
    "gpt2": {"n_embd": 12, "n_layer": 3, "n_head": 2, "n_inner": 36, "n_positions": 256},
    "llama": {"hidden_size": 16, "num_hidden_layers": 3, **GATED, "intermediate_size": 48},
    "opt": {
        "hidden_size": 12,
        "word_embed_proj_dim": 12,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "ffn_dim": 36,
        "max_position_embeddings": 256,
    },
    "bloom": {"hidden_size": 12, "n_layer": 3, "n_head": 2},
    "mpt": {"d_model": 12, "n_layers": 3, "n_heads": 2, "max_seq_len": 256},
    "gpt_neox": {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    },
    "gptj": {"n_embd": 12, "n_layer": 3, "n_head": 2, "n_inner": 36, "rotary_dim": 4, "n_positions": 256},
    "phi3": {"hidden_size": 16, "num_hidden_layers": 3, **GATED, "intermediate_size": 48},
    "gemma2": {
        "hidden_size": 12,
        "num_hidden_layers": 3,
        **GATED,
        "head_dim": 6,
        "query_pre_attn_scalar": 6,
        "sliding_window": 8,
    },
    "olmo2": {"hidden_size": 16, "num_hidden_layers": 3, **GATED, "intermediate_size": 48},
    "granite": {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        **GATED,
        "intermediate_size": 48,
        "residual_multiplier": 0.22,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.3,
        "logits_scaling": 2.0,
    },
    "bert": {
        "hidden_size": 12,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 36,
        "max_position_embeddings": 256,
    },
}
REFUSED = {
    "mixtral": {"hidden_size": 16, "num_hidden_layers": 2, **GATED, "num_local_experts": 3},
    "qwen2_moe": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        **GATED,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 24,
    },
    "mamba": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
}


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 300 tokens: half a character can be a token, ids 0 and V-1 are in use."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXT.splitlines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", model_max_length=256)


def build(architecture: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model whose every weight, bias and norm gain is far from its default.

    Default initialisation (0.02, zero biases, unit gains) hides a wrong bias and makes all GELUs alike.
    """
    sizes = {**SIZES, **REFUSED}[architecture]
    vocabulary = len(tokenizer())
    config = CONFIG_MAPPING[architecture](
        **{
            "vocab_size": vocabulary,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": None,
            **sizes,
            **changes,
        }
    )
    auto = AutoModelForMaskedLM if architecture == "bert" else AutoModelForCausalLM
    generator = torch.Generator().manual_seed(seed)
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim > 1:
                weight.copy_(noise / weight.shape[-1] ** 0.5)
            elif name.endswith("bias"):
                weight.copy_(0.3 * noise)
            else:
                weight.add_(0.3 * noise)  # a norm's gain, around the 1 (or the 0 of Gemma's 1 + weight)
    return model


def save(architecture: str, folder: Path, **changes: Any) -> Path:
    """The folder that `load_model` reads: config, safetensors, tokenizer."""
    logging.disable_progress_bar()
    build(architecture, **changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_gguf(path: Path) -> PreTrainedModel:
    """A llama as one .gguf file, unquantised, and the model that it must read as."""
    import gguf

    model = build("llama", tie_word_embeddings=False)
    size, heads = model.config, {"q": "num_attention_heads", "k": "num_key_value_heads"}
    writer = gguf.GGUFWriter(path, "llama", use_temp_file=False)
    writer.add_context_length(256)
    writer.add_embedding_length(size.hidden_size)
    writer.add_block_count(size.num_hidden_layers)
    writer.add_feed_forward_length(size.intermediate_size)
    writer.add_head_count(size.num_attention_heads)
    writer.add_head_count_kv(size.num_key_value_heads)
    writer.add_layer_norm_rms_eps(size.rms_norm_eps)
    writer.add_rope_freq_base(size.rope_parameters["rope_theta"])
    writer.add_vocab_size(size.vocab_size)
    state = json.loads(tokenizer().backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(state["vocab"], key=state["vocab"].__getitem__))
    writer.add_token_merges([" ".join(merge) for merge in state["merges"]])
    for special in ("bos", "eos", "unk", "pad"):
        getattr(writer, f"add_{special}_token_id")(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, size.num_hidden_layers)
    for name, weight in model.state_dict().items():
        for part, count in heads.items():  # llama.cpp's order of the rotary halves
            if f"{part}_proj" in name:
                n = getattr(size, count)
                weight = weight.unflatten(0, (n, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(str(names.get_name(name, (".weight",))), weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
