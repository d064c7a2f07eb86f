"""The reference page, written from the code itself.

    commands    every command with its options, from the parsers
    files       keys of the YAML files, from the dataclasses that read them
    routes      HTTP endpoints, from the OpenAPI document and the engine's middleware
    python_api  public names with the heads of their docstrings, from the sources
    variables   environment variables, described here and compared with the sources
    page        all of it as one page
    command     ``hexgen-vllm reference``

Nothing here imports vLLM or torch: the page is the same on every machine.
"""

from __future__ import annotations
