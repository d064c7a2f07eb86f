"""What the command line says."""

from __future__ import annotations

from dataclasses import dataclass

from hexgen_vllm.config import check, option
from hexgen_vllm.errors import ConfigError


@dataclass(frozen=True)
class Options:
    """What is asked, of whom, and how fast."""

    base_url: tuple[str, ...] = option(
        ("http://127.0.0.1:30000/v1",),
        "OpenAI endpoints, URL or NAME=URL; several are asked the same in turn",
    )
    compare: bool = option(
        False,
        "instead of base_url: start two paced CPU engines and a router here, once as stock vLLM "
        "behind round robin and once with slack, and ask both the same; model is then a folder",
    )
    model: str | None = option(None, "served model name; none is the first one")
    api_key: str = option("none", "key for the endpoint")
    questions: str | None = option(
        None, "YAML file of questions to ask instead, in the form of questions.yaml; sql may lack"
    )
    users: int = option(0, "users, each with one question; 0 asks every question once", least=0)
    rate: float = option(0.0, "mean arrivals, users/s; 0 is one after the other", least=0.0)
    warmup: int = option(0, "users before those that count", least=0)
    deadline_s: float = option(60.0, "deadline of a question, seconds", least=0.1)
    max_rounds: int = option(4, "most revisions of a candidate query", least=0, most=20)
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
    out: str = option("out/agent", "folder for databases, logs and results.json")

    def __post_init__(self) -> None:
        check(self)
        if self.compare and not self.model:
            raise ConfigError("compare needs model, the folder of a model to serve.")
        for url in self.base_url:
            if not named_url(url)[1].startswith(("http://", "https://")):
                raise ConfigError(f"base_url must be URL or NAME=URL, not {url!r}.")


def named_url(word: str) -> tuple[str, str]:
    """Return name and URL of ``NAME=URL``; a URL without a name is named after its host."""
    name, equals, url = word.partition("=")
    if equals and "/" not in name:
        return name, url
    return word.partition("//")[2].partition("/")[0], word
