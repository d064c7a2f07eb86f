"""What the command line of ``hexgen-vllm text2sql`` says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.option import check, is_http_url, option

MOST_QUESTION_CHARS: Final = 20_000


@dataclass(frozen=True)
class AgentOptions:
    """Who is asked, how, and how fast."""

    base_url: tuple[str, ...] = option(
        ("http://127.0.0.1:30000/v1",),
        "OpenAI endpoints, URL or NAME=URL; several are asked the same in turn",
    )
    model: str | None = option(None, "served model name; none is the first one")
    api_key: str = option("none", "key for the endpoint")
    users: int = option(0, "users, each with one question; 0 asks every question once", least=0)
    rate: float = option(0.0, "mean arrivals, users/s; 0 is one after the other", least=0.0)
    warmup: int = option(0, "users before those that count", least=0)
    deadline_s: float = option(60.0, "deadline of a question, seconds", least=0.1)
    max_rounds: int = option(4, "most revisions of a candidate query", least=0, most=20)
    same_effort: bool = option(
        False, "two candidates and all revisions, whether a question is early or late"
    )
    temperature: float = option(0.0, "of sampling; 0 takes the likeliest", least=0.0, most=2.0)
    max_tokens: int = option(1024, "longest answer of a call, tokens", least=16)
    constrain: bool = option(
        False, "hold answers to grammars made from the schema; needs vLLM behind the endpoint"
    )
    timeout_s: float = option(600.0, "longest time for one call, seconds", least=1e-3)
    seed: int = option(0, "of the order of questions, of arrivals and of call_seeds", least=0)
    call_seeds: bool = option(
        False,
        "send a seed with every call, so that runs draw alike (vLLM 0.32 on a CPU ends when it "
        "has to split the prompt of such a call)",
    )

    def __post_init__(self) -> None:
        check(self)
        for url in self.base_url:
            if not is_http_url(named_url(url)[1]):
                raise ConfigError(f"base_url must be URL or NAME=URL, not {url!r}.")


@dataclass(frozen=True)
class Options(AgentOptions):
    """What is asked about which database."""

    database: str = option(
        "",
        "file of SQLite or DuckDB, or URL: sqlite:///FILE, duckdb:///FILE, "
        "postgresql://USER:PASSWORD@HOST/NAME; it is only read",
    )
    ask: tuple[str, ...] = option((), "questions, one after the other")
    questions: str | None = option(
        None, "YAML file with a list of {q: question, sql: query that answers it}; sql may lack"
    )
    benchmark: str | None = option(
        None, "folder of BIRD or Spider, instead of database and questions; see the docs"
    )
    split: str = option("dev", "which questions of the benchmark")
    most: int = option(0, "most questions of the benchmark; 0 is all", least=0)
    schema: bool = option(False, "print what a model is told about the database, and ask nothing")
    json: bool = option(False, "print answers and figures as JSON, one object on a line")
    query_time_s: float = option(5.0, "longest time of a query, seconds", least=0.01)
    query_rows: int = option(1000, "most rows of a result", least=1)
    query_bytes: int = option(1_000_000, "largest result, bytes", least=100)
    out: str | None = option(None, "folder for results.json, with all answers")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.benchmark is not None:
            self._check_benchmark()
            return
        if not self.database:
            raise ConfigError("database must name a file or URL.")
        if not self.schema and not self.ask and self.questions is None:
            raise ConfigError("ask or questions must say what is asked.")
        for text in self.ask:
            if not text.strip() or len(text) > MOST_QUESTION_CHARS:
                raise ConfigError(
                    f"ask: a question must have 1 to {MOST_QUESTION_CHARS} characters, not "
                    f"{len(text.strip())}."
                )

    def _check_benchmark(self) -> None:
        if self.database or self.ask or self.questions is not None or self.schema:
            raise ConfigError("benchmark goes without database, ask, questions and schema.")
        if not self.split.isidentifier():
            raise ConfigError(f"split must be a word, as dev, not {self.split!r}.")


def named_url(word: str) -> tuple[str, str]:
    """Return name and URL of ``NAME=URL``; a URL without a name is named after its host."""
    name, equals, url = word.partition("=")
    if equals and "/" not in name:
        return name, url
    return word.partition("//")[2].partition("/")[0], word
