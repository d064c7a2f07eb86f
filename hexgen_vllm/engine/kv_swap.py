"""Where the connector was before 0.2: ``kv_connector_module_path`` may still name this module."""

from __future__ import annotations

from hexgen_vllm.engine.swap.connector import HostKVConnector

__all__ = ["HostKVConnector"]
