"""What the command line says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hexgen_vllm.option import option
from hexgen_vllm.text2sql.options import AgentOptions

MODEL: Final = Path(__file__).with_name("model")
"""The small model that ``examples.text2sql.train`` has made."""


@dataclass(frozen=True)
class Options(AgentOptions):
    """What is asked, of whom, and how fast."""

    compare: bool = option(
        False,
        "instead of base_url: start two paced CPU engines and a router here, once as stock vLLM "
        "behind round robin and once with slack, and ask both the same, free and held to grammars; "
        "model is then a folder, by default the one that the project has trained",
    )
    questions: str | None = option(
        None, "YAML file of questions to ask instead, in the form of questions.yaml; sql may lack"
    )
    unseen: bool = option(
        False, "ask about two databases that the demo's model has not been trained on"
    )
    out: str = option("out/agent", "folder for databases, logs and results.json")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compare and self.model is None:
            object.__setattr__(self, "model", str(MODEL))
