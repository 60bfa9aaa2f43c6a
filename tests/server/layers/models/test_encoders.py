"""Encoders as base models against transformers and PEFT in fp32: embeddings, heads, adapters, mixed and alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, PeftConfig, PeftModel, PromptTuningConfig, get_peft_model
from tests import toys
from tests.bounds import assert_near
from tests.server.engine.adapters.test_heads import load
from tests.server.engine.adapters.test_peft_features import load as load_any
from tests.server.engine.harness import CPU, Harness
from tests.server.layers.models.encoder_harness import harness_of, logits_of, prompts, states_of
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from graftwork_plugins import ArtifactError, LowRank
from graftwork_server.errors import FailedPrecondition
from graftwork_server.layers.models.load import load_model

TARGETS = {"distilbert": ["q_lin", "v_lin", "lin1"]}
"""PEFT's all-linear fails on DistilBERT: it takes pre_classifier for one of them."""


@pytest.fixture(scope="module", params=[name for name in toys.ENCODERS if name != "modernbert"])
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model_dir(architecture: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.make_encoder(architecture, tmp_path_factory.mktemp(architecture) / "model")


@pytest.fixture(scope="module")
def harness(model_dir: Path) -> Harness:
    return harness_of(model_dir, max_step_tokens=64, max_sequences=6)


def test_embeddings_and_classifiers_equal_peft(
    harness: Harness, model_dir: Path, architecture: str, tmp_path: Path
) -> None:
    targets = {"target_modules": TARGETS.get(architecture, "all-linear")}
    embedder = toys.make_embedder(model_dir, tmp_path / "embedder", **targets)
    three = toys.make_classifier(model_dir, tmp_path / "three", labels=3, seed=1, **targets)
    two = toys.make_classifier(model_dir, tmp_path / "two", labels=2, seed=2, use_dora=True, r=2, **targets)
    refs = {path: load(harness, path) for path in (embedder, three, two)}
    rows = prompts()
    for index, ids in enumerate(rows):
        for offset, pooling in enumerate(("mean", "cls", "last")):
            harness.pool(100 * offset + index, ids, pooling=pooling)
            harness.pool(100 * offset + 10 + index, ids, refs[embedder], pooling=pooling)
        harness.pool(300 + index, ids, refs[three], kind="classify")
        harness.pool(400 + index, ids, refs[two], kind="classify")
    harness.run()
    plain = AutoModel.from_pretrained(model_dir, dtype=torch.float32).eval()
    for shift in (0, 10):
        model = plain if not shift else PeftModel.from_pretrained(plain, embedder).eval()
        for index, ids in enumerate(rows):
            states = states_of(model, ids)
            for offset, expected in enumerate((states.mean(0), states[0], states[-1])):
                served = harness.values(100 * offset + shift + index)
                torch.testing.assert_close(served, expected, atol=1e-4, rtol=0)
    for offset, path, labels in ((300, three, 3), (400, two, 2)):
        base = AutoModelForSequenceClassification.from_pretrained(model_dir, dtype=torch.float32, num_labels=labels)
        expected = logits_of(PeftModel.from_pretrained(base, path).eval(), rows)
        served = torch.stack([harness.values(offset + index) for index in range(len(rows))])
        torch.testing.assert_close(served, expected, atol=1e-4, rtol=0)

    before = {index: harness.values(index) for index in (2, 112, 302)}
    harness.engine.adapters.unload(str(three))
    refs[three] = load(harness, three)
    for request_id, ref, pool in (
        (2, None, {"pooling": "mean"}),
        (112, refs[embedder], {"pooling": "cls"}),
        (302, refs[three], {"kind": "classify"}),
    ):
        harness.pool(1000 + request_id, rows[2], ref, **pool)
        harness.run()
        assert_near(harness.values(1000 + request_id), before[request_id])


def test_a_classifier_as_the_base_has_labels_of_its_own(architecture: str, tmp_path: Path) -> None:
    labels = {0: "calm", 1: "angry", 2: "glad", 3: "sad"}
    model_dir = toys.make_encoder(
        architecture,
        tmp_path / "model",
        kind=AutoModelForSequenceClassification,
        id2label=labels,
        label2id={name: row for row, name in labels.items()},
        problem_type="multi_label_classification",
    )
    harness = harness_of(model_dir)
    targets = TARGETS.get(architecture, "all-linear")
    two = toys.make_classifier(model_dir, tmp_path / "two", labels=2, target_modules=targets)
    ref = load(harness, two)
    rows = prompts(3)
    for index, ids in enumerate(rows):
        harness.pool(index, ids, kind="classify")
        harness.pool(10 + index, ids, ref, kind="classify")
    harness.run()
    plain = AutoModelForSequenceClassification.from_pretrained(model_dir, dtype=torch.float32).eval()
    served = torch.stack([harness.values(index) for index in range(3)])
    torch.testing.assert_close(served, logits_of(plain, rows), atol=1e-4, rtol=0)
    pooled = harness.finished[0].pooled
    assert pooled is not None
    assert pooled.head is not None
    assert (pooled.head.labels, pooled.head.problem_type) == (list(labels.values()), "multi_label_classification")
    other = AutoModelForSequenceClassification.from_pretrained(
        model_dir, dtype=torch.float32, num_labels=2, ignore_mismatched_sizes=True
    )
    served = torch.stack([harness.values(10 + index) for index in range(3)])
    torch.testing.assert_close(served, logits_of(PeftModel.from_pretrained(other, two).eval(), rows), atol=1e-4, rtol=0)
    assert harness.base.info.architecture.endswith("ForSequenceClassification")
    assert not harness.base.info.generates


def test_modernbert_gives_vectors_and_has_no_heads(tmp_path: Path) -> None:
    model_dir = toys.make_encoder("modernbert", tmp_path / "model")
    harness = harness_of(model_dir)
    embedder = toys.make_embedder(model_dir, tmp_path / "embedder")
    ref = load(harness, embedder)
    rows = prompts()
    assert max(map(len, rows)) > toys.ENCODERS["modernbert"].sliding_window + 1  # local attention hides something
    others = {
        name: toys.make_embedder(model_dir, tmp_path / name, seed=seed, **settings)
        for seed, (name, settings) in enumerate(
            {
                "rank 512": {"r": 512, "lora_alpha": 512, "target_modules": ["Wqkv"]},
                "dora and norms": {"use_dora": True, "target_modules": ["Wqkv", "Wo"], "modules_to_save": ["mlp_norm"]},
                "embedding": {"target_modules": ["tok_embeddings", "Wi"]},
                "tokens": {"target_modules": ["Wi"], "trainable_token_indices": {"tok_embeddings": [3, 5, 9]}},
            }.items()
        )
    }
    for index, ids in enumerate(rows):
        harness.pool(index, ids, pooling="mean")
        harness.pool(10 + index, ids, ref, pooling="last")
    for number, path in enumerate(others.values(), 10):
        harness.pool(10 * number, rows[0], load(harness, path), pooling="mean")
    harness.run()
    for number, (name, path) in enumerate(others.items(), 10):
        model = PeftModel.from_pretrained(AutoModel.from_pretrained(model_dir, dtype=torch.float32), path).eval()
        expected = states_of(model, rows[0]).mean(0)
        torch.testing.assert_close(harness.values(10 * number), expected, atol=1e-4, rtol=0, msg=name)
    plain = AutoModel.from_pretrained(model_dir, dtype=torch.float32).eval()
    of_base = [states_of(plain, ids).mean(0) for ids in rows]
    adapted = PeftModel.from_pretrained(plain, embedder).eval()
    for index, ids in enumerate(rows):
        torch.testing.assert_close(harness.values(index), of_base[index], atol=1e-4, rtol=0)
        torch.testing.assert_close(harness.values(10 + index), states_of(adapted, ids)[-1], atol=1e-4, rtol=0)
    with pytest.raises(ArtifactError, match="heads on this base are not served; accepted are those on bert") as caught:
        load(harness, toys.make_classifier(model_dir, tmp_path / "two", target_modules=["Wqkv"]))
    assert caught.value.key == "task_type"
    whole = toys.make_encoder("modernbert", tmp_path / "whole", kind=AutoModelForSequenceClassification)
    with pytest.raises(FailedPrecondition, match="ModernBertForSequenceClassification, whose head is not served"):
        harness_of(whole)


def features(architecture: str) -> dict[str, dict[str, Any]]:
    """LoraConfig settings by the name of what they show."""
    q, v, dense, norm = "query", "value", "dense", "LayerNorm"
    if architecture == "distilbert":
        q, v, dense, norm = "q_lin", "v_lin", "lin1", "sa_layer_norm"
    before_head = {"bert": ["pooler"], "distilbert": ["pre_classifier"]}.get(architecture, [])
    return {
        "rank 512": {"r": 512, "lora_alpha": 512, "target_modules": [v]},
        "rslora of ranks by pattern": {"target_modules": [q, v], "use_rslora": True, "rank_pattern": {q: 17}},
        "a regular expression": {"target_modules": rf".*\.[02]\..*({q}|{v})"},
        "one layer": {"target_modules": [q], "layers_to_transform": [1]},
        "all biases": {"target_modules": [v], "bias": "all"},
        "biases of adapted": {"target_modules": [q, dense], "bias": "lora_only"},
        "lora_bias": {"target_modules": [q, dense], "lora_bias": True},
        "whole linear layers": {"target_modules": [q], "modules_to_save": [v]},
        "before the head": {"target_modules": [q, dense], "modules_to_save": [*before_head, norm]},
        "embedding": {"target_modules": ["word_embeddings", v], "r": 3},
        "dora of embedding": {"target_modules": ["word_embeddings", dense], "use_dora": True},
        "whole embedding": {"target_modules": [q], "modules_to_save": ["word_embeddings"]},
        "tokens": {"target_modules": [q], "trainable_token_indices": {"word_embeddings": [3, 7, 5, 100]}},
    }


def test_every_feature_equals_peft_mixed_alone_and_reloaded(
    harness: Harness, model_dir: Path, architecture: str, tmp_path: Path
) -> None:
    paths = {
        name: toys.make_classifier(model_dir, tmp_path / name, labels=2, seed=seed, **settings)
        for seed, (name, settings) in enumerate(features(architecture).items())
    }
    refs = {name: load(harness, path, name) for name, path in paths.items()}
    rows = prompts(3)
    numbers = {name: range(10_000 + 10 * index, 10_003 + 10 * index) for index, name in enumerate(paths)}
    for row, ids in enumerate(rows):
        for name, ref in refs.items():
            harness.pool(numbers[name][row], ids, ref, kind="classify")
    harness.run()
    for name, path in paths.items():
        base = AutoModelForSequenceClassification.from_pretrained(model_dir, dtype=torch.float32, num_labels=2)
        expected = logits_of(PeftModel.from_pretrained(base, path).eval(), rows)
        mixed = torch.stack([harness.values(number) for number in numbers[name]])
        torch.testing.assert_close(mixed, expected, atol=1e-4, rtol=0, msg=name)
        harness.engine.adapters.unload(name)
        harness.pool(numbers[name][0], rows[0], load(harness, path, name), kind="classify")
        harness.run()
        assert_near(harness.values(numbers[name][0]), mixed[0], what=name)
        harness.engine.adapters.unload(name)


def test_a_masked_model_has_no_pooler_to_classify_with(tmp_path: Path) -> None:
    model_dir = toys.make_encoder("bert", tmp_path / "model", kind=AutoModelForMaskedLM)
    harness, again = harness_of(model_dir), harness_of(model_dir)
    assert harness.base.info.fingerprint == again.base.info.fingerprint
    ids = prompts(1)[0]
    harness.pool(1, ids, pooling="mean")
    harness.run()
    plain = AutoModelForMaskedLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    torch.testing.assert_close(harness.values(1), states_of(plain.bert, ids).mean(0), atol=1e-4, rtol=0)
    with pytest.raises(FailedPrecondition, match=r"comes after pooler\.dense.*modules_to_save"):
        load(harness, toys.make_classifier(model_dir, tmp_path / "two", target_modules=["query"]))
    whole = toys.make_classifier(model_dir, tmp_path / "whole", target_modules=["query"], modules_to_save=["pooler"])
    harness.pool(2, ids, load(harness, whole), kind="classify")
    harness.run()
    base = AutoModelForSequenceClassification.from_pretrained(model_dir, dtype=torch.float32, num_labels=3)
    expected = logits_of(PeftModel.from_pretrained(base, whole).eval(), [ids])[0]
    torch.testing.assert_close(harness.values(2), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("architecture", "targets"), [("bert", ["key", "value"]), ("modernbert", ["Wqkv", "Wo"])])
def test_other_kinds_of_adapters(tmp_path: Path, architecture: str, targets: list[str]) -> None:
    """IA3 of the model without a task is served; with one it is refused by name, as virtual tokens are."""
    model_dir = toys.make_encoder(architecture, tmp_path / "model")
    harness, ids = harness_of(model_dir), prompts(1)[0]

    def saved(task: str | None, config: Any, number: int) -> Path:
        kind = AutoModelForSequenceClassification if task == "SEQ_CLS" else AutoModel
        model = get_peft_model(kind.from_pretrained(model_dir, dtype=torch.float32), config(task))
        toys.move(model, only_trained=True, seed=number)
        model.save_pretrained(tmp_path / str(number))
        return tmp_path / str(number)

    def ia3(task: str | None) -> PeftConfig:
        return IA3Config(task_type=task, target_modules=targets, feedforward_modules=targets[1:])

    artifact = saved(None, ia3, 0)
    harness.pool(1, ids, harness.place("ia3", load_any(artifact, harness.base)), pooling="last")
    harness.pool(2, ids, pooling="last")
    harness.run()
    plain = AutoModel.from_pretrained(model_dir, dtype=torch.float32)
    expected = states_of(PeftModel.from_pretrained(plain, artifact).eval(), ids)[-1]
    torch.testing.assert_close(harness.values(1), expected, atol=1e-4, rtol=0)
    assert (harness.values(2) - expected).abs().max() > 0.01
    refused = [("FEATURE_EXTRACTION", ia3), ("SEQ_CLS", ia3)]
    refused += [("FEATURE_EXTRACTION", lambda task: PromptTuningConfig(task_type=task, num_virtual_tokens=3))]
    for number, (task, config) in enumerate(refused, 1):
        with pytest.raises(ArtifactError, match=f"task_type is '{task}'") as caught:
            load_any(saved(task, config, number), harness.base)
        assert caught.value.key == "task_type"


def test_a_long_sequence_runs_alone_and_whole(tmp_path: Path) -> None:
    model_dir = toys.make_encoder("roberta", tmp_path / "model")
    harness = harness_of(model_dir, max_step_tokens=16)
    assert harness.base.info.context_tokens == 62
    rows = [[2, *range(3, 63)], [2, 3], [4, 5, 6]]
    for index, ids in enumerate(rows):
        harness.pool(index, ids, pooling="last")
    harness.run()
    assert harness.steps == 2
    model = AutoModel.from_pretrained(model_dir, dtype=torch.float32).eval()
    for index, ids in enumerate(rows):
        torch.testing.assert_close(harness.values(index), states_of(model, ids)[-1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_bfloat16_is_close(tmp_path: Path, architecture: str) -> None:
    model_dir = toys.make_encoder(architecture, tmp_path / "model", kind=AutoModelForSequenceClassification)
    harness = Harness(model_dir, load_model(str(model_dir), CPU, torch.bfloat16, tmp_path))
    ids = prompts(1)[0]
    harness.pool(1, ids, pooling="mean", normalize=True)
    harness.pool(2, ids, kind="classify")
    harness.run()
    model = AutoModelForSequenceClassification.from_pretrained(model_dir, dtype=torch.float32).eval()
    expected = torch.nn.functional.normalize(states_of(model.base_model, ids).mean(0), dim=0)
    assert torch.dot(harness.values(1), expected) > 0.99


def test_one_that_floods_an_encoder_does_not_hold_up_another(tmp_path: Path) -> None:
    """Four sequences in a step, one of them the other's, as their counters are equal or its own is smaller."""
    model_dir = toys.make_encoder("bert", tmp_path / "model")
    harness = harness_of(model_dir, max_sequences=4)
    query = "encoder.layer.0.attention.self.query"
    ref = harness.place("d", [LowRank(module=query, a=torch.zeros(2, 48), b=torch.zeros(48, 2), scaling=1.0)])
    for number in range(40):
        harness.pool(number, [2, 5, 6, 7], pooling="mean")
    harness.pool(100, [2, 5, 6, 8], ref, pooling="mean")
    harness.step()
    assert 100 in harness.finished
    harness.pool(101, [2, 5, 6, 9], ref, pooling="mean")
    harness.step()
    harness.step()
    assert 101 in harness.finished
    assert len(harness.finished) == 12
    harness.run()
