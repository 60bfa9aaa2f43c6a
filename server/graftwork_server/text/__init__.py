"""Text to tokens and back, as the front and the tuner's data do it; the only tokenizer code of the server.

    files.py      what the files of a tokenizer say: named tokens, added tokens, chat templates
    tokenizer.py  TextProcessor: encode, decode, render
    turns.py      what a model would have written in a rendered conversation
    stream.py     tokens to text as they come, stop texts

Works with the `tokenizers` library alone: importing transformers would take seconds and bring torch into the front.
"""

from graftwork_server.text.files import ModelFacts, TokenizerFiles, write_base_tokenizer
from graftwork_server.text.stream import IncrementalDetokenizer, StopMatcher, TextPiece
from graftwork_server.text.tokenizer import CompileTemplate, TaughtConversation, TextProcessor

__all__ = [
    "CompileTemplate",
    "IncrementalDetokenizer",
    "ModelFacts",
    "StopMatcher",
    "TaughtConversation",
    "TextPiece",
    "TextProcessor",
    "TokenizerFiles",
    "write_base_tokenizer",
]
