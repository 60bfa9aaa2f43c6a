"""Classifiers and embeddings on causal bases against transformers and PEFT in fp32, alone and mixed with generation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tests import toys
from tests.bounds import assert_near
from tests.server.engine.harness import Harness, Reference, assert_greedy_matches, deltas_of
from transformers import AutoModel, AutoModelForSequenceClassification

from graftwork_plugins import Artifact, ArtifactError, Head, LowRank
from graftwork_plugins.builtin.strategies.lora import Lora
from graftwork_server.base.describe import base_info
from graftwork_server.errors import GraftworkServerError
from graftwork_server.layers.binding.adapter import bind
from graftwork_server.layers.models.base_model import BaseModel

LINEARS: dict[str, list[str]] = {
    "gpt2": ["c_attn", "c_fc"],
    "phi3": ["qkv_proj", "down_proj"],
    **{name: ["q_proj", "o_proj"] for name in toys.MIXTURES},
}


@pytest.fixture(scope="module", params=[*toys.CONFIGS, *toys.MIXTURES])
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model_dir(architecture: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.make_model(architecture, tmp_path_factory.mktemp(architecture) / "model")


@pytest.fixture(scope="module")
def harness(model_dir: Path) -> Harness:
    return Harness(model_dir, max_step_tokens=24, max_sequences=8)


def load(harness: Harness, directory: Path, digest: str | None = None) -> Any:
    """Through the strategy, as the server does."""
    info = base_info(harness.base.engine_model.model, harness.base.info)
    return harness.place(digest or str(directory), Lora().load(Artifact(directory), info))


@torch.no_grad()
def expected_logits(model_dir: Path, adapter: Path, prompts: list[list[int]], labels: int) -> torch.Tensor:
    """What PEFT over AutoModelForSequenceClassification says, row by row: [prompts, labels]."""
    model = AutoModelForSequenceClassification.from_pretrained(model_dir, dtype=torch.float32, num_labels=labels)
    peft_model = PeftModel.from_pretrained(model, adapter).eval()
    return torch.cat([peft_model(input_ids=torch.tensor([ids])).logits for ids in prompts])


def test_classifiers_equal_peft_mixed_with_generation(
    harness: Harness, model_dir: Path, architecture: str, tmp_path: Path
) -> None:
    targets = {"target_modules": LINEARS.get(architecture, "all-linear")}
    three = toys.make_classifier(model_dir, tmp_path / "three", labels=3, **targets)
    one = toys.make_classifier(model_dir, tmp_path / "one", labels=1, seed=1, use_dora=True, **targets)
    tuned = toys.make_adapter(model_dir, tmp_path / "tuned", target_modules=LINEARS.get(architecture, ["q_proj"]))
    ref_three, ref_one = load(harness, three), load(harness, one)
    ref_tuned = harness.place("tuned", deltas_of(tuned))
    prompts = [[*ids, 0, 0] if index == 3 else ids for index, ids in enumerate(toys.prompts(8))]  # 0 is padding
    for index, prompt in enumerate(prompts):
        harness.pool(index, prompt, ref_three, kind="classify")
        harness.pool(10 + index, prompt, ref_one, kind="classify")
        harness.add(20 + index, prompt, ref_tuned if index % 2 else None, max_tokens=6)
    harness.run()
    reference = Reference(model_dir, {"tuned": tuned})
    for offset, directory, labels in ((0, three, 3), (10, one, 1)):
        served = torch.stack([harness.values(offset + index) for index in range(len(prompts))])
        torch.testing.assert_close(served, expected_logits(model_dir, directory, prompts, labels), atol=1e-4, rtol=0)
    for index, prompt in enumerate(prompts):
        assert_greedy_matches(harness, reference, 20 + index, prompt, "tuned" if index % 2 else None)
    output = harness.finished[0]
    assert output.pooled is not None
    assert output.pooled.head is not None
    assert output.pooled.head.labels == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert output.pooled.head.problem_type == "single_label_classification"
    pooled = harness.finished[10].pooled
    assert pooled is not None
    assert pooled.head is not None
    assert pooled.head.problem_type == "regression"

    before = harness.values(4)
    harness.engine.adapters.unload(str(three))
    ref_three = load(harness, three)
    harness.pool(100, prompts[4], ref_three, kind="classify")
    harness.run()
    assert_near(harness.values(100), before)  # alone, and loaded again


@pytest.mark.parametrize("pooling", ["last", "cls", "mean", "cls+max+mean_sqrt_len+weightedmean+last"])
def test_embeddings_equal_transformers(
    harness: Harness, model_dir: Path, architecture: str, tmp_path: Path, pooling: str
) -> None:
    targets = {"target_modules": LINEARS.get(architecture, "all-linear")}
    adapter = toys.make_embedder(model_dir, tmp_path / "embedder", **targets)
    ref = load(harness, adapter)
    prompts = toys.prompts(6)
    for index, prompt in enumerate(prompts):
        harness.pool(200 + index, prompt, pooling=pooling)
        harness.pool(210 + index, prompt, ref, pooling=pooling)
        harness.add(220 + index, prompt, max_tokens=3)
    harness.pool(230, prompts[0], ref, pooling=pooling, normalize=True, dimensions=7)
    harness.run()
    plain = AutoModel.from_pretrained(model_dir, dtype=torch.float32).eval()
    for offset, model in ((200, plain), (210, None)):
        model = model or PeftModel.from_pretrained(plain, adapter).eval()
        for index, prompt in enumerate(prompts):
            with torch.no_grad():
                states = model(input_ids=torch.tensor([prompt]))[0][0]
            expected = toys.pooled(states, pooling)
            torch.testing.assert_close(harness.values(offset + index), expected, atol=1e-4, rtol=0)
    cut = torch.nn.functional.normalize(harness.values(210)[:7], dim=0)
    assert_near(harness.values(230), cut)


OF_TRUNK: dict[str, dict[str, Any]] = {
    "norms and embedding": {"modules_to_save": ["norm"], "target_modules": ["q_proj", "embed_tokens"]},
    "whole embedding": {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]},
    "whole mlp": {"modules_to_save": ["layers.1.mlp"]},
    "biases": {"bias": "all", "target_modules": ["v_proj"]},
    "lora_bias": {"lora_bias": True},
    "dora of ranks by pattern": {"use_dora": True, "rank_pattern": {"q_proj": 2}, "use_rslora": True},
    "rank 512": {"r": 512, "target_modules": ["q_proj"]},
    "a regular expression": {"target_modules": r".*layers\.[02]\..*(q_proj|down_proj)"},
    "tokens": {"trainable_token_indices": [3, 7, 5, 100]},
}


def test_heads_and_vectors_go_with_every_feature(tmp_path: Path) -> None:
    model_dir = toys.make_model("qwen2", tmp_path / "model")
    harness = Harness(model_dir, max_step_tokens=48)
    prompts = toys.prompts(3)
    adapters = []
    for seed, (name, settings) in enumerate(OF_TRUNK.items()):
        classifier = toys.make_classifier(model_dir, tmp_path / name, labels=2, seed=seed, **settings)
        embedder = toys.make_embedder(model_dir, tmp_path / f"{name} of vectors", seed=seed, **settings)
        adapters += [(name, path, load(harness, path)) for path in (classifier, embedder)]
    for number, (_, _, ref) in enumerate(adapters):
        for index, prompt in enumerate(prompts):
            harness.pool(10 * number + index, prompt, ref, kind="embed" if number % 2 else "classify")
    harness.run()
    for number, (name, path, _) in enumerate(adapters):
        served = torch.stack([harness.values(10 * number + index) for index in range(len(prompts))])
        if number % 2:
            plain = AutoModel.from_pretrained(model_dir, dtype=torch.float32)
            model = PeftModel.from_pretrained(plain, path).eval()
            with torch.no_grad():
                expected = torch.stack([model(input_ids=torch.tensor([ids]))[0][0, -1] for ids in prompts])
        else:
            expected = expected_logits(model_dir, path, prompts, 2)
        torch.testing.assert_close(served, expected, atol=1e-4, rtol=0, msg=name)


def test_a_preempted_sequence_gathers_its_state_anew(llama_dir: Path, llama: BaseModel) -> None:
    harness = Harness(llama_dir, llama, max_step_tokens=8)
    prompt = toys.prompts(1, seed=4)[0] * 2
    pooling = "cls+max+mean+mean_sqrt_len+weightedmean+last"
    harness.pool(1, prompt, pooling=pooling)
    harness.step()
    sequence = harness.engine._scheduler.running[0]
    harness.engine._scheduler._free(sequence)  # as for a victim of preemption
    harness.engine._scheduler.running.remove(sequence)
    harness.engine._admission.preempt(sequence)
    harness.run()
    with torch.no_grad():
        states = AutoModel.from_pretrained(llama_dir, dtype=torch.float32).eval()(torch.tensor([prompt]))[0][0]
    torch.testing.assert_close(harness.values(1), toys.pooled(states, pooling), atol=1e-4, rtol=0)


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def classifier(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.make_classifier(llama_dir, tmp_path_factory.mktemp("classifier"), target_modules=["q_proj"])


def test_who_cannot_answer_says_so(llama_dir: Path, llama: BaseModel, classifier: Path, tmp_path: Path) -> None:
    harness = Harness(llama_dir, llama)
    with_head = load(harness, classifier)
    without = harness.place("plain", deltas_of(toys.make_adapter(llama_dir, tmp_path / "plain")))
    harness.pool(1, [3, 4, 5], kind="classify")
    harness.pool(2, [3, 4, 5], without, kind="classify")
    harness.add(3, [3, 4, 5], with_head)
    harness.add(4, [3, 4, 5], with_head, prompt_logprobs=1, max_tokens=0)
    harness.pool(5, [3, 4, 5], with_head)
    harness.add(6, [3, 4, 5], without, max_tokens=2)
    harness.run()
    errors = {id: output.error for id, output in harness.finished.items() if output.error}
    assert {id: (error.code, error.reason) for id, error in errors.items()} == {
        1: ("FAILED_PRECONDITION", "HEAD_MISSING"),
        2: ("FAILED_PRECONDITION", "HEAD_MISSING"),
        3: ("FAILED_PRECONDITION", "ADAPTER_CLASSIFIES"),
        4: ("FAILED_PRECONDITION", "ADAPTER_CLASSIFIES"),
    }
    assert "SEQ_CLS" in errors[1].message
    assert "Classify or Embed" in errors[3].message
    assert len(harness.values(5)) == 48
    assert len(harness.tokens[6]) == 2
    assert harness.engine.blocks.free_blocks == harness.engine.blocks.num_blocks


def test_what_was_refused_leaves_nothing_to_be_found(
    llama_dir: Path, llama: BaseModel, classifier: Path, tmp_path: Path
) -> None:
    """A prompt of two full blocks that an adapter without a head was asked to classify was never computed."""
    path = toys.make_adapter(llama_dir, tmp_path / "plain")
    harness = Harness(llama_dir, llama)
    ref = harness.place("plain", deltas_of(path))
    prompt = [3 + index % 50 for index in range(40)]
    harness.pool(1, prompt, ref, kind="classify")
    harness.run()
    assert harness.finished[1].error is not None
    harness.add(2, prompt, ref)
    harness.run()
    assert harness.cached[2] == 0
    assert_greedy_matches(harness, Reference(llama_dir, {"plain": path}), 2, prompt, "plain")


def edited(classifier: Path, folder: Path, edit: Any, config: dict[str, Any] | None = None) -> Artifact:
    """A copy whose tensors `edit` changes in place, beside a config.json if there is one."""
    shutil.copytree(classifier, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return Artifact(folder)


SCORE = "base_model.model.score.weight"
LABELS = {"0": "good", "1": "bad", "2": "ugly"}


def test_labels_come_from_the_adapters_own_files(llama: BaseModel, classifier: Path, tmp_path: Path) -> None:
    info = base_info(llama.engine_model.model, llama.info)
    document = {"model_type": "llama", "id2label": LABELS, "problem_type": "multi_label_classification"}
    deltas = Lora().load(edited(classifier, tmp_path / "a", lambda _: None, document), info)
    head = next(delta for delta in deltas if isinstance(delta, Head))
    assert (head.labels, head.problem_type) == (["good", "bad", "ugly"], "multi_label_classification")
    assert head.pad_token_id == 0  # the base's
    artifact = edited(classifier, tmp_path / "b", lambda _: None, {"pad_token_id": 7})
    config = json.loads((artifact.path / "adapter_config.json").read_text()) | {"id2label": LABELS, "num_labels": 3}
    (artifact.path / "adapter_config.json").write_text(json.dumps(config))
    head = next(delta for delta in Lora().load(artifact, info) if isinstance(delta, Head))
    assert (head.labels, head.problem_type, head.pad_token_id) == (["good", "bad", "ugly"], None, 7)


WRONG: dict[str, tuple[Any, dict[str, Any] | None, str, str]] = {
    "no head": (lambda t: t.pop(SCORE), None, SCORE, "saved whole (modules_to_save): score"),
    "NaN": (lambda t: t[SCORE].__setitem__((0, 0), torch.nan), None, SCORE, "not finite"),
    "integers": (lambda t: t.update({SCORE: torch.ones(3, 48, dtype=torch.int64)}), None, SCORE, "float32"),
    "more labels than rows": (
        lambda t: None,
        {"id2label": LABELS | {"3": "more"}},
        "id2label",
        "names 4 labels, the head has 3 rows",
    ),
    "fewer labels": (lambda t: None, {"id2label": {"0": "good"}}, "id2label", "names 1 labels"),
    "a gap": (lambda t: None, {"id2label": {"0": "a", "1": "b", "3": "c"}}, "id2label", "without gaps"),
    "a list": (lambda t: None, {"id2label": ["a", "b", "c"]}, "id2label", "an object of names"),
    "a number": (lambda t: None, {"id2label": {"0": 1, "1": "b", "2": "c"}}, "id2label", "texts of 1 to 256"),
    "a long name": (lambda t: None, {"id2label": LABELS | {"2": "x" * 300}}, "id2label", "texts of 1 to 256"),
    "problem type": (lambda t: None, {"problem_type": "guessing"}, "problem_type", "regression or null"),
    "num_labels": (lambda t: None, {"num_labels": 5}, "num_labels", "is 5, the head has 3 rows"),
    "padding": (lambda t: None, {"pad_token_id": "x"}, "pad_token_id", "a token id or null"),
    "a tensor beside": (
        lambda t: t.update({"base_model.model.score.extra": torch.ones(3)}),
        None,
        "base_model.model.score.extra",
        "not supported",
    ),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_a_damaged_classifier_is_refused_by_name(llama: BaseModel, classifier: Path, tmp_path: Path, case: str) -> None:
    edit, config, key, message = WRONG[case]
    artifact = edited(classifier, tmp_path / "wrong", edit, config)
    with pytest.raises(ArtifactError) as caught:
        Lora().load(artifact, base_info(llama.engine_model.model, llama.info))
    assert message in caught.value.message
    assert caught.value.key == key


LINEAR = LowRank(module="model.layers.0.self_attn.q_proj", a=torch.ones(1, 48), b=torch.ones(48, 1), scaling=1.0)


@pytest.mark.parametrize(
    ("deltas", "message"),
    [
        ([Head(weight=torch.ones(2, 47))], "takes [labels, 48]"),
        ([Head(weight=torch.ones(0, 48))], "takes [labels, 48]"),
        ([Head(weight=torch.ones(48))], "takes [labels, 48]"),
        ([Head(weight=torch.full((2, 48), torch.inf))], "NaN or infinite"),
        ([Head(weight=torch.ones(2, 48), bias=torch.ones(3))], "the head's bias is [3]; [2] is accepted"),
        ([Head(weight=torch.ones(2, 48), labels=["a"])], "1 labels and 2 rows"),
        ([Head(weight=torch.ones(2, 48)), Head(weight=torch.ones(2, 48))], "two heads"),
        ([Head(weight=torch.ones(2, 9), dense_weight=torch.ones(9, 47))], "takes [features, 48]"),
        ([LINEAR, Head(weight=torch.ones(2, 48), dense_module="model.norm")], "before a head: none"),
        ([Head(weight=torch.ones(2, 48), pooling="max")], "mean, cls or last"),  # type: ignore[arg-type]
        ([Head(weight=torch.ones(2, 48), problem_type="guess")], "regression are accepted"),  # type: ignore[arg-type]
    ],
)
def test_a_head_that_does_not_fit_is_refused(llama: BaseModel, deltas: list[Any], message: str) -> None:
    with pytest.raises(GraftworkServerError, match=message.replace("[", r"\[").replace("]", r"\]")):
        bind(llama, "wrong", deltas)


def test_values_that_overflow_end_their_own_sequence_alone(llama_dir: Path, llama: BaseModel) -> None:
    harness = Harness(llama_dir, llama)
    ref = harness.place("huge", [Head(weight=torch.full((2, 48), 3e38))])
    harness.pool(1, [3, 4, 5], ref, kind="classify")
    harness.add(2, [3, 4, 5], max_tokens=2)
    harness.run()
    error = harness.finished[1].error
    assert error is not None
    assert error.reason == "LOGITS_NOT_FINITE"
    assert len(harness.tokens[2]) == 2
