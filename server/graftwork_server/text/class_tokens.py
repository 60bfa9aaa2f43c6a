"""Tokens that a tokenizer's class names where its files do not, by the class's name without "Fast".

From transformers' classes that make a tokenizer of tokenizer.json; a test compares them. A configuration without a
class, or of another one (PreTrainedTokenizerFast), has the tokens that it names and no others.
"""

from __future__ import annotations

from collections.abc import Mapping

_ENDOFTEXT = "<|endoftext|>"
_GPT2 = {"bos_token": _ENDOFTEXT, "eos_token": _ENDOFTEXT, "unk_token": _ENDOFTEXT}
_QWEN2 = {"eos_token": _ENDOFTEXT, "unk_token": _ENDOFTEXT, "pad_token": _ENDOFTEXT}
_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_T5 = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
_GEMMA = {
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
_BERT = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
_ROBERTA = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "sep_token": "</s>",
    "pad_token": "<pad>",
    "cls_token": "<s>",
    "mask_token": "<mask>",
}
_COHERE = {
    "bos_token": "<BOS_TOKEN>",
    "eos_token": "<|END_OF_TURN_TOKEN|>",
    "unk_token": "<UNK>",
    "sep_token": "<SEP>",
    "pad_token": "<PAD>",
    "cls_token": "<CLS>",
    "mask_token": "<MASK_TOKEN>",
}

CLASS_TOKENS: Mapping[str, Mapping[str, str]] = {
    "BertTokenizer": _BERT,
    "CodeLlamaTokenizer": _LLAMA,
    "CohereTokenizer": _COHERE,
    "DebertaTokenizer": {**_BERT, "bos_token": "[CLS]", "eos_token": "[SEP]"},
    "DebertaV2Tokenizer": {**_BERT, "bos_token": "[CLS]", "eos_token": "[SEP]"},
    "GPT2Tokenizer": _GPT2,
    "CodeGenTokenizer": _GPT2,
    "GPTNeoXTokenizer": {**_GPT2, "pad_token": "<|padding|>"},
    "GemmaTokenizer": _GEMMA,
    "LlamaTokenizer": _LLAMA,
    "MPNetTokenizer": {**_ROBERTA, "unk_token": "[UNK]"},
    "Qwen2Tokenizer": _QWEN2,
    "Qwen3_5Tokenizer": _QWEN2,
    "RobertaTokenizer": _ROBERTA,
    "T5Tokenizer": _T5,
    "XLMRobertaTokenizer": _ROBERTA,
}
