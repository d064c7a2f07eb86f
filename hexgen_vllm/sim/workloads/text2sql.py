"""Seeded text-to-SQL workflows with the statistics of CHESS on BIRD.

A workflow runs: information retriever (4 calls, keyword extraction after the first in two of
three workflows), two candidates in parallel, revise rounds one after the other, unit tester,
one unit test, unit tester, evaluations in parallel, unit tester.

Prompts share three layers token for token: the stage's template, the database schema, and what
the workflow's own calls share. Databases and templates are the same for every seed, as they are
for a service; questions, lengths and the rest of every prompt are not.

Distributions of lengths are given by a few quantiles, with straight lines between them.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from dataclasses import dataclass
from typing import Final

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.option import check, option
from hexgen_vllm.sim.workloads.workload import (
    CallGroup,
    CallSpec,
    Layer,
    WorkflowSpec,
    generator,
    workflow_stream,
)

TYPE: Final = "text2sql"
WITH_SCHEMA: Final = frozenset({"generate_candidate/a", "generate_candidate/b", "revise"})
KEYWORDS_SHARE: Final = 2 / 3  # of workflows that extract keywords
UNTESTED_SHARE: Final = 0.044  # of workflows that write no unit test, hence evaluate nothing
EVALUATIONS: Final = {3: 10, 4: 12, 5: 30, 6: 34}  # parallel evaluations: weight
SKEWED_ROUNDS: Final = {0: 10, 1: 14, 2: 12, 3: 14, 4: 10, 5: 10, 7: 4, 8: 6, 9: 10}
MAX_ROUNDS: Final = 10


@dataclass(frozen=True, slots=True)
class Quantiles:
    """A distribution of token counts.

    Attributes:
        points: (share, tokens) pairs, shares rising from 0 to 1, tokens never falling.
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        shares = [share for share, _ in self.points]
        tokens = [value for _, value in self.points]
        rising = shares == sorted(set(shares)) and tokens == sorted(tokens)
        if len(shares) < 2 or shares[0] != 0 or shares[-1] != 1 or not rising:
            raise ConfigError("quantiles must go from share 0 to share 1 and never fall.")

    def at(self, share: float) -> int:
        """Return the token count that ``share`` of draws do not exceed; share is in [0, 1]."""
        index = min(bisect_right(self.points, (share, float("inf"))), len(self.points) - 1)
        (left, low), (right, high) = self.points[index - 1], self.points[index]
        return round(low + (high - low) * (share - left) / (right - left))

    def draw(self, rng: random.Random) -> int:
        """Return one draw."""
        return self.at(rng.random())


def quantiles(*points: tuple[float, float]) -> Quantiles:
    """Return the distribution through ``points``, each (percent, tokens)."""
    return Quantiles(tuple((percent / 100, tokens) for percent, tokens in points))


# Tokens of each fixed stage template; the two candidates have a prompt of their own each.
TEMPLATES: Final[dict[str, int]] = {
    "information_retriever": 213,
    "extract_keywords": 630,
    "generate_candidate/a": 9158,
    "generate_candidate/b": 5292,
    "revise": 3059,
    "unit_tester": 213,
    "generate_unit_test": 436,
    "evaluate": 261,
}
# Prompt tokens by part. EVIDENCE and QUESTION depend on the question, PAIR and TESTED on the
# candidates' length; parts that depend on the same thing are drawn at the same share.
SCHEMA: Final = quantiles((0, 1900), (5, 2450), (50, 2600), (75, 3400), (90, 4800), (100, 5200))
QUESTION: Final = quantiles((0, 5), (5, 7), (50, 37), (95, 120), (100, 130))
EVIDENCE: Final = quantiles((0, 15), (5, 20), (50, 110), (95, 420), (100, 560))
PAIR: Final = quantiles((0, 330), (5, 364), (50, 680), (95, 1050), (100, 1180))
TESTED: Final = quantiles((0, 380), (5, 470), (50, 725), (95, 1580), (100, 1720))
# Prompt tokens that belong to one call alone.
OWN: Final[dict[str, Quantiles]] = {
    "information_retriever": quantiles((0, 88), (50, 95), (100, 99)),
    "extract_keywords": quantiles((0, 1), (100, 2)),
    "generate_candidate/a": quantiles((0, 1), (100, 8)),
    "generate_candidate/b": quantiles((0, 1), (100, 8)),
    "revise": quantiles((0, 60), (5, 70), (50, 95), (90, 150), (95, 400), (100, 1100)),
    "unit_tester": quantiles((0, 58), (50, 62), (100, 65)),
    "generate_unit_test": quantiles((0, 8), (100, 20)),
    "evaluate": quantiles((0, 8), (50, 22), (100, 45)),
}
FIRST_OUTPUT: Final = quantiles((0, 5), (50, 26), (95, 42), (100, 46))
OUTPUT: Final[dict[str, Quantiles]] = {
    "information_retriever": quantiles((0, 4), (100, 5)),
    "extract_keywords": quantiles((0, 15), (5, 15), (50, 47), (95, 93), (100, 119)),
    "generate_candidate/a": quantiles((0, 400), (5, 467), (50, 760), (95, 1012), (100, 1060)),
    "generate_candidate/b": quantiles((0, 349), (5, 377), (50, 512), (95, 730), (100, 780)),
    "revise": quantiles(
        (0, 11), (5, 12), (25, 70), (50, 95), (75, 125), (95, 312), (99, 500), (100, 1078)
    ),
    "unit_tester": quantiles((0, 4), (75, 4), (100, 6)),
    "generate_unit_test": quantiles((0, 25), (5, 31), (50, 100), (95, 245), (100, 260)),
    "evaluate": quantiles((0, 22), (88, 22), (95, 123), (100, 357)),
}


