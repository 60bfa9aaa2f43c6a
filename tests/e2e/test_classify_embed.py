"""Classify and Embed on real servers, over gRPC, against transformers and PEFT: a causal base and an encoder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests import toys
from tests.e2e.reference import TOLERANCE, Reference
from tests.e2e.serving import Server, run_cli
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from graftwork import Client, FailedPreconditionError, InvalidArgumentError

TEXTS = ["the quick brown fox", "one two three four five", "dog", "over the lazy dog one two"]
LABELS = {"0": "calm", "1": "angry", "2": "glad"}


@torch.no_grad()
def logits_of(model: Any, rows: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """[rows, labels], row by row."""
    return torch.cat([model.eval()(**row).logits for row in rows])


def classifier_on(model_dir: Path, adapter: Path, labels: int) -> Any:
    base = AutoModelForSequenceClassification.from_pretrained(
        model_dir, dtype=torch.float32, num_labels=labels, ignore_mismatched_sizes=True
    )
    return PeftModel.from_pretrained(base, adapter).eval()


def served_logits(result: Any) -> torch.Tensor:
    return torch.tensor([[score.logit for score in one.labels] for one in result.results])


# ---------------------------------------------------------------------------------------------- a causal base


@pytest.fixture(scope="module")
def adapters(client: Client, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    mood = toys.make_classifier(model_dir, folder / "mood", labels=3)
    (mood / "config.json").write_text(json.dumps({"id2label": LABELS, "problem_type": "multi_label_classification"}))
    made = {
        "ce-mood": mood,
        "ce-value": toys.make_classifier(model_dir, folder / "value", labels=1, seed=1),
        "ce-vector": toys.make_embedder(model_dir, folder / "vector", seed=2),
        "ce-plain": toys.make_adapter(model_dir, folder / "plain", seed=3),
    }
    for name, directory in made.items():
        client.adapters.create(name, directory)
    return made


def test_classifiers_and_vectors_beside_generation(client: Client, model_dir: Path, adapters: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    rows = [{"input_ids": tokenizer(text, return_tensors="pt")["input_ids"]} for text in TEXTS]
    with ThreadPoolExecutor(5) as pool:
        mood = pool.submit(client.classify, "ce-mood", TEXTS)
        value = pool.submit(client.classify, "ce-value", TEXTS)
        vector = pool.submit(client.embed, "ce-vector", TEXTS, normalize=False)
        generated = [
            pool.submit(client.generate, name, TEXTS[1], max_tokens=12, ignore_eos=True)
            for name in ("base", "ce-plain")
        ]
    result = mood.result()
    expected = logits_of(classifier_on(model_dir, adapters["ce-mood"], 3), rows)
    torch.testing.assert_close(served_logits(result), expected, atol=TOLERANCE, rtol=0)
    assert (result.problem_type, result.model, result.version) == ("multi_label", "ce-mood", 1)
    assert result.usage.prompt_tokens == sum(row["input_ids"].shape[1] for row in rows)
    for one, logits in zip(result.results, expected, strict=True):
        assert [score.label for score in one.labels] == list(LABELS.values())
        assert [score.probability for score in one.labels] == pytest.approx(logits.sigmoid().tolist(), abs=1e-4)
        assert one.predicted_label == LABELS[str(int(logits.argmax()))]
    numbers = value.result()
    expected = logits_of(classifier_on(model_dir, adapters["ce-value"], 1), rows)
    torch.testing.assert_close(served_logits(numbers), expected, atol=TOLERANCE, rtol=0)
    assert numbers.problem_type == "regression"
    assert numbers.results[0].labels[0].probability is None
    plain = AutoModel.from_pretrained(model_dir, dtype=torch.float32)
    embedder = PeftModel.from_pretrained(plain, adapters["ce-vector"]).eval()
    with torch.no_grad():
        states = torch.stack([embedder(**row)[0][0, -1] for row in rows])
    vectors = torch.tensor([one.values for one in vector.result().embeddings])
    torch.testing.assert_close(vectors, states, atol=TOLERANCE, rtol=0)
    prompt = rows[1]["input_ids"][0].tolist()
    for future, adapter in zip(generated, (None, adapters["ce-plain"]), strict=True):
        Reference(model_dir, adapter).assert_greedy(prompt, future.result().token_ids)


def states_of(model: Any, ids: list[int]) -> torch.Tensor:
    """[tokens, hidden]"""
    with torch.no_grad():
        states: torch.Tensor = model(input_ids=torch.tensor([ids]))[0][0]
    return states


@pytest.mark.parametrize("pooling", ["cls", "last", "mean", "max", "mean_sqrt_len", "weightedmean"])
@pytest.mark.parametrize("normalize", [True, False])
def test_each_pooling_normalised_or_not(
    client: Client, bert: Client, model_dir: Path, bert_dir: Path, pooling: str, normalize: bool
) -> None:
    for connected, directory in ((client, model_dir), (bert, bert_dir)):
        model = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
        expected = toys.pooled(states_of(model, [3, 9, 20, 14]), pooling)
        if normalize:
            expected = torch.nn.functional.normalize(expected, dim=0)
        (one,) = connected.embed("base", [[3, 9, 20, 14]], pooling=pooling, normalize=normalize).embeddings
        torch.testing.assert_close(torch.tensor(one.values), expected, atol=TOLERANCE, rtol=0)


def test_an_adapter_that_asks_for_a_pooling_of_its_own_wants_one_named(
    client: Client, model_dir: Path, tmp_path: Path
) -> None:
    directory = toys.make_embedder(model_dir, tmp_path / "sentences", seed=4)
    (directory / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Pooling"}]))
    client.adapters.create("ce-sentences", directory)
    with pytest.raises(FailedPreconditionError, match=r"modules.json.* Name a pooling \(mean, ") as caught:
        client.embed("ce-sentences", [[3, 4, 5]])
    assert caught.value.reason == "POOLING_UNSUPPORTED"
    assert client.embed("ce-sentences", [[3, 4, 5]], pooling="max").pooling == "max"


def test_a_whole_checkpoint_gives_vectors_of_its_own(client: Client, model_dir: Path, tmp_path: Path) -> None:
    tuned = toys.make_checkpoint(model_dir, tmp_path / "tuned")
    client.adapters.create("ce-tuned", tuned)
    result = client.embed("ce-tuned", [[3, 4, 5], [6, 7]], pooling="mean")
    model = AutoModel.from_pretrained(tuned, dtype=torch.float32).eval()
    for one, ids in zip(result.embeddings, ([3, 4, 5], [6, 7]), strict=True):
        with torch.no_grad():
            expected = torch.nn.functional.normalize(model(input_ids=torch.tensor([ids]))[0][0].mean(0), dim=0)
        torch.testing.assert_close(torch.tensor(one.values), expected, atol=TOLERANCE, rtol=0)
    assert result.pooling == "mean"


def test_who_cannot_answer_says_what_can(client: Client, adapters: dict[str, Path]) -> None:
    for model in ("base", "ce-plain", "ce-vector"):
        with pytest.raises(FailedPreconditionError, match="task_type SEQ_CLS") as caught:
            client.classify(model, "dog")
        assert caught.value.reason == "HEAD_MISSING"
    with pytest.raises(FailedPreconditionError, match="use Classify or Embed with it") as caught:
        client.generate("ce-mood", "dog", max_tokens=2)
    assert caught.value.reason == "ADAPTER_CLASSIFIES"
    with pytest.raises(FailedPreconditionError):
        client.score("ce-mood", "the quick dog")
    assert len(client.embed("ce-mood", "dog").embeddings[0].values) == 48
    with pytest.raises(InvalidArgumentError, match="1 to 48"):
        client.embed("base", "dog", dimensions=49)


def test_a_damaged_head_is_refused_at_the_door(client: Client, adapters: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "wrong"
    folder.mkdir()
    for file in adapters["ce-mood"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text(json.dumps({"id2label": LABELS | {"3": "more"}}))
    with pytest.raises(FailedPreconditionError, match="names 4 labels, the head has 3 rows") as caught:
        client.adapters.create("ce-wrong", folder)
    assert caught.value.reason == "ARTIFACT_REJECTED"


def test_the_command_line(server: Server, adapters: dict[str, Path]) -> None:
    done = run_cli("classify", "ce-mood", *TEXTS[:2], address=server.address)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].split() == ["text", "label", "probabilities"]
    done = run_cli("embed", "base", TEXTS[0], "--json", address=server.address)
    vector = json.loads(done.stdout)["embeddings"][0]["values"]
    assert sum(value * value for value in vector) == pytest.approx(1, abs=1e-5)


# ---------------------------------------------------------------------------------------------- an encoder


@pytest.fixture(scope="module")
def bert_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.make_text_encoder(
        tmp_path_factory.mktemp("bert"), kind=AutoModelForSequenceClassification, id2label=LABELS, label2id={}
    )


@pytest.fixture(scope="module")
def bert(bert_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    server = Server(bert_dir, tmp_path_factory.mktemp("served") / "data")
    with server.client() as connected:
        yield connected
    server.close()


def test_an_encoder_classifies_and_embeds(bert: Client, bert_dir: Path, tmp_path: Path) -> None:
    two = toys.make_classifier(bert_dir, tmp_path / "two", labels=2)
    vector = toys.make_embedder(bert_dir, tmp_path / "vector", seed=1)
    bert.adapters.create("two", two, load=True)
    bert.adapters.create("vector", vector)
    tokenizer = AutoTokenizer.from_pretrained(bert_dir)
    rows = [dict(tokenizer(text, return_tensors="pt")) for text in TEXTS]
    rows.append(dict(tokenizer(TEXTS[0], TEXTS[1], return_tensors="pt")))
    assert rows[-1]["token_type_ids"].max() == 1
    inputs: list[Any] = [*TEXTS, (TEXTS[0], TEXTS[1])]
    with ThreadPoolExecutor(4) as pool:
        base = pool.submit(bert.classify, "base", inputs)
        own = pool.submit(bert.classify, "two", inputs)
        vectors = pool.submit(bert.embed, "vector", inputs)
        raw = pool.submit(bert.embed, "base", inputs, pooling="cls", normalize=False, dimensions=5)
    plain = AutoModelForSequenceClassification.from_pretrained(bert_dir, dtype=torch.float32).eval()
    expected = logits_of(plain, rows)
    torch.testing.assert_close(served_logits(base.result()), expected, atol=TOLERANCE, rtol=0)
    assert base.result().problem_type == "single_label"
    assert base.result().results[0].predicted_label == LABELS[str(int(expected[0].argmax()))]
    probabilities = [score.probability for score in base.result().results[0].labels]
    assert probabilities == pytest.approx(expected[0].softmax(-1).tolist(), abs=1e-4)
    expected = logits_of(classifier_on(bert_dir, two, 2), rows)
    torch.testing.assert_close(served_logits(own.result()), expected, atol=TOLERANCE, rtol=0)
    trunk = AutoModel.from_pretrained(bert_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        first = torch.stack([trunk(**row)[0][0, 0, :5] for row in rows])
        embedder = PeftModel.from_pretrained(trunk, vector).eval()
        mean = torch.stack([torch.nn.functional.normalize(embedder(**row)[0][0].mean(0), dim=0) for row in rows])
    torch.testing.assert_close(
        torch.tensor([one.values for one in raw.result().embeddings]), first, atol=TOLERANCE, rtol=0
    )
    torch.testing.assert_close(
        torch.tensor([one.values for one in vectors.result().embeddings]), mean, atol=TOLERANCE, rtol=0
    )
    assert vectors.result().pooling == "mean"


def test_an_encoder_says_what_it_can_do(bert: Client) -> None:
    for call in (
        lambda: bert.generate("base", "dog"),
        lambda: bert.chat("base", [{"role": "user", "content": "dog"}]),
        lambda: bert.score("base", "dog"),
        lambda: bert.tuning.create(
            strategy="lora", dataset=bert.datasets.upload([{"text": "dog"}] * 2), adapter="x", config={}
        ),
    ):
        with pytest.raises(FailedPreconditionError, match="BertForSequenceClassification, an encoder") as caught:
            call()
        assert caught.value.reason == "BASE_IS_ENCODER"
    with pytest.raises(InvalidArgumentError, match="at most 64"):
        bert.embed("base", "dog " * 70)
    assert bert.tokenize("dog").tokens == ("[CLS]", "dog", "[SEP]")
