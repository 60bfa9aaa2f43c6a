"""A Llama model and its PEFT adapters as GGUF, for llama.cpp; run in llama.cpp's environment.

Weights keep their bfloat16. Norms become float32, as llama.cpp wants them, and adapters too: it is faster with those.
llama.cpp's rotary embedding turns neighbouring pairs, transformers' the two halves of a head, so the rows of q and k
are reordered.
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.torch import load_file

MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
BF16_FILE = 32


class Names:
    """llama.cpp's names and order for the tensors of one model."""

    def __init__(self, config: dict[str, int]) -> None:
        self._heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}

    def of_module(self, path: str) -> str:
        """ "model.layers.3.self_attn.q_proj" is "blk.3.attn_q"."""
        layer, _, module = path.partition("layers.")[2].partition(".")
        return f"blk.{layer}.{MODULES[module]}"

    def ordered(self, path: str, tensor: torch.Tensor) -> torch.Tensor:
        """Output rows ([out, in], or LoRA's B) in llama.cpp's order."""
        heads = self._heads.get(path.rpartition(".")[2])
        if heads is None:
            return tensor
        rows, columns = tensor.shape
        return tensor.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def convert_model(model_dir: Path, target: Path) -> None:
    """Writes `target` from config.json and model.safetensors. It has no tokenizer: only token ids are decoded."""
    config = json.loads((model_dir / "config.json").read_text())
    names = Names(config)
    writer = GGUFWriter(target, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(BF16_FILE)
    writer.add_tokenizer_model("none")
    for key, tensor in load_file(model_dir / "model.safetensors").items():
        path = key.removesuffix(".weight")
        if key in WHOLE:
            _add(writer, WHOLE[key], tensor)
        else:
            _add(writer, f"{names.of_module(path)}.weight", names.ordered(path, tensor))
    _write(writer)


def convert_adapter(adapter_dir: Path, model_dir: Path, target: Path) -> None:
    """Writes `target` from a PEFT directory of plain LoRA."""
    names = Names(json.loads((model_dir / "config.json").read_text()))
    config = json.loads((adapter_dir / "adapter_config.json").read_text())
    writer = GGUFWriter(target, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(config["lora_alpha"]))
    for key, tensor in load_file(adapter_dir / "adapter_model.safetensors").items():
        path, _, side = key.removesuffix(".weight").rpartition(".")  # side: lora_A or lora_B
        rows = names.ordered(path, tensor) if side == "lora_B" else tensor
        writer.add_tensor(f"{names.of_module(path)}.weight.{side.lower()}", rows.float().contiguous().numpy())
    _write(writer)


def _add(writer: GGUFWriter, name: str, tensor: torch.Tensor) -> None:
    if tensor.ndim == 1:
        writer.add_tensor(name, tensor.float().numpy())
        return
    # numpy has no bfloat16: the bytes as they are, with their type said beside them.
    raw = tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    writer.add_tensor(name, raw, raw_dtype=GGMLQuantizationType.BF16)


def _write(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
