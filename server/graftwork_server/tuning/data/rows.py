"""Examples to token rows, and which tokens carry loss.

Loss falls on what the model is to write, and on the end of sequence after it: a model that never learned the end does
not stop. A row that is cut loses its end of sequence with the rest, so that it does not teach a false end.
What a row shows before its completion is, token for token, what serving gives the model for the same input.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from graftwork_plugins import IGNORED_LABEL, TrainingRow
from graftwork_server.errors import InvalidArgument
from graftwork_server.tuning.data.lines import (
    Chat,
    Example,
    Instruction,
    LineProblem,
    PromptCompletion,
    Text,
    read_examples,
)

if TYPE_CHECKING:
    from graftwork_server.text import TextProcessor


def instruction_prompt(instruction: str, input: str) -> str:
    """The prompt of an instruction row where the base model has no chat template; give Generate the same text.

    With a chat template the row is a conversation instead: a user message of `instruction`, an empty line and `input`
    (if there is one), then the output as the assistant's answer; give Chat the same message.
    """
    context = f"### Input:\n{input}\n\n" if input else ""
    return f"### Instruction:\n{instruction}\n\n{context}### Response:\n"


def tokenize_rows(lines: Iterable[bytes], text: TextProcessor, max_sequence_tokens: int) -> Iterator[TrainingRow]:
    """Rows of a data set that check_dataset found valid, in order; 0 max_sequence_tokens: no row is cut.

    Raises InvalidArgument (DATASET_INVALID) at the first line that cannot be used.
    """
    for number, example in read_examples(lines):
        try:
            if isinstance(example, LineProblem):
                raise example
            row = tokenize_example(example, text)
        except LineProblem as problem:
            field = f"line {number}"
            raise InvalidArgument(f"{field}: {problem}", reason="DATASET_INVALID", field=field) from problem
        yield cut(row, max_sequence_tokens)


def tokenize_example(example: Example, text: TextProcessor) -> TrainingRow:
    """One example as a row, not cut. Raises LineProblem if the chat template, the tokenizer or the model does not take
    it, and FailedPrecondition (NO_CHAT_TEMPLATE, ...) if chat rows cannot be used with this base model at all."""
    row = _tokenized(example, text)
    rows = text.facts.embedding_rows
    unknown = next((id for id in row.input_ids if id >= rows), None) if rows else None
    if unknown is not None:
        raise LineProblem(
            f"token {text.token_text(unknown)!r} has the id {unknown}, for which the base model has no embedding; its "
            f"ids end at {rows - 1}"
        )
    return row


def _tokenized(example: Example, text: TextProcessor) -> TrainingRow:
    try:
        match example:
            case Chat(messages):
                return _chat(messages, text)
            case PromptCompletion(prompt, completion):
                return _completion(prompt, completion, text)
            case Instruction(instruction, input, output) if text.has_chat_template:
                task = f"{instruction}\n\n{input}" if input else instruction
                return _chat([{"role": "user", "content": task}, {"role": "assistant", "content": output}], text)
            case Instruction(instruction, input, output):
                return _completion(instruction_prompt(instruction, input), output, text)
            case Text(content):
                ids = _with_end(text.encode(content), text)
                return TrainingRow(ids, list(ids))
    except InvalidArgument as error:
        raise LineProblem(error.message) from error


def cut(row: TrainingRow, max_sequence_tokens: int) -> TrainingRow:
    """The first `max_sequence_tokens` tokens of a row; 0: all."""
    if not max_sequence_tokens or len(row.input_ids) <= max_sequence_tokens:
        return row
    return TrainingRow(row.input_ids[:max_sequence_tokens], row.labels[:max_sequence_tokens])


def loss_tokens(row: TrainingRow) -> int:
    """Tokens of a row that carry loss. The first never does: nothing precedes it."""
    return sum(label != IGNORED_LABEL for label in row.labels[1:])


def learned_ends(row: TrainingRow, text: TextProcessor) -> set[int]:
    """Tokens that end what is learned of a row: those before which a model may stop."""
    ends: set[int] = set()
    run: list[int] = []
    for label in (*row.labels, IGNORED_LABEL):
        if label != IGNORED_LABEL:
            run.append(label)
            continue
        if (end := _end(run, text)) is not None:
            ends.add(end)
        run = []
    return ends


def _completion(prompt: str, completion: str, text: TextProcessor) -> TrainingRow:
    prompt_ids, completion_ids = text.encode_completion(prompt, completion)
    completion_ids = _with_end(completion_ids, text)
    return TrainingRow(prompt_ids + completion_ids, [IGNORED_LABEL] * len(prompt_ids) + completion_ids)


def _chat(messages: list[dict[str, str]], text: TextProcessor) -> TrainingRow:
    taught = text.encode_taught_chat(messages)
    ids = list(taught.ids)
    labels = [id if learned else IGNORED_LABEL for id, learned in zip(ids, taught.mask, strict=True)]
    end = text.end_of_sequence_id
    if messages[-1]["role"] == "assistant" and not taught.ended and end is not None:
        # A template without a token for the end of a turn: the model would never learn to stop.
        ids.append(end)
        labels.append(end)
    return TrainingRow(ids, labels)


def _with_end(ids: list[int], text: TextProcessor) -> list[int]:
    end = text.end_of_sequence_id
    return ids if end is None or _end(ids, text) is not None else [*ids, end]


def _end(ids: Sequence[int], text: TextProcessor) -> int | None:
    """The token that `ids` end with, white space after it passed over; of several ends, the one that comes first."""
    end = None
    for id in reversed(ids):
        if id in text.end_ids:
            end = id
        elif text.token_text(id).strip():
            break
    return end
