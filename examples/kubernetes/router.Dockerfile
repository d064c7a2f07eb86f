# docker build -f examples/kubernetes/router.Dockerfile -t registry.example/hexgen-vllm-router:0.1.0 .
# The large image has a compiler, with which the router becomes leaner; the small one runs it.
FROM python:3.12 AS wheel
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE MANIFEST.in ./
COPY csrc csrc
COPY patches patches
COPY hexgen_vllm hexgen_vllm
RUN HEXGEN_COMPILE=1 HEXGEN_BUILD_NATIVE=0 pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir "$(ls /wheels/*.whl)[dns,k8s,otel,replicas]"
USER 10001
EXPOSE 30000
ENTRYPOINT ["hexgen-vllm", "router"]
CMD ["--help"]
