"""Environment variables that the package reads."""

from __future__ import annotations

from typing import Final

from tools.reference.markdown import code, table

VARIABLES: Final[dict[str, tuple[str, str]]] = {
    "HEXGEN_ROUTER_API_KEY": ("router", "key that clients must present (`--api-key`)"),
    "HEXGEN_ROUTER_ADMIN_API_KEY": ("router", "key for admin routes (`--admin-api-key`)"),
    "HEXGEN_ROUTER_ENGINE_API_KEY": ("router", "key presented to engines (`--engine-api-key`)"),
    "HEXGEN_ROUTER_REPLICAS": ("router", "store shared with other routers (`--replicas`)"),
    "OPENAI_BASE_URL": ("batch", "the server that is asked (`--base-url`)"),
    "OPENAI_API_KEY": ("batch, explain", "key for the server that is asked (`--api-key`)"),
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": (
        "router",
        "with `--otlp-traces-endpoint`: `grpc`, the default, or `http/protobuf`",
    ),
    "RAY_ADDRESS": ("cluster", "Ray cluster to join (`--ray-address`)"),
    "VLLM_API_KEY": ("engine", "vLLM's key; `/hexgen/stats` asks for it as well"),
    "VLLM_USE_RUST_FRONTEND": (
        "engine",
        "1 takes vLLM's server in Rust, which has no place for our middleware",
    ),
    "VLLM_PLUGINS": ("engine", "vLLM's list of plugins to load; if set, it must name `hexgen`"),
    "HEXGEN_KERNELS": (
        "engine",
        "what copies KV: `cuda`, `triton`, `cpu` or `reference`; by default the fastest there is",
    ),
    "HEXGEN_CACHE_DIR": (
        "engine",
        "folder of kernels compiled on first use; by default `hexgen_vllm` in `$XDG_CACHE_HOME`",
    ),
    "XDG_CACHE_HOME": ("engine", "base of that default, by default `~/.cache`"),
    "TRITON_INTERPRET": ("engine", "1 runs the Triton kernel in its interpreter, without a GPU"),
    "CC": ("pip install", "C compiler for compiled parts"),
    "CXX": ("build", "C++ compiler for the CPU kernel"),
    "NVCC": ("build", "CUDA compiler for the CUDA kernel"),
    "CUDA_HOME": ("build", "folder of the CUDA toolkit"),
    "CUDA_PATH": ("build", "the same, if `CUDA_HOME` is not set"),
    "HEXGEN_COMPILE": (
        "pip install",
        "policies, simulator and router: `0`, the default, leaves them plain Python, `1` compiles "
        "them with mypyc, `auto` does so where it can be done",
    ),
    "HEXGEN_BUILD_NATIVE": (
        "pip install",
        "kernels: `auto`, the default of an editable install, builds what compilers allow, `1` "
        "fails without them, `0`, the default elsewhere, builds none; they are then built when an "
        "engine first needs them",
    ),
    "HEXGEN_FUZZ": ("tests", "how many times as many inputs the fuzz tests try"),
}
"""Name, who reads it, and what it does."""


def text() -> str:
    """Return the table."""
    rows = [(code(name), who, what) for name, (who, what) in VARIABLES.items()]
    vllm = "vLLM's own variables (`VLLM_*`) hold for engines as they do without us."
    return f"{table(('variable', 'read by', 'meaning'), rows)}\n\n{vllm}"
