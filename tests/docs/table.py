"""How the commands of the documentation are run: what stands for what, and what is not run.

Documentation names big models, other machines and long runs. What takes their place in the tests
is here and nowhere else. A block that is neither run nor listed here fails a test.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from tests.e2e.programs import LONG_TOKENS

MODELS: Final = (
    "meta-llama/Llama-3.1-8B-Instruct",
    "meta-llama/Llama-3.1-70B-Instruct",
    "out/tiny-model",
    "MODEL",
)
"""Models that a tiny one stands for."""

GIVEN: Final = {
    # address in the documentation: host of the one engine that stands for it
    "gpu-a:8000": "127.0.0.1",
    "gpu-b:8000": "localhost",
    "gpu-1:8000": "127.0.0.1",
    "gpu-2:8000": "localhost",
    "10.0.0.7:8000": "127.0.0.1",
}
"""Engines on other machines: one real engine under two names."""

ROUTER_GIVEN: Final = ("http://router:30000", "http://a", "http://b")
"""A router on another machine, and servers without a port: a real router before that engine."""

OWN_HOSTS: Final = ("localhost", "127.0.0.1", "0.0.0.0")
"""Ports of these are free ones; what a page starts there is what its later commands ask."""


class Appended(NamedTuple):
    """Words that make a command that contains ``part`` short; the last of a flag counts."""

    part: str
    words: str


APPENDED: Final = (
    Appended("hexgen_vllm.testing.tiny_model", "--hidden 128 --layers 2"),
    Appended("--worker-dns", "--worker-dns-server 127.0.0.1:9"),
    Appended("hexgen-vllm calibrate", "--budget-s 2"),
    Appended("hexgen-vllm bench live", "--workflows 4 --warmup 0 --rate 4 --length-scale 0.05"),
    Appended("hexgen-vllm bench sim", "--speed-workflows 5 --repeats 1 --memory-workflows 5"),
    Appended("hexgen-vllm bench sim", "--grid-workflows 5 --jobs 1"),
    Appended("hexgen-vllm bench decide", "--engines 4 --open 10 --held 0 --events 20"),
    Appended("hexgen-vllm bench kv", "--parts sweep --page-kib 4 --blocks 1,4 --layers 1"),
    Appended("hexgen-vllm sim examples", "--workflows 10 --seed 1"),
    Appended("hexgen-vllm sim mine.yaml", "--workflows 10 --seed 1"),
    Appended("hexgen-vllm sim overload.yaml", "--workflows 10 --seed 1"),
    Appended("hexgen-vllm tune", "--workflows 20 --warmup 0 --seed 1 --budget 6 --jobs 1"),
    Appended("--policy paper --grid 11", "--grid 2"),
    Appended("order http://127.0.0.1:30001/v1 MODEL", f"--long-tokens {LONG_TOKENS}"),
    Appended("order http://127.0.0.1:30002/v1 MODEL", f"--long-tokens {LONG_TOKENS}"),
    Appended("examples.text2sql --users 200", "--base-url http://127.0.0.1:30000/v1"),
    Appended("examples.text2sql", "--users 2 --max-rounds 1 --constrain --max-tokens 200"),
)

_FAKE: Final = 'command: [python, -m, hexgen_vllm.testing.fake_server, "--port={port}"]'

REPLACED: Final = {
    # in blocks of Python and files: what an engine on a small CPU needs
    'LLM("MODEL", ': 'LLM("MODEL", dtype="float32", max_model_len=256, enforce_eager=True,'
    " max_num_seqs=4, block_size=32, num_gpu_blocks_override=64, gpu_memory_utilization=0.2, ",
    "--max-model-len=16384": "--max-model-len=512, --enforce-eager, --block-size=32,"
    " --num-gpu-blocks-override=64, --gpu-memory-utilization=0.2, --dtype=float32",
    # clusters with real engines: tests/e2e/test_cluster.py
    "{name: a100, device: 0}": f"{{name: a100, {_FAKE}}}",
    "{name: l40s, device: 1, args: [--max-num-seqs=64]}": "{name: l40s, url: http://gpu-b:8000}",
    "{name: fast, device: 0}": f"{{name: fast, {_FAKE}}}",
    "{name: slow, device: 1, ": f"{{name: slow, {_FAKE}}}  # ",
    "--hexgen-host-kv-gib 20": "--hexgen-host-kv-gib 0.01",
    '"host_kv_gib": 20': '"host_kv_gib": 0.01',
    "mine.yaml": "examples/scenarios/demo.yaml",
    "--url URL": "--url http://gpu-a:8000",
    "examples/scenarios/FILE.yaml": "examples/scenarios/demo.yaml",
}


class NotRun(NamedTuple):
    """A command that the tests do not run.

    Attributes:
        part: what the command contains.
        reason: why.
        instead: what checks it: ``parse`` reads its words with the command's own parser,
            ``engine`` with that of ``vllm serve``, ``make`` looks for the target, or a test file.
    """

    part: str
    reason: str
    instead: str


NOT_RUN: Final = (
    NotRun("make env", "it makes the environment that the tests run in", "make"),
    NotRun("make demo", "takes minutes", "make"),
    NotRun("make agent-demo", "takes minutes", "make"),
    NotRun("make real-model", "takes minutes", "make"),
    NotRun("make bench-router", "takes minutes", "make"),
    NotRun("make bench-mix", "takes minutes", "make"),
    NotRun("make test", "it runs these tests", "make"),
    NotRun(". .venv/bin/activate", "the tests run in that environment", "make"),
    NotRun("pip install", "tests of packaging build and install it", "tests/test_packaging.py"),
    NotRun("--tensor-parallel-size 4", "needs four GPUs", "engine"),
    NotRun("NixlConnector", "needs NIXL and GPUs", "engine"),
    NotRun("ExampleConnector", "another test does", "tests/e2e/test_disaggregation.py"),
    NotRun("--backend ray", "another test does, with more engines", "parse"),
    NotRun("ray start", "needs a port of its own and several machines", "tests/e2e/test_ray.py"),
    NotRun("tools.fetch_traces", "needs the Internet", "tests/test_fetch_traces.py"),
    NotRun("examples/scenarios/public-", "needs a trace from the Internet", "parse"),
    NotRun("--trace traces/conversation_trace.jsonl", "needs that trace", "parse"),
    NotRun("trace convert recent.jsonl", "a router that just started recorded nothing", "parse"),
    NotRun("docker build", "needs a registry", "tests/examples/test_images.py"),
    NotRun("docker compose", "needs two GPUs", "tests/examples/test_images.py"),
    NotRun("hexgen-vllm explain", "no such workflow ended", "tests/router/calls/test_accounts.py"),
    NotRun("helm install", "needs a cluster", "tests/examples/test_kubernetes.py"),
    NotRun("kubectl ", "needs a cluster", "tests/examples/test_kubernetes.py"),
    NotRun("--service-discovery", "tests have API servers of their own", "parse"),
    NotRun(
        "text2sql --database", "needs a model that writes SQL", "tests/text2sql/test_command.py"
    ),
    NotRun("text2sql.effort", "takes some minutes", "tests/benchmarks/text2sql/test_effort.py"),
    NotRun("text2sql --benchmark", "needs BIRD", "tests/text2sql/test_benchmark.py"),
    NotRun("hexgen_vllm.demo", "takes half an hour, and vllm-router", "parse"),
    NotRun("bench router", "wants quiet cores, and vllm-router", "parse"),
    NotRun(
        "bench soak", "a test soaks for ten seconds", "tests/benchmarks/router/test_router_soak.py"
    ),
    NotRun("hexgen-vllm batch run", "needs an engine", "tests/router/batches/test_command.py"),
    NotRun("bench preempt", "takes two minutes", "parse"),
    NotRun("bench react", "takes minutes", "tests/engine/swap/test_bench_preempt.py"),
    NotRun(
        "RANDOM_ENGINES=1000",
        "takes minutes; fewer are in every run",
        "tests/engine/nomodel/test_random_engines.py",
    ),
    NotRun("HEXGEN_FUZZ=12", "takes minutes; a smaller one is in every run", "tests/router/fuzz"),
    NotRun("patch apply", "changes the vLLM that other tests need", "tests/patch/test_command.py"),
    NotRun("patch revert", "changes the vLLM that other tests need", "tests/patch/test_command.py"),
    NotRun('"enable_kv_cache_events"', "another test does", "tests/e2e/test_kv_events.py"),
    NotRun(
        '"kv_connector":', "needs a vLLM that is patched", "tests/engine/nomodel/test_patched.py"
    ),
)
