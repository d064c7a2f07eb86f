"""Pairs of a question and the query that answers it, drawn from phrasings and a schema.

Queries have the form of :mod:`hexgen_vllm.text2sql.sql_grammar` wherever that has one for them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from examples.text2sql.train.schemas import Source, plural
from examples.text2sql.train.vocabulary import SaidColumn, SaidLink, SaidTable

NUMBERS: Final = ("two", "three", "four", "five", "six", "seven", "eight", "nine")
MONTHS: Final = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
_AGGREGATES: Final = {
    "AVG": ("average", "mean"),
    "SUM": ("total", "sum of the", "total sum of the"),
    "MAX": ("highest", "largest", "maximum", "greatest"),
    "MIN": ("lowest", "smallest", "minimum"),
}


class NoPairError(Exception):
    """The schema has nothing to ask in this way."""


@dataclass(frozen=True)
class Pair:
    """A question and its query.

    Attributes:
        source: the schema.
        question: the question.
        sql: the query.
        tables: tables of the query.
        columns: columns of the query that are no keys, by table.
        words: words of the question that are values.
        noun: what the question is about, in its own word.
        outputs: what the columns of the result are called.
        most: most rows that a right result has, ``None`` if nobody knows.
    """

    source: Source
    question: str
    sql: str
    tables: tuple[str, ...]
    columns: dict[str, list[str]]
    words: tuple[str, ...]
    noun: str
    outputs: tuple[str, ...]
    most: int | None


def draw(source: Source, rng: random.Random) -> Pair:
    """Return a pair about ``source``."""
    while True:
        question = Asked(source, rng)
        ask = rng.choices(_KINDS, _WEIGHTS)[0]
        try:
            text = ask(question, rng.choice(source.said.tables))
            return question.pair(" ".join(text.split()))
        except NoPairError:
            continue


@dataclass
class Asked:
    """A query that is being put together, and what is said of it.

    Attributes:
        source: the schema.
        rng: what draws.
        hidden: tables of an inner query.
    """

    source: Source
    rng: random.Random
    columns: dict[str, list[str]] = field(default_factory=dict)
    conditions: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    noun: str = ""
    select: str = ""
    tail: str = ""
    outputs: tuple[str, ...] = ()
    most: int | None = None
    hidden: list[str] = field(default_factory=list)

    def pair(self, text: str) -> Pair:
        """Return the finished pair; ``text`` is the question."""
        text = re.sub(r" (?=[?.,])", "", text)
        if self.rng.random() < 0.05:
            text = text.lower()
        if self.rng.random() < 0.1:
            text = text.rstrip("?.")
        tables, clause = self._from()
        where = f"\nWHERE {' AND '.join(self.conditions)}" if self.conditions else ""
        sql = f"SELECT {self.select}\nFROM {clause}{where}{self.tail}"
        words = [word for value in self.words for word in value.split() if len(word) > 2]
        words = [word for word in dict.fromkeys(words) if word in text or word.lower() in text]
        words = [word if word in text else word.lower() for word in words][:4]
        for name in self.hidden:
            self.columns.setdefault(name, [])
        return Pair(
            self.source,
            text,
            sql,
            (*tables, *self.hidden),
            self.columns,
            tuple(words),
            self.noun or "none",
            self.outputs,
            self.most,
        )

    def table(self, name: str) -> SaidTable:
        """Take a table into the query."""
        self.columns.setdefault(name, [])
        return self.source.said.table(name)

    def column(self, table: SaidTable, column: SaidColumn | str) -> str:
        """Take a column into the query; return its name in SQL."""
        name = column if isinstance(column, str) else column.name
        known = self.columns.setdefault(table.name, [])
        plain = {one.name for one in table.columns}
        if name in plain and name not in known:
            known.append(name)
        return f"{table.name}.{name}"

    def pick(self, *options: str) -> str:
        """Return one of ``options``."""
        return self.rng.choice(options)

    def maybe(self, chance: float) -> bool:
        """Return whether it happens."""
        return self.rng.random() < chance

    def of_kind(self, table: SaidTable, *kinds: str) -> SaidColumn:
        """Return a column of ``table`` of one of ``kinds``."""
        found = [column for column in table.columns if column.kind in kinds]
        if not found:
            raise NoPairError
        return self.rng.choice(found)

    def children(self, table: SaidTable) -> list[tuple[SaidTable, SaidLink]]:
        """Return the tables that point at ``table``."""
        return [
            (one, link)
            for one in self.source.said.tables
            for link in one.links
            if link.target == table.name
        ]

    def _from(self) -> tuple[tuple[str, ...], str]:
        schema = self.source.schema
        order = [table for table in schema.tables if table.name in self.columns]

        def extended(taken: list[str]) -> list[str] | None:
            if len(taken) == len(order):
                return taken
            for table in order:
                if table.name in taken or not self._on(table.name, taken):
                    continue
                if found := extended([*taken, table.name]):
                    return found
            return None

        for first in order:
            if taken := extended([first.name]):
                break
        else:
            raise NoPairError
        clause = taken[0]
        for at, name in enumerate(taken[1:], 1):
            clause += f" JOIN {name} ON {self._on(name, taken[:at])}"
        return tuple(taken), clause

    def _on(self, name: str, others: Sequence[str]) -> str:
        schema = self.source.schema
        for other in others:
            for left, right in ((name, other), (other, name)):
                table = schema.table(left)
                assert table is not None
                for column in table.columns:
                    if column.references and column.references[0] == right:
                        return f"{left}.{column.name} = {right}.{column.references[1]}"
        return ""


# What a row is said to be like.


def _number(asked: Asked, column: SaidColumn) -> int:
    value = asked.rng.randint(column.low, column.high)
    return round(value, -1) if value > 40 and asked.maybe(0.6) else value


def _value(asked: Asked, column: SaidColumn) -> str:
    if not column.values:
        raise NoPairError
    value = asked.rng.choice(column.values)
    asked.words.append(value)
    return value


def _quoted(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def _article(word: str) -> str:
    return f"an {word}" if word[:1] in "aeiou" else f"a {word}"


def _condition(asked: Asked, table: SaidTable, column: SaidColumn, place: str) -> str:
    """Add a condition on ``column``; return it as it stands at ``place``."""
    name = asked.column(table, column)
    said = asked.pick(*column.said)
    if column.kind in ("label", "category"):
        return _text(asked, column, name, said, place)
    if place == "bare":
        raise NoPairError
    if column.kind == "number":
        return _amount(asked, column, name, said, place)
    return _time(asked, column, name, place)


def _text(asked: Asked, column: SaidColumn, name: str, said: str, place: str) -> str:
    if column.nullable and place != "bare" and asked.maybe(0.35):
        if asked.maybe(0.75):
            asked.conditions.append(f"{name} IS NULL")
            if place == "after":
                return asked.pick(
                    f"without {said}",
                    f"with no {said}",
                    f"that have no {said}",
                    f"without {_article(said)}",
                    f"whose {said} is missing",
                )
            return asked.pick(f"have no {said}", f"do not have {_article(said)}", f"lack {said}")
        asked.conditions.append(f"{name} IS NOT NULL")
        return (
            asked.pick(f"with {_article(said)}", f"that have {_article(said)}")
            if place == "after"
            else f"have {_article(said)}"
        )
    value = _value(asked, column)
    if column.kind == "label":
        if place != "after":
            raise NoPairError
        if asked.maybe(0.4):
            word = asked.rng.choice(value.split())
            asked.words[-1:] = [word]
            asked.conditions.append(f"{name} LIKE '%{word}%'")
            return asked.pick(f"with {word} in the {said}", f"whose {said} contains {word}")
        asked.conditions.append(f"{name} = {_quoted(value)}")
        return asked.pick(f"called {value}", f"named {value}", f"with the {said} {value}")
    shown = value.lower() if place == "bare" and asked.maybe(0.8) else value
    shown = value.lower() if asked.maybe(0.1) else shown
    if place == "bare":
        if not column.bare:
            raise NoPairError
        asked.conditions.append(f"{name} = {_quoted(value)}")
        return shown
    if asked.maybe(0.05):
        asked.conditions.append(f"{name} <> {_quoted(value)}")
        return (
            f"whose {said} is not {shown}"
            if place == "after"
            else f"have another {said} than {shown}"
        )
    asked.conditions.append(f"{name} = {_quoted(value)}")
    if place == "after":
        general = (
            f"with the {said} {shown}",
            f"with {said} {shown}",
            f"of the {said} {shown}",
            f"whose {said} is {shown}",
            f"in {shown} {said}",
        )
        return (
            asked.pick(*general[:4])
            if not column.after or asked.maybe(0.3)
            else asked.pick(*column.after).format(shown)
        )
    if column.bare and asked.maybe(0.3):
        return f"are {plural(shown)}"
    if not column.predicates or asked.maybe(0.2):
        return asked.pick(f"have the {said} {shown}", f"have {said} {shown}")
    return asked.pick(*column.predicates).format(shown)


_COMPARED: Final = (
    (">", ("more than {}", "over {}", "above {}")),
    ("<", ("less than {}", "under {}", "below {}", "fewer than {}")),
    (">=", ("at least {}", "{} or more")),
    ("<=", ("at most {}", "{} or less")),
    ("=", ("{}", "exactly {}")),
)


def _amount(asked: Asked, column: SaidColumn, name: str, said: str, place: str) -> str:
    n = _number(asked, column)
    if asked.maybe(0.1):
        more = n + asked.rng.randint(1, max(2, column.high // 2))
        asked.conditions += [f"{name} >= {n}", f"{name} <= {more}"]
        phrase = f"between {n} and {more}"
    else:
        sign, phrases = asked.rng.choices(_COMPARED, (5, 4, 3, 2, 1))[0]
        asked.conditions.append(f"{name} {sign} {n}")
        phrase = asked.pick(*phrases).format(n)
    if column.predicates and asked.maybe(0.6):
        verb = asked.pick(*column.predicates)
        return f"{verb} {phrase}" if place == "predicate" else f"that {verb} {phrase}"
    counted = any(one.startswith("number of") for one in column.said)
    if counted and asked.maybe(0.7):
        have = f"{phrase} {column.said[0]}"
    elif phrase.split()[0] in ("above", "below", "over", "under", "between"):
        have = f"{_article(said)} {phrase}"
    else:
        have = f"{_article(said)} of {phrase}"
    if place == "predicate":
        return f"have {have}"
    return asked.pick(f"with {have}", f"that have {have}", f"whose {said} is {phrase}")


def _time(asked: Asked, column: SaidColumn, name: str, place: str) -> str:
    verb = asked.pick(*column.verb)
    were = "" if verb == "joined" else "were "
    begin = (
        f"{were}{verb}" if place == "predicate" else asked.pick(verb, verb, f"that {were}{verb}")
    )
    if column.kind == "date" and column.nullable and asked.maybe(0.45):
        if asked.maybe(0.65):
            asked.conditions.append(f"{name} IS NULL")
            if place == "predicate":
                return asked.pick(
                    f"have not been {verb}",
                    f"were not {verb}",
                    f"were never {verb}",
                    f"have not been {verb} yet",
                )
            return asked.pick(
                f"that have not been {verb}",
                f"not yet {verb}",
                f"not {verb}",
                f"that were never {verb}",
                f"without {_article(column.said[0])}",
            )
        asked.conditions.append(f"{name} IS NOT NULL")
        return begin if begin.startswith(("that", "were")) else f"that were {verb}"
    year = asked.rng.randint(1950 if column.kind == "year" or "born" in verb else 2010, 2024)
    if column.kind == "year":
        sign, phrase = asked.rng.choices(
            (
                (">", "after {}"),
                ("<", "before {}"),
                ("=", "in {}"),
                (">=", "since {}"),
                (">=", "in {} or later"),
                ("<=", "up to {}"),
            ),
            (4, 4, 3, 1, 1, 1),
        )[0]
        if asked.maybe(0.1):
            later = year + asked.rng.randint(1, 20)
            asked.conditions += [f"{name} >= {year}", f"{name} <= {later}"]
            return f"{begin} between {year} and {later}"
        asked.conditions.append(f"{name} {sign} {year}")
        return f"{begin} {phrase.format(year)}"
    month = asked.rng.randint(1, 12)
    whole = f"{year}-{month:02}-{asked.rng.randint(1, 28):02}"
    condition, phrase = asked.rng.choices(
        (
            (f"LIKE '%{year}-{month:02}%'", f"in {MONTHS[month - 1]} {year}"),
            (f"LIKE '%{year}%'", f"in {year}"),
            (f"> '{year}-12-31'", f"after {year}"),
            (f"< '{year}-01-01'", f"before {year}"),
            (f"= '{whole}'", f"on {whole}"),
            (f"> '{whole}'", f"after {whole}"),
            (f"< '{whole}'", f"before {whole}"),
        ),
        (4, 4, 3, 2, 1, 1, 1),
    )[0]
    asked.conditions.append(f"{name} {condition}")
    return f"{begin} {phrase}" if place == "predicate" or asked.maybe(0.6) else phrase


def _group(asked: Asked, table: SaidTable, most: int = 2, depth: int = 2) -> str:
    """Return a noun with up to ``most`` conditions, such as "crime books by authors from Japan"."""
    asked.table(table.name)
    asked.noun = asked.noun or table.many.split()[-1]
    before, behind = "", ""
    used: set[str] = set()
    for _ in range(asked.rng.choices(range(most + 1), (3, 5, 2)[: most + 1])[0]):
        if len(asked.conditions) > 1:
            break
        if table.links and depth and not behind and asked.maybe(0.35):
            behind = _owner(asked, table, depth - 1)
            continue
        if not (free := [one for one in table.columns if one.name not in used]):
            break
        column = asked.rng.choice(free)
        used.add(column.name)
        if column.bare and not before and asked.maybe(0.6):
            before = _condition(asked, table, column, "bare")
        elif not behind:
            behind = _condition(asked, table, column, "after")
    return f"{before} {table.many} {behind}"


def _owner(asked: Asked, table: SaidTable, depth: int, place: str = "after") -> str:
    """Return a condition on what ``table`` points at, such as "by authors from Japan"."""
    link = asked.rng.choice(table.links)
    if link.target == table.name or link.target in asked.columns:
        raise NoPairError
    target = asked.table(link.target)
    said = asked.pick(*(link.after if place == "after" else link.predicates))
    if target.links and depth and asked.maybe(0.12):
        return _owner(asked, target, depth - 1, place)  # the table between is not spoken of
    if target.label and asked.maybe(0.4):
        name = asked.column(target, target.label)
        value = _value(asked, target.label)
        asked.conditions.append(f"{name} = {_quoted(value)}")
        shown = value.lower() if asked.maybe(0.35) else value
        if asked.maybe(0.3):
            return f"{said} the {target.one} {shown}"
        return f"{said} {shown}"
    before = len(asked.conditions)
    group = _group(asked, target, 1, depth)
    if len(asked.conditions) == before:
        raise NoPairError
    return f"{said} {asked.pick('', '', 'the')} {group}"


def _which(asked: Asked, table: SaidTable, depth: int = 1) -> str:
    """Return a noun and a predicate, such as "books were published after 1990"."""
    asked.table(table.name)
    asked.noun = asked.noun or table.many.split()[-1]
    before = ""
    if (bare := [one for one in table.columns if one.bare]) and asked.maybe(0.35):
        chosen = asked.rng.choice(bare)
        before = _condition(asked, table, chosen, "bare")
        others = [one for one in table.columns if one.kind != "label" and one != chosen]
    else:
        others = [one for one in table.columns if one.kind != "label"]
    behind = ""
    if others and not before and asked.maybe(0.2):
        one = asked.rng.choice(others)
        others.remove(one)
        behind = _condition(asked, table, one, "after")
        if len(asked.conditions) > 1:
            raise NoPairError
    if table.links and depth and asked.maybe(0.3):
        predicate = _owner(asked, table, depth - 1, "predicate")
    elif others:
        chosen = asked.rng.choice(others)
        others.remove(chosen)
        predicate = _condition(asked, table, chosen, "predicate")
        if others and not (before or behind) and len(asked.conditions) < 2 and asked.maybe(0.25):
            predicate += f" {_condition(asked, table, asked.rng.choice(others), 'after')}"
    else:
        raise NoPairError
    return f"{before} {table.many} {behind} {predicate}"


# Kinds of questions.


def _shown(asked: Asked, table: SaidTable) -> tuple[str, str]:
    """Return what names a row: column and word."""
    if table.label is None:
        shown = asked.source.schema.names()[table.name]
        if table.key not in shown:
            raise NoPairError  # its key has several columns
        return asked.column(table, table.key), asked.pick("id", "number")
    return asked.column(table, table.label), asked.pick(*table.label.said)


def _give(asked: Asked, *said: str) -> str:
    listed = " and ".join(said) if len(said) < 3 else f"{', '.join(said[:-1])} and {said[-1]}"
    return f"{asked.pick('Give', 'Give', 'Show', 'Return', 'Give the', 'Show the')} {listed}"


def _count(asked: Asked, table: SaidTable) -> str:
    asked.select, asked.outputs, asked.most = "COUNT(*)", ("number",), 1
    if asked.maybe(0.45):
        said = _which(asked, table, 2)
        return f"How many {said}?"
    group = _group(asked, table)
    name = asked.source.said.name
    texts = (
        f"How many {group} are there?",
        f"How many {group} do we have?",
        f"Count the {group}.",
        f"Count all {group}.",
        f"What is the number of {group}?",
        f"Give the number of {group}.",
        f"How many {group} does the {name} have?",
        f"How many {group} exist?",
        f"How many {group} are in the {name}?",
        f"Tell me how many {group} there are.",
        f"How many {group} are known?",
        f"How many different {group} does the {name} hold?",
    )
    return asked.pick(*texts)


def _list(asked: Asked, table: SaidTable) -> str:
    first, word = _shown(asked, table)
    if asked.maybe(0.5):
        asked.select, asked.outputs = first, (word,)
        if asked.maybe(0.65):
            return f"Which {_which(asked, table, 2)}?"
        group = _group(asked, table)
        return asked.pick(
            f"Name all {group}.",
            f"List all {group}.",
            f"List the {group}.",
            f"Which {group} are there?",
            f"Name the {group}.",
            f"Show all {group}.",
            f"Who are the {group}?",
            f"Find all {group}.",
        )
    columns = asked.rng.sample(
        table.columns, min(len(table.columns), asked.rng.choice((1, 1, 2, 3)))
    )
    if asked.maybe(0.5) and table.label:
        columns = [table.label, *(one for one in columns if one != table.label)][
            : max(len(columns), 1)
        ]
    if not columns:
        raise NoPairError
    words = [asked.pick(*one.said) for one in columns]
    asked.select = ", ".join(asked.column(table, one) for one in columns)
    asked.outputs = tuple(words)
    if asked.maybe(0.3):
        return f"Which {_which(asked, table)}? {_give(asked, *words)}."
    if len(words) == 1 and asked.maybe(0.7):
        words = [plural(words[0])]
    listed = " and ".join(words) if len(words) < 3 else f"{words[0]}, {words[1]} and {words[2]}"
    verb = asked.pick("List", "Show", "Give", "Find", "Return", "What are", "Name", "List")
    return (
        f"{verb} the {listed} of {asked.pick('all', 'the', 'all the', '')} {_group(asked, table)}."
    )


def _ordered(asked: Asked, table: SaidTable) -> str:
    column = asked.of_kind(table, "number", "number", "year")
    shown, word = _shown(asked, table)
    name, said = asked.column(table, column), asked.pick(*column.said)
    down = asked.maybe(0.7)
    superlatives = column.most if down else column.least
    count = asked.rng.randint(2, 9)
    number = asked.pick(NUMBERS[count - 2], NUMBERS[count - 2], str(count))
    asked.most = count
    direction = " DESC" if down else ""
    asked.tail = f"\nORDER BY {name}{direction}\nLIMIT {count}"
    both = asked.maybe(0.7)
    asked.select = f"{shown}, {name}" if both else shown
    asked.outputs = (word, said) if both else (word,)
    group = _group(asked, table, 1, 1)
    best = asked.pick(*superlatives) if superlatives else ""
    if best and asked.maybe(0.6):
        text = asked.pick(
            f"What are the {number} {best} {group}?",
            f"Which are the {number} {best} {group}?",
            f"Name the {number} {best} {group}.",
            f"List the {number} {best} {group}.",
            f"Which {number} {group} are the {best}?",
        )
    else:
        best = (
            asked.pick("most", "highest", "largest")
            if down
            else asked.pick("fewest", "lowest", "smallest")
        )
        text = asked.pick(
            f"Which {number} {group} have the {best} {said}?",
            f"List the {number} {group} with the {best} {said}.",
            f"Which are the {number} {group} with the {best} {said}?",
        )
    if superlatives and asked.maybe(0.4):
        best = asked.pick(*superlatives)
    first = asked.pick(f", {best} first", f", {best} first", "")
    if both:
        return f"{text} {_give(asked, word, said)}{first}."
    return text if text.endswith(".") or not first else f"{text} {best.capitalize()} first."


def _sorted(asked: Asked, table: SaidTable) -> str:
    columns = [one for one in table.columns if one.kind in ("number", "year", "label")]
    if len(columns) < 2:
        raise NoPairError
    column = asked.rng.choice(columns)
    shown, word = _shown(asked, table)
    name, said = asked.column(table, column), asked.pick(*column.said)
    down = column.kind != "label" and asked.maybe(0.6)
    asked.tail = f"\nORDER BY {name}{' DESC' if down else ''}"
    both = name != shown and asked.maybe(0.5)
    asked.select = f"{shown}, {name}" if both else shown
    asked.outputs = (word, said) if both else (word,)
    group = _group(asked, table, 1, 1)
    order = f"in order of {said}" if not down else f"sorted by {said}, largest first"
    if column.kind == "label":
        order = asked.pick(f"sorted by {said}", "in alphabetical order", f"ordered by {said}")
    named = f"{plural(word)} and {said}" if both else plural(word)
    return f"List the {named} of {asked.pick('all', 'the')} {group}, {order}."


def _superlative(asked: Asked, table: SaidTable) -> str:
    column = asked.of_kind(table, "number", "number", "year")
    shown, word = _shown(asked, table)
    name, said = asked.column(table, column), asked.pick(*column.said)
    down = asked.maybe(0.7)
    best = column.most if down else column.least
    asked.tail = f"\nORDER BY {name}{' DESC' if down else ''}\nLIMIT 1"
    asked.most = 1
    both = asked.maybe(0.6)
    asked.select = f"{shown}, {name}" if both else shown
    asked.outputs = (word, said) if both else (word,)
    group = table.one
    asked.noun = asked.noun or table.one.split()[-1]
    give = f"{_give(asked, word, said)}." if both else ""
    its = asked.pick("", "its ", "the ")
    if both and asked.maybe(0.4):
        give = f"Give {its}{word} and {said}."
    superlative = asked.pick(*best) if best else ""
    if both and superlative and asked.maybe(0.4):
        return asked.pick(
            f"What is the {word} and {said} of the {superlative} {group}?",
            f"What are {word} and {said} of the {superlative} {group}?",
            f"Give {word} and {said} of the {superlative} {group}.",
        )
    if superlative and asked.maybe(0.55):
        return asked.pick(
            f"What is the {superlative} {group}? {give}",
            f"Which {group} is the {superlative}? {give}",
            f"Which is the {superlative} {group}? {give}",
        )
    large = (
        asked.pick("largest", "highest", "most", "biggest")
        if down
        else asked.pick("smallest", "lowest", "fewest")
    )
    return f"Which {group} has the {large} {said}? {give}"


def _aggregate(asked: Asked, table: SaidTable) -> str:
    column = asked.of_kind(table, "number")
    function = asked.rng.choices(("AVG", "SUM", "MAX", "MIN"), (4, 4, 2, 2))[0]
    name, said = asked.column(table, column), asked.pick(*column.said)
    asked.select, asked.most = f"{function}({name})", 1
    asked.outputs = (f"{_AGGREGATES[function][0]} {said}",)
    group = _group(asked, table)
    if function == "SUM":
        if column.whole and asked.maybe(0.6):
            whole = asked.pick(*column.whole)
            if "[]" in whole:
                behind = group.split(table.many, 1)[1]
                if not behind.strip() or group.strip()[: len(table.many)] != table.many:
                    raise NoPairError
                return f"How many {whole.replace('[]', behind)}{asked.pick('', ' in total')}?"
            whole = whole.format(asked.pick("all ", "the ", "") + group)
            begin = "What" if whole.startswith("did") else "How many"
            return f"{begin} {whole} {asked.pick('together', 'in total', 'altogether')}?"
        if asked.maybe(0.4):
            which, end = asked.pick("all", "the", ""), asked.pick("together", "in total")
            return f"How many {said} do {which} {group} have {end}?"
    superlatives = column.most if function == "MAX" else column.least if function == "MIN" else ()
    if superlatives and asked.maybe(0.3):
        return asked.pick(
            f"What is the {said} of the {asked.pick(*superlatives)} of the {group}?",
            f"How many {said} has the {asked.pick(*superlatives)} of the {group}?",
            f"What is the {asked.pick(*superlatives)} "
            f"{group.replace(table.many, table.one, 1)} in {said}?",
        )
    word = asked.pick(*_AGGREGATES[function])
    return asked.pick(
        f"What is the {word} {said} of {asked.pick('all', 'the', '')} {group}?",
        f"Give the {word} {said} of {asked.pick('all', 'the', '')} {group}.",
        f"What is the {word} {said} of the {group}?",
        f"Compute the {word} {said} of the {group}.",
    )


def _ranked(asked: Asked) -> str:
    """Perhaps sort groups by their number; returns what is said of it."""
    if not asked.maybe(0.4):
        return ""
    down = asked.maybe(0.85)
    asked.tail += f"\nORDER BY 2{' DESC' if down else ''}"
    return (
        asked.pick(
            "Most first.",
            "Most frequent first.",
            "Largest number first.",
            "Sort by the number, largest first.",
        )
        if down
        else asked.pick("Fewest first.", "Smallest number first.")
    )


def _per_value(asked: Asked, table: SaidTable) -> str:
    """How many rows for each value of a column."""
    column = asked.of_kind(table, "category", "category", "year")
    name, said = asked.column(table, column), asked.pick(*column.said)
    asked.select, asked.tail, asked.outputs = f"{name}, COUNT(*)", "\nGROUP BY 1", (said, "number")
    others = [one for one in table.columns if one != column and one.kind != "label"]
    before, behind = "", ""
    asked.noun = table.many.split()[-1]
    asked.table(table.name)
    if others and asked.maybe(0.45):
        other = asked.rng.choice(others)
        if other.bare and asked.maybe(0.7):
            before = _condition(asked, table, other, "bare")
        else:
            behind = _condition(asked, table, other, "after")
    elif table.links and asked.maybe(0.1):
        behind = _owner(asked, table, 0)
    if column.nullable and asked.maybe(0.7):
        asked.conditions.append(f"{name} IS NOT NULL")
    group = f"{before} {table.many} {behind}"
    give = asked.pick("", "", f"Give {said} and number.", f"Give the {said} and the number.")
    each = asked.pick("each", "every", "each")
    text = asked.pick(
        f"How many {group} are there in each {said}?",
        f"How many {group} are there for {each} {said}?",
        f"How many {group} are there per {said}?",
        f"How many {group} has {each} {said}?",
        f"How many {group} does {each} {said} have?",
        f"Count the {group} of {each} {said}.",
        f"Count the {group} by {said}.",
        f"Give the number of {group} for {each} {said}.",
        f"How many {group} live in each {said}?"
        if said in ("city", "country", "town")
        else f"How many {group} are of each {said}?",
        f"How often does {each} {said} occur among the {group}?",
        f"How often was {each} {said} "
        f"{asked.pick('given', 'made', 'seen', 'chosen', 'used', 'found')}?"
        if not (before or behind)
        else f"How many {group} have {each} {said}?",
    )
    return f"{text} {give} {_ranked(asked)}"


def _done_per_value(asked: Asked, table: SaidTable) -> str:
    """How many did each value do: shipments that a carrier delivered."""
    days = [one for one in table.columns if one.kind == "date" and one.nullable]
    column = asked.of_kind(table, "category")
    if not days:
        raise NoPairError
    day = asked.rng.choice(days)
    name, said = asked.column(table, column), asked.pick(*column.said)
    asked.select, asked.tail, asked.outputs = f"{name}, COUNT(*)", "\nGROUP BY 1", (said, "number")
    asked.noun = table.many.split()[-1]
    verb = asked.pick(*day.verb)
    done = asked.column(table, day)
    if asked.maybe(0.6):
        asked.conditions.append(f"{done} IS NOT NULL")
        text = asked.pick(
            f"How many {table.many} were {verb} for each {said}?",
            f"How many {table.many} with each {said} were {verb}?",
            f"How many {table.many} has each {said} {verb}?",
            *(
                (f"How many {table.many} did each {said} {verb[:-2]}?",) * 2
                if verb.endswith("ed")
                else ()
            ),
        )
    else:
        asked.conditions.append(f"{done} IS NULL")
        text = asked.pick(
            f"How many {table.many} of each {said} have not been {verb}?",
            f"How many {table.many} were not {verb} for each {said}?",
        )
    return f"{text} {_ranked(asked)}"


def _owners(asked: Asked, table: SaidTable) -> tuple[SaidLink, SaidTable]:
    """Return another table that rows of ``table`` point at, and how; the query names both."""
    if not table.links:
        raise NoPairError
    link = asked.rng.choice(table.links)
    if link.target == table.name:
        raise NoPairError
    owner = asked.table(link.target)
    asked.table(table.name)
    return link, owner


def _per_owner(asked: Asked, table: SaidTable) -> str:
    """How many rows, or what average, for each row of another table."""
    link, owner = _owners(asked, table)
    name, word = _shown(asked, owner)
    asked.noun = table.many.split()[-1]
    asked.tail = "\nGROUP BY 1"
    numbers = [one for one in table.columns if one.kind == "number"]
    if numbers and asked.maybe(0.45):
        column = asked.rng.choice(numbers)
        function = asked.rng.choices(("AVG", "SUM", "MAX", "MIN"), (5, 3, 2, 1))[0]
        said, kind = asked.pick(*column.said), asked.pick(*_AGGREGATES[function])
        asked.select = f"{name}, {function}({asked.column(table, column)})"
        asked.outputs = (word, f"{_AGGREGATES[function][0]} {said}")
        text = asked.pick(
            f"What is the {kind} {said} of the {table.many} "
            f"{asked.pick('of', *link.after)} each {owner.one}?",
            f"Give the {kind} {said} of the {table.many} for each {owner.one}.",
            f"What is the {kind} {said} of {table.many} per {owner.one}?",
            f"For each {owner.one}, what is the {kind} {said} of its {table.many}?",
        )
        give = asked.pick(
            "",
            f"Give {owner.one} and {_AGGREGATES[function][0]}.",
            f"Give {word} and {kind}.",
            f"Give the {owner.one} and the {_AGGREGATES[function][0]} {said}.",
        )
        return f"{text} {give}"
    asked.select, asked.outputs = f"{name}, COUNT(*)", (word, "number")
    group = _group(asked, table, 1, 0)
    verb = (
        f"How many {group} has each {owner.one} {asked.pick(*link.active)}?" if link.active else ""
    )
    text = asked.pick(
        f"How many {group} does each {owner.one} have?",
        f"How many {group} has each {owner.one}?",
        f"How many {group} are there {asked.pick('for', *link.after)} each {owner.one}?",
        f"How many {group} are there per {owner.one}?",
        f"Count the {group} of each {owner.one}.",
        verb or f"Give the number of {group} for each {owner.one}.",
    )
    give = asked.pick(
        "",
        "",
        f"Give the {owner.one} {word} and the number.",
        f"Give {word} and number.",
        f"Give {owner.one} and number.",
        f"Give {word} and number of {table.many}.",
    )
    return f"{text} {give} {_ranked(asked)}"


def _top_owners(asked: Asked, table: SaidTable) -> str:
    """Which rows of another table have most rows."""
    link, owner = _owners(asked, table)
    name, word = _shown(asked, owner)
    asked.noun = owner.many.split()[-1]
    down = asked.maybe(0.88)
    count = asked.rng.choice((1, 2, 3, 3, 4, 5, 5, 6, 7, 8, 9))
    asked.most = count
    both = asked.maybe(0.9)
    asked.select, asked.outputs = f"{name}, COUNT(*)", (word, f"number of {table.many}")
    asked.tail = f"\nGROUP BY 1\nORDER BY 2{' DESC' if down else ''}\nLIMIT {count}"
    many = asked.pick(NUMBERS[count - 2], NUMBERS[count - 2], str(count)) if count > 1 else ""
    whose = f"Which {many} {owner.many}" if count > 1 else f"Which {owner.one}"
    have = "have" if count > 1 else "has"
    had = asked.pick(have, "had")
    best = "most" if down else "fewest"
    texts = [
        f"{whose} {had} {asked.pick('', 'the')} {best} {table.many}?",
        f"{whose} {have} the {asked.pick('largest', 'highest') if down else 'smallest'} "
        f"number of {table.many}?",
    ]
    for verb in link.active:
        often = "most often" if down else "least often"
        texts += [
            f"{whose} {verb} {often}?",
            f"{whose} {have} {verb} {often}?",
            f"{whose} {verb} {best} {table.many}?",
            f"{whose} {have} {verb} the {best} {table.many}?",
        ]
    first = f", {best} first" if count > 1 and asked.maybe(0.7) else ""
    counted = asked.pick(
        "number",
        f"number of {table.many}",
        f"number of {table.many}",
        "the number",
        f"how many {table.many}",
    )
    give = f"{_give(asked, word, counted)}{first}." if both else ""
    return f"{asked.pick(*texts)} {give}"


def _having(asked: Asked, table: SaidTable) -> str:
    sign, phrases = asked.rng.choices(_COMPARED, (5, 3, 3, 1, 3))[0]
    n = asked.rng.randint(2, 40)
    phrase = asked.pick(*phrases).format(asked.pick(str(n), NUMBERS[n - 2]) if n < 10 else n)
    owned = [link for link in table.links if link.target != table.name]
    if owned and asked.maybe(0.5):
        link = asked.rng.choice(owned)
        owner = asked.table(link.target)
        asked.table(table.name)
        name, word = _shown(asked, owner)
        asked.noun = owner.many.split()[-1]
        verb = asked.pick("have", "had", *link.active)
        texts = [
            f"Which {owner.many} {verb} {phrase} {table.many}?",
            f"List the {owner.many} with {phrase} {table.many}.",
        ]
        if sign == "=" and n < 10:
            whole = f"all {NUMBERS[n - 2]}"
            for other in (one for one in table.links if one.target != owner.name):
                far = asked.source.said.table(other.target)
                for did in link.active or ("found",):
                    texts += [
                        f"Which {owner.many} are {did} in {whole} {far.many}?",
                        f"Which {owner.many} are {did} by {whole} {far.many}?",
                    ] * 2
    else:
        column = asked.of_kind(table, "category")
        name, word = asked.column(table, column), asked.pick(*column.said)
        asked.noun = table.many.split()[-1]
        verb = asked.pick("have", "have", "had")
        texts = [
            f"Which {plural(word)} {verb} {phrase} {table.many}?",
            f"In which {plural(word)} are there {phrase} {table.many}?",
            f"List the {plural(word)} with {phrase} {table.many}.",
        ]
    asked.select, asked.outputs = name, (word,)
    asked.tail = f"\nGROUP BY 1\nHAVING COUNT(*) {sign} {n}"
    return asked.pick(*texts)


def _never(asked: Asked, table: SaidTable) -> str:
    """Rows that nothing points at, directly or through one table more."""
    found = asked.children(table)
    if not found:
        raise NoPairError
    child, link = asked.rng.choice(found)
    if child.name == table.name:
        raise NoPairError
    shown, word = _shown(asked, table)
    asked.noun = table.many.split()[-1]
    further = [
        (far, other)
        for far, other in asked.children(child)
        if far.name not in (table.name, child.name)
    ]
    count = asked.maybe(0.3)
    asked.select = "COUNT(*)" if count else shown
    asked.outputs, asked.most = (("number",), 1) if count else ((word,), None)
    name = f"{child.name}.{link.name}"
    if further and asked.maybe(0.5):
        far, other = asked.rng.choice(further)
        on = f"{far.name}.{other.name} = {child.name}.{child.key}"
        inner = f"SELECT {name} FROM {child.name} JOIN {far.name} ON {on}"
        verbs = [verb for one in far.links for verb in one.active]
        child_of, extra = far, [child, far]
    else:
        inner, verbs, child_of, extra = (
            f"SELECT {name} FROM {child.name}",
            list(link.active),
            child,
            [child],
        )
    asked.tail = f"\nWHERE {table.name}.{table.key} NOT IN ({inner})"
    what = plural(word) if asked.maybe(0.2) and not count else table.many
    begin = f"How many {table.many}" if count else f"Which {what}"
    texts = [
        f"{begin} have no {child_of.many}?",
        f"{begin} have never had a {child_of.one}?",
        f"{begin} are without {child_of.many}?",
        f"{begin} do not have any {child_of.many}?",
    ]
    for verb in verbs:
        texts += [
            f"{begin} have never been {verb}?",
            f"{begin} were never {verb}?",
            f"{begin} has nobody {verb}?",
            f"{begin} has nobody ever {verb}?",
            f"{begin} did no one {verb}?",
            f"{begin} has no one {verb}?",
        ]
    text = asked.pick(*texts)
    asked.hidden = [one.name for one in extra]
    return text


def _distinct(asked: Asked, table: SaidTable) -> str:
    column = asked.of_kind(table, "category", "category", "number", "year")
    name, said = asked.column(table, column), asked.pick(*column.said)
    asked.table(table.name)
    asked.noun = table.many.split()[-1]
    if asked.maybe(0.3):
        asked.select, asked.outputs, asked.most = f"COUNT(DISTINCT {name})", ("number",), 1
        return asked.pick(
            f"How many different {plural(said)} are there among the {table.many}?",
            f"How many different {plural(said)} do the {table.many} have?",
            f"In how many {plural(said)} are there {table.many}?",
            f"How many distinct {plural(said)} of {table.many} are there?",
        )
    asked.select, asked.outputs = f"DISTINCT {name}", (said,)
    group = _group(asked, table, 1, 0)
    if asked.conditions and any(name in one for one in asked.conditions):
        raise NoPairError
    prep = asked.pick("On", "In") if column.kind != "year" else "In"
    return asked.pick(
        f"Which different {plural(said)} do {group} have?",
        f"{prep} which {plural(said)} are there {group}?",
        f"List the different {plural(said)} of {group}.",
        f"Which {plural(said)} of {group} are there?",
        f"What {plural(said)} do the {group} have?",
        f"{prep} which {plural(said)} are the {group}?",
    )


def _having_children(asked: Asked, table: SaidTable) -> str:
    """Rows that some row of another table points at, without doubles."""
    found = asked.children(table)
    if not found:
        raise NoPairError
    child, link = asked.rng.choice(found)
    if child.name == table.name or table.label is None:
        raise NoPairError
    shown, word = _shown(asked, table)
    asked.select, asked.outputs = f"DISTINCT {shown}", (word,)
    asked.table(table.name)
    asked.noun = table.many.split()[-1]
    own = ""
    columns = [one for one in table.columns if one.kind != "label"]
    if columns and asked.maybe(0.5):
        own = _condition(asked, table, asked.rng.choice(columns), "after")
    others = [other for other in child.links if other.target != table.name]
    verb = asked.pick("have", "had", *link.active, *link.active)
    passive = (*link.active, *(verb for one in child.links for verb in one.active))
    if others and asked.maybe(0.4):
        asked.table(child.name)
        child = SaidTable(
            child.name, child.one, child.many, child.columns, tuple(others), child.key
        )
        where = _owner(asked, child, 1)
        did = asked.pick(f"{verb} {child.many}", *(f"were {one}" for one in passive))
        return f"Which {table.many} {own} {did} {where}?"
    before = len(asked.conditions)
    group = _group(asked, child, 1, 0)
    if len(asked.conditions) == before:
        raise NoPairError
    return f"Which {table.many} {own} {verb} {group}?"


def _days_compared(asked: Asked, table: SaidTable) -> str:
    days = [one for one in table.columns if one.kind == "date"]
    if len(days) < 2:
        raise NoPairError
    first, second = asked.rng.sample(days, 2)
    one, other = asked.column(table, first), asked.column(table, second)
    sign, word = asked.rng.choices(((">", "after"), ("<", "before"), ("=", "on")), (5, 2, 1))[0]
    count = asked.maybe(0.6)
    shown, named = _shown(asked, table)
    asked.select, asked.outputs = ("COUNT(*)", ("number",)) if count else (shown, (named,))
    asked.conditions.append(f"{one} {sign} {other}")
    asked.noun = table.many.split()[-1]
    verb, end = (
        asked.pick(*first.verb),
        asked.pick(
            f"the {second.said[0]}",
            f"their {second.said[0]}",
            f"the day they were {second.verb[0]}",
            f"they were {second.verb[0]}",
            f"the {second.verb[0]} day",
        ),
    )
    begin = asked.pick("How many", "How many") if count else "Which"
    late = (
        f" {asked.pick('late', 'too late')}?"
        if sign == ">" and second.verb[0] == "due" and asked.maybe(0.2)
        else f" {word} {end}?"
    )
    return f"{begin} {table.many} were {verb}{late}"


def _days_between(asked: Asked, table: SaidTable) -> str:
    days = [one for one in table.columns if one.kind == "date"]
    if len(days) < 2:
        raise NoPairError
    chosen = asked.rng.sample(range(len(days)), 2)
    first, second = days[min(chosen)], days[max(chosen)]
    start, end = asked.column(table, first), asked.column(table, second)
    function, word = asked.rng.choices((("AVG", "on average"), ("MAX", "at most")), (4, 1))[0]
    asked.select = f"{function}(julianday({end}) - julianday({start}))"
    asked.outputs, asked.most = ("days",), 1
    asked.noun = table.one.split()[-1]
    asked.table(table.name)
    others = [one for one in table.columns if one.kind in ("category", "number")]
    behind = (
        _condition(asked, table, asked.rng.choice(others), "after")
        if others and asked.maybe(0.5)
        else ""
    )
    asked.conditions.append(f"{end} IS NOT NULL")
    what = asked.pick(table.one, second.said[0].split()[0])
    return asked.pick(
        f"How many days does {_article(what)} {behind} take {word}?",
        f"How many days does {_article(what)} take {word} {behind}?",
        f"How many days {word} does {_article(table.one)} {behind} last?",
        f"How many days pass {word} until {_article(table.one)} {behind} is {second.verb[0]}?",
        f"How many days lie {word} between {first.said[0]} and {second.said[0]} "
        f"of {table.many} {behind}?",
    )


def _by_month(asked: Asked, table: SaidTable) -> str:
    column = asked.of_kind(table, "date")
    name, verb = asked.column(table, column), asked.pick(*column.verb)
    year = asked.rng.randint(2015, 2024)
    asked.select, asked.outputs = f"strftime('%m', {name}), COUNT(*)", ("month", "number")
    asked.conditions.append(f"{name} LIKE '{year}-%'")
    asked.tail = "\nGROUP BY 1\nORDER BY 1"
    asked.noun = table.many.split()[-1]
    begun = asked.pick(
        f"were {verb}",
        f"were {verb}",
        "were there",
        "began" if "begun" in column.verb else f"got {verb}",
    )
    return asked.pick(
        f"How many {table.many} {begun} in each month of {year}?",
        f"How many {table.many} {begun} per month in {year}?",
        f"Count the {table.many} {verb} in each month of {year}.",
    ) + asked.pick(
        " Give month and number.", " Give month and number, by month.", "", " Sort by month."
    )


def _product(asked: Asked, table: SaidTable) -> str:
    """A sum of quantities times prices, over a foreign key."""
    amounts = [
        one
        for one in table.columns
        if one.name.startswith(("quantity", "amount", "stock", "seats"))
    ]
    if not amounts or not table.links:
        raise NoPairError
    link = asked.rng.choice(table.links)
    owner = asked.table(link.target)
    prices = [one for one in owner.columns if one.name in ("price", "fee", "total")]
    if not prices or owner.name == table.name:
        raise NoPairError
    asked.table(table.name)
    asked.select = f"SUM({asked.column(table, amounts[0])} * {asked.column(owner, prices[0])})"
    asked.outputs, asked.most = ("total value",), 1
    before = len(asked.conditions)
    said = _group(asked, owner, 1, 0)
    if len(asked.conditions) == before and asked.maybe(0.5):
        raise NoPairError
    what = asked.pick("total value", "value", "total worth")
    done = asked.pick(*link.active) if link.active else "there"
    behind = said.split(owner.many, 1)[1]
    return asked.pick(
        f"What is the {what} of all {said} {done}?",
        f"What is the {what} of the {table.many} {asked.pick(*link.after)} {said}?",
        f"What is the {what} of all {said} that were {done}?",
        *(
            (
                f"What is the {what} of all things {done} {behind}?",
                f"What is the {what} of everything {done} {behind}?",
            )
            if behind.strip() and said.startswith(" ")
            else ()
        ),
    )


_ASKED: Final[tuple[tuple[Callable[[Asked, SaidTable], str], float], ...]] = (
    (_count, 10),
    (_list, 12),
    (_ordered, 6),
    (_sorted, 2),
    (_superlative, 5),
    (_aggregate, 8),
    (_per_value, 8),
    (_done_per_value, 2),
    (_per_owner, 8),
    (_top_owners, 7),
    (_having, 5),
    (_never, 4),
    (_distinct, 4),
    (_having_children, 5),
    (_days_compared, 2.5),
    (_days_between, 1.5),
    (_by_month, 2),
    (_product, 3),
)
_KINDS: Final = [kind for kind, _ in _ASKED]
_WEIGHTS: Final = [weight for _, weight in _ASKED]
