"""What the files of sentence-transformers ask for is done, or named as not done."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from graftwork_server.base.sentence_files import asked_pooling

TRANSFORMER = {"type": "sentence_transformers.models.Transformer", "path": ""}
POOLING = {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}
NORMALIZE = {"type": "sentence_transformers.models.Normalize", "path": "2_Normalize"}
DENSE = {"type": "sentence_transformers.models.Dense", "path": "2_Dense"}


def write(folder: Path, **documents: Any) -> str:
    """Files by name without .json; "pooling" is 1_Pooling/config.json. A text is written as it is."""
    for name, document in documents.items():
        file = folder / ("1_Pooling/config.json" if name == "pooling" else f"{name}.json")
        file.parent.mkdir(exist_ok=True)
        file.write_text(document if isinstance(document, str) else json.dumps(document))
    return str(folder)


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "mean_sqrt_len"),
        ({"pooling_mode_weightedmean_tokens": True}, "weightedmean"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "cls+mean"),
        (
            {"pooling_mode_lasttoken": True, "pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True},
            "max+mean+last",
        ),
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": "mean_sqrt_len_tokens"}, "mean_sqrt_len"),
        ({"pooling_mode": ["mean", "max"]}, "max+mean"),
    ],
)
def test_the_pooling_of_the_files(tmp_path: Path, document: Any, expected: str) -> None:
    assert asked_pooling(write(tmp_path, pooling=document), "otherwise") == (expected, "")
    modules = [TRANSFORMER, POOLING, NORMALIZE]
    assert asked_pooling(write(tmp_path, modules=modules), "otherwise") == (expected, "")


def test_without_files_it_is_the_other_one(tmp_path: Path) -> None:
    assert asked_pooling(str(tmp_path), "otherwise") == ("otherwise", "")


@pytest.mark.parametrize(
    ("documents", "words"),
    [
        ({"pooling": {}}, "no pooling at all in 1_Pooling/config.json"),
        ({"pooling": {"pooling_mode_mean_tokens": False}}, "no pooling at all"),
        ({"pooling": {"pooling_mode": "attention"}}, "attention in 1_Pooling/config.json"),
        ({"pooling": {"pooling_mode_median_tokens": True}}, "median_tokens"),
        ({"pooling": "{"}, "config.json, which is no JSON"),
        ({"pooling": []}, "which is no object"),
        ({"modules": {}}, "modules.json, which is no list of modules"),
        ({"modules": [TRANSFORMER, POOLING]}, "a Pooling in 1_Pooling, which is not there"),
        ({"modules": [TRANSFORMER]}, "0 Pooling modules"),
        ({"modules": [TRANSFORMER, POOLING, DENSE, NORMALIZE], "pooling": {"pooling_mode": "cls"}}, "Dense (2_Dense)"),
    ],
)
def test_what_is_not_done_is_named(tmp_path: Path, documents: dict[str, Any], words: str) -> None:
    pooling, undone = asked_pooling(write(tmp_path, **documents), "otherwise")
    assert pooling == "otherwise"
    assert words in undone


def test_what_is_done_to_texts_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(
        tmp_path,
        pooling={"pooling_mode": "mean", "include_prompt": False},
        config_sentence_transformers={"prompts": {"query": "query: "}, "default_prompt_name": "query"},
        sentence_bert_config={"max_seq_length": 64, "do_lower_case": True},
    )
    with caplog.at_level(logging.INFO, "graftwork.engine"):
        assert asked_pooling(str(tmp_path), "otherwise") == ("mean", "")
    for words in ("names a prompt (query)", "include_prompt false", "do_lower_case", "cuts texts at 64 tokens"):
        assert words in caplog.text
