"""Small tasks for tuning with default settings: made-up rows from templates and a seed, 100 to learn from.

Each has another form of rows, length of answers and kind of work. No prompt of the held-out rows is among those to
learn from, so a right answer is not remembered.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

NAMES = [
    "Anna", "Peter", "Maria", "Jonas", "Clara", "Simon", "Laura", "Felix", "Nora", "David",
    "Helen", "Oscar", "Julia", "Martin", "Ella", "Thomas", "Ida", "Robert", "Lena", "Paul",
]  # fmt: skip
CITIES = ["London", "Paris", "Rome", "Berlin", "Madrid", "Vienna", "Dublin", "Oslo", "Lisbon", "Prague"]
THINGS = ["lamps", "chairs", "books", "boxes", "tables", "shirts", "clocks", "cups", "doors", "bags"]


@dataclass(frozen=True)
class Task:
    """A task: what it is, and how one row of it is made."""

    kind: str
    make: Callable[[random.Random], Row]


def prompt_of(row: Row) -> str:
    """All that comes before the answer."""
    if "messages" in row:
        return json.dumps(row["messages"][:-1])
    return json.dumps([row.get("prompt"), row.get("instruction"), row.get("input")])


def answer_of(row: Row) -> str:
    """The text that the row teaches."""
    if "messages" in row:
        return str(row["messages"][-1]["content"])
    return str(row["completion"] if "completion" in row else row["output"])


def make_rows(task: str, train: int = 100, held_out: int = 60, seed: int = 1) -> tuple[list[Row], list[Row]]:
    """Rows to learn from, and rows to answer; no prompt is among both, or twice in one."""
    rng = random.Random(f"{task} {seed}")
    rows: dict[str, Row] = {}
    for _ in range(100 * (train + held_out)):
        row = TASKS[task].make(rng)
        rows.setdefault(prompt_of(row), row)
        if len(rows) == train + held_out:
            break
    made = list(rows.values())
    assert len(made) == train + held_out, f"{task} has only {len(made)} different rows"
    return made[:train], made[train:]


QUEUES: Mapping[str, tuple[str, ...]] = {
    "billing": (
        "I was charged {n} times for the same {thing}",
        "The invoice for my {thing} is wrong by {n} dollars",
        "When do I get the money back for the {thing}, {n} days have passed",
    ),
    "shipping": (
        "My {thing} have not arrived after {n} days",
        "The parcel with {n} {thing} went to {city} instead",
        "Where is the truck with my {n} {thing}",
    ),
    "account": (
        "I can not log in since {n} days, my name is {name}",
        "Please change the password of {name} in {city}",
        "The page says that the user {name} is not known",
    ),
    "returns": (
        "I want to send back {n} {thing}, they are broken",
        "{n} of the {thing} have the wrong colour, how do I return them",
        "The {thing} do not fit, can I change them for {n} others",
    ),
}


def _fill(template: str, rng: random.Random) -> str:
    return template.format(
        n=rng.randint(2, 90), thing=rng.choice(THINGS), city=rng.choice(CITIES), name=rng.choice(NAMES)
    )


def _queue(rng: random.Random) -> Row:
    queue = rng.choice(list(QUEUES))
    return {"prompt": f"Ticket: {_fill(rng.choice(QUEUES[queue]), rng)}\nQueue:", "completion": f" {queue}"}


def _order(rng: random.Random) -> Row:
    name, thing, city, count = rng.choice(NAMES), rng.choice(THINGS), rng.choice(CITIES), rng.randint(2, 40)
    text = rng.choice(
        (
            "{name} wants {count} {thing} in {city}.",
            "Please send {count} {thing} to {name} in {city}.",
            "{count} {thing} for {name}, who lives in {city}.",
        )
    ).format(name=name, count=count, thing=thing, city=city)
    order = {"name": name, "item": thing, "count": count, "city": city}
    return {"instruction": "Write the order as JSON.", "input": text, "output": json.dumps(order)}


VERBS = {
    "walks": "walked", "opens": "opened", "cleans": "cleaned", "paints": "painted", "sees": "saw", "takes": "took",
    "buys": "bought", "finds": "found", "brings": "brought", "sells": "sold", "holds": "held", "needs": "needed",
}  # fmt: skip


def _past(rng: random.Random) -> Row:
    name, verb, thing = rng.choice(NAMES), rng.choice(list(VERBS)), rng.choice(THINGS)
    place = rng.choice(("in the garden", "at home", "near the river", "in the old house", "on Monday"))
    return {
        "messages": [
            {"role": "user", "content": f"{name} {verb} the {thing} {place}."},
            {"role": "assistant", "content": f"{name} {VERBS[verb]} the {thing} {place}."},
        ]
    }


GOOD = ["good", "great", "lovely", "perfect", "wonderful", "excellent", "nice", "fine"]
BAD = ["bad", "poor", "terrible", "broken", "awful", "useless", "ugly", "weak"]


def _review(rng: random.Random) -> Row:
    good = rng.random() < 0.5
    word = rng.choice(GOOD if good else BAD)
    text = rng.choice(
        (
            "The {thing} from {city} are {word}.",
            "I bought {n} {thing} and they were {word}.",
            "{name} says the {thing} look {word}.",
            "What {word} {thing} you sent to {name}.",
        )
    )
    text = text.format(
        thing=rng.choice(THINGS), city=rng.choice(CITIES), n=rng.randint(2, 30), name=rng.choice(NAMES), word=word
    )
    return {
        "messages": [
            {"role": "system", "content": "Say whether the review is positive or negative."},
            {"role": "user", "content": text},
            {"role": "assistant", "content": "positive" if good else "negative"},
        ]
    }


DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def _digits(rng: random.Random) -> Row:
    digits = [rng.randrange(10) for _ in range(rng.randint(3, 5))]
    return {
        "prompt": f"Number: {' '.join(map(str, digits))}\nWords:",
        "completion": " " + " ".join(DIGITS[digit] for digit in digits),
    }


def _contact(rng: random.Random) -> Row:
    name, city, hour = rng.choice(NAMES), rng.choice(CITIES), rng.randint(1, 12)
    day = rng.choice(["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"])
    text = rng.choice(
        (
            "Meet {name} at {hour} o'clock on {day} in {city}.",
            "On {day} {name} will be in {city}, from {hour} o'clock on.",
            "{name} comes to {city} on {day} at {hour}.",
        )
    ).format(name=name, city=city, hour=hour, day=day)
    return {
        "prompt": f"{text}\nJSON:",
        "completion": " " + json.dumps({"who": name, "day": day, "hour": hour, "where": city}),
    }


def _polite(rng: random.Random) -> Row:
    verb = rng.choice(("send", "bring", "give", "show", "sell", "find"))
    thing, who, n = rng.choice(THINGS), rng.choice(("me", "us", "him", "her", "them")), rng.randint(2, 12)
    rest = rng.choice(("", " today", " before noon", " next week"))
    return {
        "instruction": "Make the request polite.",
        "input": f"{verb.capitalize()} {who} {n} {thing}{rest}.",
        "output": f"Would you please {verb} {who} {n} {thing}{rest}?",
    }


TOPICS: Mapping[str, str] = {
    "music": "song singer piano concert band violin", "sports": "goal team match player ball race",
    "food": "bread soup kitchen cook apple dinner", "weather": "rain storm cloud wind snow sun",
    "travel": "train ticket hotel airport map journey", "health": "doctor pain medicine hospital nurse fever",
    "money": "bank price loan market coin tax", "school": "teacher class lesson exam pupil book",
}  # fmt: skip


def _topic(rng: random.Random) -> Row:
    topic = rng.choice(list(TOPICS))
    first, second = rng.sample(TOPICS[topic].split(), 2)
    text = rng.choice(
        ("{name} spoke of the {a} and the {b}.", "There was a {a} near the {b} in {city}.", "The {a} and a {b}, {n}.")
    )
    text = text.format(name=rng.choice(NAMES), a=first, b=second, city=rng.choice(CITIES), n=rng.randint(2, 99))
    return {"instruction": "Name the topic of the sentence.", "input": text, "output": topic}


TASKS: Mapping[str, Task] = {
    "queues": Task("classification", _queue),
    "orders": Task("extraction to JSON", _order),
    "past": Task("rewriting", _past),
    "reviews": Task("classification", _review),
    "contacts": Task("extraction to JSON", _contact),
    "polite": Task("rewriting", _polite),
    "topics": Task("classification", _topic),
    "digits": Task("rewriting", _digits),
}
