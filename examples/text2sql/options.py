"""What the command line says."""

from __future__ import annotations

from dataclasses import dataclass

from hexgen_vllm.config import option
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.text2sql.options import AgentOptions


@dataclass(frozen=True)
class Options(AgentOptions):
    """What is asked, of whom, and how fast."""

    compare: bool = option(
        False,
        "instead of base_url: start two paced CPU engines and a router here, once as stock vLLM "
        "behind round robin and once with slack, and ask both the same; model is then a folder",
    )
    questions: str | None = option(
        None, "YAML file of questions to ask instead, in the form of questions.yaml; sql may lack"
    )
    out: str = option("out/agent", "folder for databases, logs and results.json")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compare and not self.model:
            raise ConfigError("compare needs model, the folder of a model to serve.")
