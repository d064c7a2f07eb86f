# docker build -f examples/kubernetes/engine.Dockerfile -t registry.example/hexgen-vllm-engine:0.1.0 .
FROM vllm/vllm-openai:v0.32.0
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE MANIFEST.in ./
COPY csrc csrc
COPY patches patches
COPY hexgen_vllm hexgen_vllm
# hadolint ignore=DL3013
RUN HEXGEN_COMPILE=auto HEXGEN_BUILD_NATIVE=auto pip install --no-cache-dir ".[otel]"
WORKDIR /
ENTRYPOINT ["python3", "-m", "hexgen_vllm.serve"]
