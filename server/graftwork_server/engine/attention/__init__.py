"""Attention functions that the base model is run with, registered in transformers' AttentionInterface.

paged.py            serving: packed tokens of many sequences against the paged KV cache
packed.py           training: packed rows, causal within each
bidirectional.py    encoders: packed rows, every token sees all of its row
"""
