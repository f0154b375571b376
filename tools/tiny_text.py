"""The training text of the tiny model: stories, facts and chats from a seeded grammar.

Templates use `[a|b|c]` for alternatives (nested ones allowed) and `{slot}` for what a story has fixed; a line that starts
with `?` is left out half of the time. Text of a document is plain; chats use the ChatML control tokens.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass

from tiny_facts import Fact, an, blocks, facts_by_topic, held_out

GIRLS, BOYS = (
    ("Anna", "Lily", "Mia", "Emma"),
    ("Tom", "Ben", "Max", "Leo"),
)  # few, so that a small model learns to keep them apart
ANIMALS = (
    *("fox", "rabbit", "bear", "mouse", "cat", "dog", "hedgehog", "squirrel", "duck"),
    *("owl", "frog", "turtle", "elephant", "lion", "monkey", "goat", "pony", "badger"),
)
TRAITS = (
    *("little", "kind", "clever", "brave", "shy", "curious", "cheerful"),
    *("quiet", "lazy", "friendly", "careful", "young", "gentle", "funny", "small"),
)
PLACES = (
    "[in a small village|in a quiet village near the hills]",
    "[at the edge of a green forest|deep in the forest]",
    "[in a white house by the sea|near the sea]",
    "[on a farm|on an old farm with many apple trees]",
    "[at the foot of a high mountain|in a hut on a mountain]",
    "[beside a wide river|in a little house by the river]",
    "[in a busy town|in a town with narrow streets]",
    "[on a small island|on an island with tall palm trees]",
)


@dataclass(frozen=True)
class Plot:
    """A kind of story: what it is about (for requests), what varies together, its lines and its closing thought."""

    about: str
    slots: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    lines: tuple[str, ...]
    moral: str


def read_plots() -> dict[str, Plot]:
    """The plots of tiny_stories.txt by name."""
    found = {}
    for head, slots, *lines in blocks("tiny_stories.txt"):
        name, about = head.split(": ", 1)
        rows = tuple(tuple(line[2:].split(" / ")) for line in lines if line.startswith("- "))
        told = tuple(line for line in lines[:-1] if not line.startswith("- "))
        found[name] = Plot(about, tuple(slots.split()[1:]), rows, told, lines[-1].removeprefix("! "))
    return found


PLOTS = read_plots()
PRONOUNS = {"girl": ("she", "her", "her"), "boy": ("he", "him", "his")}
ELDERS = (
    *(("Mother", "girl"), ("Father", "boy"), ("Grandmother", "girl"), ("Grandfather", "boy")),
    *(("Aunt May", "girl"), ("Uncle Joe", "boy")),
)
OPENINGS = (
    "Once upon a time, there was {an_hero} [named|called] {n}. {N} lived {place}.",
    "{N} was {an_hero} who lived {place}.",
    "There once was {an_hero} [called|named] {n} who lived {place}.",
    "[Long ago|Many years ago], {an_hero} [named|called] {n} lived {place}.",
    "{N} the {species} lived {place}. "
    "[Everyone liked {him}.|{N} was very {trait}.|{He} was {trait} and always had time for others.]",
    "This is the story of {n}, {an_hero} who lived {place}.",
)
FRIENDS = (
    "{N} had a [good|dear|best] friend, {f} the {fspecies}.",
    "Next door lived {f} the {fspecies}, and the two were [friends|good friends].",
    "{His} best friend was a {fspecies} [named|called] {f}.",
    "{N} and {f} the {fspecies} [did everything together|met every day].",
)
ENDINGS = (
    "",
    "",
    "The end.",
    "[And they were happy.|And that is the end of the story.|And so the day ended well.]",
    "[Everyone was happy.|Then they all went to sleep.]",
)


def expand(rng: random.Random, template: str, slots: Mapping[str, str]) -> str:
    """Choose every alternative of a template, from the inside out, and fill its slots."""
    while "[" in template or "{" in template:
        template = re.sub(r"\[([^\[\]]*)\]", lambda m: rng.choice(m[1].split("|")), template)
        template = template.format_map(slots)
    return template


def person(rng: random.Random, species: str | None = None) -> dict[str, str]:
    """A character: species, name, pronouns."""
    sex = rng.choice(("girl", "boy"))
    species = species or (sex if rng.random() < 0.4 else rng.choice(ANIMALS))
    sex = species if species in PRONOUNS else sex
    he, him, his = PRONOUNS[sex]
    return {"name": rng.choice(GIRLS if sex == "girl" else BOYS), "species": species, "he": he, "him": him, "his": his}


@dataclass(frozen=True)
class Story:
    """A story with what a request or a question may refer to."""

    text: str
    about: str
    hero: dict[str, str]
    friend: dict[str, str] | None


def story(rng: random.Random, hero: dict[str, str] | None = None, kind: str | None = None) -> Story:
    """Tell one story about the hero (drawn if None) of one kind of PLOTS."""
    hero = hero or person(rng)
    friend = person(rng, rng.choice(("girl", "boy")) if hero["species"] in PRONOUNS and rng.random() < 0.5 else None)
    while friend["name"] == hero["name"]:
        friend = person(rng)
    p = PLOTS[kind or rng.choice(list(PLOTS))]
    elder, esex = rng.choice(ELDERS)
    trait = rng.choice(TRAITS)
    slots = {
        "n": hero["name"], "he": hero["he"], "him": hero["him"], "his": hero["his"], "species": hero["species"], "trait": trait,
        "an_hero": an(f"{trait} {hero['species']}"), "f": friend["name"], "fhe": friend["he"],
        "fhim": friend["him"], "fhis": friend["his"], "fspecies": friend["species"], "elder": elder, "ehe": PRONOUNS[esex][0],
        "ehim": PRONOUNS[esex][1], "place": rng.choice(PLACES),
    } | dict(zip(p.slots, rng.choice(p.rows), strict=True))  # fmt: skip
    slots |= {key.capitalize(): value[0].upper() + value[1:] for key, value in slots.items() if key[0].islower()}
    lines = [rng.choice(OPENINGS)]
    if has_friend := bool(re.search(r"\{[fF](h\w+)?\}", " ".join((*p.lines, *slots.values())))):
        lines.append(rng.choice(FRIENDS))
    lines += [line.removeprefix("? ") for line in p.lines if not line.startswith("?") or rng.random() < 0.5]
    lines += [p.moral] if rng.random() < 0.8 else []
    lines += [ending] if (ending := rng.choice(ENDINGS)) else []
    texts = [expand(rng, line, slots) for line in lines]
    split = rng.randrange(2, len(texts)) if rng.random() < 0.5 else 0
    text = "\n\n".join(filter(None, (" ".join(texts[:split]), " ".join(texts[split:]))))
    return Story(text, expand(rng, p.about, slots), hero, friend if has_friend else None)


def draw_fact(rng: random.Random, power: float) -> Fact:
    """A fact: topics weigh as a power of their size (0: all topics alike, 1: all facts alike)."""
    groups = facts_by_topic()
    topic = rng.choices(list(groups), [len(g) ** power for g in groups.values()])[0]
    return rng.choice(groups[topic])


def wording(rng: random.Random, texts: tuple[str, ...]) -> str:
    """One of the wordings that are not held out (the first if all are)."""
    return rng.choice([t for t in texts if not held_out(t)] or texts[:1])


def fact_page(rng: random.Random, power: float) -> str:
    """A page of facts: statements, or questions with answers, of mixed topics or of one topic."""
    groups = facts_by_topic()
    group = rng.choice(list(groups.values())) if rng.random() < 0.3 else None
    facts = [rng.choice(group) if group else draw_fact(rng, power) for _ in range(rng.randint(1, 7))]
    style = rng.random()
    if style < 0.55:
        return rng.choice((" ", "\n")).join(wording(rng, f.statements) for f in facts)
    ask, reply = rng.choice((("Question: ", "Answer: "), ("Q: ", "A: "), ("", "")))
    return rng.choice(("\n", "\n\n")).join(
        f"{ask}{wording(rng, f.questions)}\n{reply}{f.reply if rng.random() < 0.8 else f.answer}" for f in facts
    )


def people_page(rng: random.Random) -> str:
    """Who is who: a few people and animals are presented, then asked for; practice in looking back."""
    names = rng.sample((*GIRLS, *BOYS), rng.randint(1, 4))
    people = {name: rng.choice(("girl" if name in GIRLS else "boy", *ANIMALS)) for name in names}
    rooms = ("house", "forest", "hut", "barn", "cave", "tower", "garden", "village")
    places = dict(zip(names, rng.sample(rooms, len(names)), strict=True))
    form = "[{n} is {a}.|{n} the {t} is here.|This is {n} the {t}.|There is {a} [named|called] {n}.] {n} lives in the {p}."
    lines = [expand(rng, form, {"n": n, "a": an(t), "t": t, "p": places[n]}) for n, t in people.items()]
    for name in rng.choices(list(people), k=rng.randint(1, 4)):
        kind, place = people[name], places[name]
        asked = (
            (f"Who is {name}?", f"{name} is {an(kind)}."),
            (f"Who lives in the {place}?", f"{name} lives in the {place}."),
            (f"Where does {name} live?", f"{name} lives in the {place}."),
            (f"Say {name}.", f"{name}, {name}, {name}!"),
        )
        lines += [" ".join(rng.choice(asked))]
    return rng.choice((" ", "\n")).join(lines)


START, END = "<|im_start|>", "<|im_end|>"
SYSTEMS = (
    "You are a helpful assistant.",
    "You are tiny, a small language model.",
    "You are a friendly assistant.",
    "Answer the questions.",
)
SMALL_TALK = (
    (
        "[Hello|Hi|Hello there|Good morning|Hey][!|.|, tiny!]",
        "[Hello! How can I help you?|Hello! What would you like to know?|Hi! Ask me a question or ask for a story.]",
    ),
    ("How are you[?| today?]", "[I am fine, thank you. How can I help you?|I am very well, thank you!]"),
    ("[Thank you|Thanks|Thank you very much|Great, thanks][!|.]", "[You are welcome!|You are welcome. Is there anything else?]"),
    ("[Goodbye|Bye|See you later|Good night][!|.]", "[Goodbye! See you soon.|Goodbye! Have a nice day.]"),
    (
        "[Who won the game yesterday?|What will I dream tonight?|How old am I?|What is in my pocket?|"
        "What is the weather like now?|Where are my shoes?]",
        "[I do not know that.|I am sorry, I do not know that.]",
    ),
    (
        "[Say something nice.|Make me happy.|I am sad.]",
        "[You are a good friend, and tomorrow is a new day.|I hope that the sun shines for you today.]",
    ),
)
ASK_STORY = (
    "[Tell me|Please tell me|Can you tell me] a [story|short story] about {topic}[.|]",
    "[Write|Please write] a [story|short story] about {topic}.",
    "[I would like|I want] to hear a story about {topic}.",
)


def chat_text(messages: list[tuple[str, str]]) -> str:
    """Messages of (role, text) in ChatML."""
    return "".join(f"{START}{role}\n{text}{END}\n" for role, text in messages)


def casual(rng: random.Random, question: str) -> str:
    """The question as people type it: as it is, in small letters, without its mark, or with a polite word."""
    style = rng.random()
    if style < 0.1:
        return question.lower().rstrip("?.")
    if style < 0.2:
        return question.rstrip("?.")
    if style < 0.26:
        return f"{rng.choice(('Please tell me:', 'Hi!', 'One question:', 'And now:'))} {question}"
    return question


def story_turns(rng: random.Random) -> list[tuple[str, str]]:
    """A request for a story, the story, and sometimes a question about it."""
    told = story(rng)
    name, species, friend = told.hero["name"], told.hero["species"], told.friend
    a_species, style = an(species), rng.random()
    topics = (f"{a_species} [named|called] {name}", a_species, f"{name} the {species}", told.about, f"{name} and {told.about}",
              f"{a_species} and {told.about}")  # fmt: skip
    topic = topics[int(style * len(topics))]
    ask = "[Tell me a story.|Tell me a short story.|Please tell me a story.]" if rng.random() < 0.1 else rng.choice(ASK_STORY)
    turns = [("user", expand(rng, expand(rng, ask, {"topic": topic}), {})), ("assistant", told.text)]
    if rng.random() < 0.4:
        about = [
            ("[Who is the story about?|Who is this story about?]", f"The story is about {name} the {species}."),
            (f"What was the name of the {species}?", f"The {species} was named {name}."),
            (f"[What kind of animal is|Who is] {name}?", f"{name} is {a_species}."),
        ]
        if friend:
            about.append(
                (f"Who was the friend of {name}?", f"The friend of {name} was {friend['name']} the {friend['species']}.")
            )
        question, reply = rng.choice(about)
        turns += [("user", expand(rng, question, {})), ("assistant", reply)]
    return turns


def name_turns(rng: random.Random, power: float) -> list[tuple[str, str]]:
    """The user gives a name and asks for it again later."""
    name = rng.choice((*GIRLS, *BOYS))
    hello = expand(rng, "[Hello! |Hi, |]My name is {name}.", {"name": name})
    turns = [("user", hello), ("assistant", f"Nice to meet you, {name}!")]
    for _ in range(rng.randint(0, 2)):
        turns += fact_turns(rng, power)
    return [*turns, ("user", rng.choice(("What is my name?", "Do you know my name?"))), ("assistant", f"Your name is {name}.")]


def fact_turns(rng: random.Random, power: float) -> list[tuple[str, str]]:
    """One question and its answer."""
    fact = draw_fact(rng, power)
    return [("user", casual(rng, wording(rng, fact.questions))), ("assistant", fact.reply)]


def chat(rng: random.Random, power: float) -> str:
    """A conversation of one to six exchanges."""
    turns = [("system", rng.choice(SYSTEMS))] if rng.random() < 0.3 else []
    style = rng.random()
    if style < 0.18:
        return chat_text(turns + story_turns(rng))
    if style < 0.23:
        return chat_text(turns + name_turns(rng, power))
    for _ in range(rng.randint(1, 5)):
        if rng.random() < 0.12:
            ask, reply = rng.choice(SMALL_TALK)
            turns += [("user", expand(rng, ask, {})), ("assistant", expand(rng, reply, {}))]
        else:
            turns += fact_turns(rng, power)
    return chat_text(turns)


def document(rng: random.Random, power: float = 0.6) -> str:
    """One document of the training text; `power` as in draw_fact."""
    kinds = (lambda: story(rng).text, lambda: people_page(rng), lambda: fact_page(rng, power), lambda: chat(rng, power))
    return rng.choices(kinds, (3, 5, 7, 9))[0]()


@dataclass(frozen=True)
class Check:
    """A prompt with the text that a greedy continuation must contain (before the first line end or control token)."""

    kind: str
    prompt: str
    expected: str


def checks() -> list[Check]:
    """All wordings that the training text leaves out: as text to continue and as questions in a chat."""
    found = []
    for topic, facts in facts_by_topic().items():
        for fact in facts:
            taught = not held_out(fact.statements[0])
            for text in filter(held_out, fact.statements[1:]):
                head, _, tail = text.rpartition(fact.answer)
                if taught and head and len(tail) <= 1:
                    found.append(Check(f"text/{topic}", head.rstrip(), fact.answer))
            for text in filter(held_out, fact.questions):
                if not all(map(held_out, fact.questions)):
                    found.append(Check(f"chat/{topic}", f"{START}user\n{text}{END}\n{START}assistant\n", fact.reply))
    return found
