"""Attention functions that the base model is run with, registered in transformers' AttentionInterface.

packed.py           training: packed rows, causal within each
bidirectional.py    encoders: packed rows, every token sees all of its row
"""
