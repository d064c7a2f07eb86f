# docker build -f examples/kubernetes/router.Dockerfile -t registry.example/hexgen-vllm-router:0.1.0 .
FROM python:3.12-slim
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE MANIFEST.in ./
COPY csrc csrc
COPY patches patches
COPY hexgen_vllm hexgen_vllm
RUN pip install --no-cache-dir ".[dns,k8s]"
WORKDIR /
USER 10001
EXPOSE 30000
ENTRYPOINT ["hexgen-vllm", "router"]
CMD ["--help"]