@dataclass(frozen=True)
class Text2SqlOptions:
    """What varies between text-to-SQL workloads."""

    databases: int = option(10, "databases asked about, each with a schema", least=1, most=10_000)
    zipf: float = option(1.0, "how unequal their popularity is, 0 is equal", least=0.0, most=10.0)
    retries: str = option(
        "skewed", "how many revise rounds workflows need", choices=("skewed", "uniform", "mixed")
    )
    tenants: tuple[str, ...] = option(("default",), "tenants that send workflows, equally often")

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True)
class _Query:
    """What all calls of one workflow have in common."""

    workflow_id: str
    schema: Layer
    question: float  # share at which question and evidence are drawn
    candidates: float  # share at which the candidates' length is drawn
    rng: random.Random

    def call(self, template: str, shared: int, output: Quantiles | None = None) -> CallSpec:
        """Return a call whose prompt has ``shared`` tokens of the workflow's layer."""
        layers = [Layer(f"template:{template}", TEMPLATES[template])]
        if template in WITH_SCHEMA:
            layers.append(self.schema)
        if shared:
            layers.append(Layer(workflow_stream(self.workflow_id), shared))
        own = OWN[template].draw(self.rng)
        return CallSpec(
            stage=template.partition("/")[0],
            prompt_tokens=sum(layer.tokens for layer in layers) + own,
            output_tokens=(output or OUTPUT[template]).draw(self.rng),
            layers=tuple(layers),
        )


def schemas(options: Text2SqlOptions) -> tuple[tuple[Layer, float], ...]:
    """Return the schema layer and the popularity of every database, most popular first.

    Sizes are spread over the schema distribution weighted by popularity, so that calls, not
    databases, see its quantiles.
    """
    weights = [1.0 / rank**options.zipf for rank in range(1, options.databases + 1)]
    total, order = sum(weights), list(range(options.databases))
    generator(0, "schemas", options.databases).shuffle(order)
    sizes, below = [0] * options.databases, 0.0
    for index in order:
        sizes[index] = SCHEMA.at((below + weights[index] / 2) / total)
        below += weights[index]
    return tuple(
        (Layer(f"schema:{index}", size), weight / total)
        for index, (size, weight) in enumerate(zip(sizes, weights, strict=True))
    )


def text2sql(
    count: int, *, seed: int, options: Text2SqlOptions | None = None
) -> tuple[WorkflowSpec, ...]:
    """Return ``count`` workflows, all arriving at 0; equal seeds give equal workflows."""
    options = options or Text2SqlOptions()
    databases = schemas(options)
    return tuple(_workflow(index, seed, options, databases) for index in range(count))


def _workflow(
    index: int, seed: int, options: Text2SqlOptions, databases: tuple[tuple[Layer, float], ...]
) -> WorkflowSpec:
    rng = generator(seed, TYPE, index)
    layers, weights = zip(*databases, strict=True)
    schema: Layer = rng.choices(layers, weights)[0]
    query = _Query(f"{TYPE}-{seed}-{index}", schema, rng.random(), rng.random(), rng)
    linking, rounds = _linking(query), _rounds(options.retries, rng)
    return WorkflowSpec(
        workflow_id=query.workflow_id,
        type=TYPE,
        stages=(*linking, *_solving(query, rounds), *_testing(query)),
        tenant=rng.choice(options.tenants),
    )


def _linking(query: _Query) -> list[CallGroup]:
    """Find the relevant part of the schema."""
    groups: list[CallGroup] = [(query.call("information_retriever", 0, FIRST_OUTPUT),)]
    if query.rng.random() < KEYWORDS_SHARE:
        groups.append((query.call("extract_keywords", QUESTION.at(query.question)),))
    groups.extend((query.call("information_retriever", 0),) for _ in range(3))
    return groups


def _solving(query: _Query, rounds: int) -> list[CallGroup]:
    """Write two candidates, then revise."""
    evidence = EVIDENCE.at(query.question)
    pair = tuple(query.call(f"generate_candidate/{which}", evidence) for which in "ab")
    return [pair, *((query.call("revise", evidence),) for _ in range(rounds))]


def _testing(query: _Query) -> list[CallGroup]:
    """Write a unit test and judge the candidates by it."""
    tester: list[CallGroup] = [(query.call("unit_tester", 0),) for _ in range(3)]
    if query.rng.random() < UNTESTED_SHARE:
        return tester
    unit_test = query.call("generate_unit_test", PAIR.at(query.candidates))
    width = query.rng.choices(tuple(EVALUATIONS), tuple(EVALUATIONS.values()))[0]
    tested = TESTED.at(query.candidates)
    judged = tuple(query.call("evaluate", tested) for _ in range(width))
    return [tester[0], (unit_test,), tester[1], judged, tester[2]]


def _rounds(profile: str, rng: random.Random) -> int:
    """Draw the number of revise rounds."""
    if profile == "mixed":
        profile = rng.choice(("skewed", "uniform"))
    if profile == "uniform":
        return rng.randint(0, MAX_ROUNDS)
    return rng.choices(tuple(SKEWED_ROUNDS), tuple(SKEWED_ROUNDS.values()))[0]
