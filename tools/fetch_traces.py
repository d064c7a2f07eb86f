"""Download public traces of LLM serving, each from where its authors publish it.

    python -m tools.fetch_traces                      # list them, with their licences
    python -m tools.fetch_traces NAME [NAME ...] [--to DIR]

They are nobody's of this project: each has its authors' licence, and none is shipped with it.
"""

from __future__ import annotations

import argparse
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple
from urllib.error import URLError

_GITHUB: Final = "https://raw.githubusercontent.com"
_MOONCAKE: Final = f"{_GITHUB}/kvcache-ai/Mooncake/main/FAST25-release/traces"
_AZURE: Final = f"{_GITHUB}/Azure/AzurePublicDataset/master/data"
_AZURE_WEEK: Final = (
    "https://azurepublicdatasettraces.blob.core.windows.net/azurellminfererencetrace"
)
_BAILIAN: Final = (
    "https://media.githubusercontent.com/media/alibaba-edu/qwen-bailian-usagetraces-anon/main"
)
_BURSTGPT: Final = "https://github.com/HPMLL/BurstGPT/releases/download/v1.2"
_TRACELAB: Final = "https://github.com/uw-syfi/TraceLab/releases/download/v0.0.1"
_WEKA: Final = f"{_GITHUB}/callanjfox/kv-cache-tester/master/traces"
_WEKA_COUNT: Final = 739
_CHUNK: Final = 1 << 20


class Trace(NamedTuple):
    """One public trace.

    Attributes:
        format: as ``hexgen-vllm trace`` calls it.
        licence: of the data.
        about: what it is, and who publishes it.
        urls: its files; several go into a folder of its name.
    """

    format: str
    licence: str
    about: str
    urls: tuple[str, ...]


_CC: Final = "CC BY 4.0"
_APACHE: Final = "Apache-2.0"
TRACES: Final[dict[str, Trace]] = {
    "weka-agents": Trace(
        "weka", _APACHE, f"{_WEKA_COUNT} conversations of coding agents, kv-cache-tester (WEKA)",
        tuple(f"{_WEKA}/trace_{number:04}.json" for number in range(1, _WEKA_COUNT + 1)),
    ),
    "tracelab": Trace(
        "tracelab", _CC, "357,161 rounds of coding agents, TraceLab (University of Washington)",
        (f"{_TRACELAB}/syfi_coding_trace.jsonl.gz",),
    ),
    "mooncake-toolagent": Trace(
        "mooncake", _APACHE, "tools and agents, one hour, Mooncake (FAST'25)",
        (f"{_MOONCAKE}/toolagent_trace.jsonl",),
    ),
    "mooncake-conversation": Trace(
        "mooncake", _APACHE, "chats, one hour, Mooncake (FAST'25)",
        (f"{_MOONCAKE}/conversation_trace.jsonl",),
    ),
    "bailian-coder": Trace(
        "bailian", _APACHE, "coding, two hours, Qwen-Bailian (ATC'25)",
        (f"{_BAILIAN}/qwen_coder_blksz_16.jsonl",),
    ),
    "bailian-thinking": Trace(
        "bailian", _APACHE, "reasoning, two hours, Qwen-Bailian (ATC'25)",
        (f"{_BAILIAN}/qwen_thinking_blksz_16.jsonl",),
    ),
    "azure-2023-code": Trace(
        "azure", _CC, "code completion, Azure (ISCA'24)",
        (f"{_AZURE}/AzureLLMInferenceTrace_code.csv",),
    ),
    "azure-2023-conversation": Trace(
        "azure", _CC, "chats, Azure (ISCA'24)", (f"{_AZURE}/AzureLLMInferenceTrace_conv.csv",),
    ),
    "azure-2024-code": Trace(
        "azure", _CC, "code completion, one week, Azure (HPCA'25)",
        (f"{_AZURE_WEEK}/AzureLLMInferenceTrace_code_1week.csv",),
    ),
    "azure-2024-conversation": Trace(
        "azure", _CC, "chats, one week, Azure (HPCA'25)",
        (f"{_AZURE_WEEK}/AzureLLMInferenceTrace_conv_1week.csv",),
    ),
    "burstgpt": Trace(
        "burstgpt", _CC, "ChatGPT and GPT-4, two months, BurstGPT (KDD'25)",
        (f"{_BURSTGPT}/BurstGPT_without_fails_1.csv",),
    ),
}  # fmt: skip


def fetch(name: str, trace: Trace, to: Path) -> Path:
    """Download a trace; return where it lies. What is there already is left as it is.

    Raises:
        OSError: a file could not be had or written.
    """
    many = len(trace.urls) > 1
    folder = to / name if many else to
    folder.mkdir(parents=True, exist_ok=True)
    path = folder
    for url in trace.urls:
        path = folder / url.rsplit("/", 1)[1]
        if path.exists():
            continue
        draft = path.with_name(f".{path.name}.part")
        with urllib.request.urlopen(url, timeout=60) as answer, draft.open("wb") as file:
            while chunk := answer.read(_CHUNK):
                file.write(chunk)
        draft.replace(path)
    return folder if many else path


def main(argv: Sequence[str] | None = None) -> int:
    """List traces, or download those that are named."""
    parser = argparse.ArgumentParser(prog="tools.fetch_traces", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="traces; none lists them")
    parser.add_argument("--to", type=Path, default=Path("traces"), help="folder (default: traces)")
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in TRACES:
            known = ", ".join(TRACES)
            print(f"fetch_traces: unknown trace {name!r}; known are {known}.", file=sys.stderr)
            return 2
    for name in args.names:
        trace = TRACES[name]
        try:
            path = fetch(name, trace, args.to)
        except (OSError, URLError) as error:
            print(f"fetch_traces: {name} could not be had: {error}.", file=sys.stderr)
            return 1
        print(f"{path}: {trace.about}; {trace.licence}")
    if not args.names:
        for name, trace in TRACES.items():
            print(f"{name:24} {trace.format:10} {trace.licence:11} {trace.about}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
