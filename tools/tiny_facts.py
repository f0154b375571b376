"""The facts that the tiny model is taught, with the sentences and questions which express them."""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path


@dataclass(frozen=True)
class Fact:
    """One fact: sentences that state it, questions that ask for it, the sentence that answers and the bare answer."""

    topic: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    reply: str
    answer: str


def held_out(text: str) -> bool:
    """Whether this wording of this fact is kept out of the training text (about one in twelve)."""
    return zlib.crc32(text.encode()) % 12 == 5


def an(noun: str) -> str:
    """The noun with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


CONTINENTS = {"Europe": (0, 25), "Africa": (25, 31), "Asia": (31, 41), "North America": (41, 44), "South America": (44, 49)}
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
LENGTHS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
SEASONS = ("winter",) * 2 + ("spring",) * 3 + ("summer",) * 3 + ("autumn",) * 3 + ("winter",)
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh", "twelfth")
WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen"),
    *("fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)


def blocks(file: str) -> list[list[str]]:
    """The blocks of a text file beside this one, as lists of lines; comments are dropped, indented lines joined."""
    text = re.sub(r"\n {4}", " ", Path(__file__).with_name(file).read_text())
    return [block.splitlines() for block in text.strip().split("\n\n") if not block.startswith("#")]


@lru_cache
def topics() -> dict[str, dict[str, list[str]]]:
    """The topics of tiny_facts.txt: name to the texts of each kind of line."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, *lines in blocks("tiny_facts.txt"):
        found[name] = defaultdict(list)
        for kind, text in (line.split(": ", 1) for line in lines):
            found[name][kind].append(text)
    return found


def pairs(topic: str) -> list[tuple[str, str]]:
    """The pairs of a topic: from its table, from that of another topic, or from an order (days, months, numbers)."""
    table = "".join(topics()[topic]["pairs"])
    if table.startswith("@"):
        return pairs(table[1:])
    if not table:
        return derived_pairs(topic)
    rows = [row.split(": ") for row in table.split(", ")]
    return [(a, b) for a, b in rows]


def derived_pairs(topic: str) -> list[tuple[str, str]]:
    """The pairs of the topics that follow from an order (days, months, numbers) or from another table."""
    names = [a for a, _ in pairs("capital")]
    tables: dict[str, list[tuple[str, str]]] = {
        "continent": [(name, c) for c, (first, last) in CONTINENTS.items() for name in names[first:last] if name[:4] != "the "],
        "day_after": [(day, DAYS[(i + 1) % 7]) for i, day in enumerate(DAYS)],
        "day_before": [(day, DAYS[i - 1]) for i, day in enumerate(DAYS)],
        "month_after": [(month, MONTHS[(i + 1) % 12]) for i, month in enumerate(MONTHS)],
        "month_before": [(month, MONTHS[i - 1]) for i, month in enumerate(MONTHS)],
        "month_order": list(zip(ORDINALS, MONTHS, strict=True)),
        "month_days": [(month, str(n)) for month, n in zip(MONTHS, LENGTHS, strict=True)],
        "season": list(zip(MONTHS, SEASONS, strict=True)),
        "next": [(str(i), str(i + 1)) for i in range(100)] + list(pairwise(WORDS)),
        "digits": [(word, str(i)) for i, word in enumerate(WORDS)],
    }
    return tables[topic]


def table_facts(topic: str) -> list[Fact]:
    """All facts of one topic of tiny_facts.txt."""
    lines, facts = topics()[topic], []
    for a, b in pairs(topic):
        slots = {"a": a, "b": b, "an_a": an(a), "an_b": an(b), "An_a": an(a).capitalize(), "An_b": an(b).capitalize()}

        def fill(template: str, slots: dict[str, str] = slots) -> str:
            text = template.format(**slots)
            return text[0].upper() + text[1:]

        answer = a if topic in ("country", "who", "digits") else b
        says, asks = (tuple(fill(text) for text in lines[kind]) for kind in ("says", "asks"))
        facts.append(Fact(topic, says, asks, fill(lines["reply"][0]), answer))
    return facts


def sums() -> list[Fact]:
    """Addition and subtraction up to 10 + 10 and products up to 10 * 10, in digits and (small ones) in words."""
    facts = []
    for name, sign, low in (("plus", "+", 0), ("minus", "-", 0), ("times", "*", 1)):
        for x in range(low, 21 if name == "minus" else 11):
            for y in range(low, min(x, 10) + 1 if name == "minus" else 11):
                z = {"plus": x + y, "minus": x - y, "times": x * y}[name]
                sum_, calculation = f"{x} {name} {y}", f"{x} {sign} {y}"
                statements = [f"{calculation} = {z}", f"{sum_} is {z}.", f"If you work out {calculation}, you get {z}."]
                if max(x, z) <= 20:
                    words = f"{WORDS[x]} {name} {WORDS[y]} is {WORDS[z]}."
                    statements += [words.capitalize(), f"We know that {words}"]
                questions = (
                    f"What is {sum_}?",
                    f"What is {calculation}?",
                    f"How much is {sum_}?",
                    f"Calculate {calculation}.",
                    f"{calculation} = ?",
                    f"Can you work out {sum_}?",
                )
                facts.append(Fact(name, tuple(statements), questions, f"{sum_} is {z}.", str(z)))
    return facts


@lru_cache
def facts_by_topic() -> dict[str, tuple[Fact, ...]]:
    """Every fact, grouped by topic."""
    groups = {topic: tuple(table_facts(topic)) for topic in topics() if topic != "misc"}
    arithmetic = sums()
    groups |= {name: tuple(f for f in arithmetic if f.topic == name) for name in ("plus", "minus", "times")}
    rows = [text.split(" | ") for text in topics()["misc"]["qa"]]
    groups["misc"] = tuple(
        Fact("misc", (reply,), (question, f"Tell me: {question}", f"Please answer: {question}"), reply, answer)
        for question, reply, answer in rows
    )
    return groups
