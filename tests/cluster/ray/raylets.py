"""A Ray cluster of several nodes on this machine, on the loopback address only.

    with Raylets({"slow": 1}) as raylets:
        node_id = raylets.add({"fast": 1})
        raylets.kill(node_id)

The nodes are children of a process of its own, which is asked over a pipe.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # every node's address is 127.0.0.1
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "for-tests-only-" * 4,
}
"""What the nodes, and whoever joins them, must find in their environment."""

HERE = {"node_ip_address": "127.0.0.1", "object_store_memory": 80 * 2**20, "num_cpus": 0}


class Raylets:
    """The nodes; leaving the context ends all of them.

    Attributes:
        address: of the cluster.
        head: id of the first node, which must not be killed.
    """

    def __init__(self, resources: Mapping[str, float]) -> None:
        self._folder = tempfile.mkdtemp(prefix="raylets-")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.ray.raylets"],
            cwd=Path(__file__).resolve().parents[3],
            env=os.environ | ENVIRONMENT | {"RAY_TMPDIR": self._folder},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        first = self._ask({"add": dict(resources)})
        self.address, self.head = str(first["address"]), str(first["node"])

    def __enter__(self) -> Raylets:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, resources: Mapping[str, float]) -> str:
        """Start a node with ``resources`` and return its id."""
        return str(self._ask({"add": dict(resources)})["node"])

    def kill(self, node_id: str) -> None:
        """Kill the processes of a node, without a chance to clean up."""
        self._ask({"kill": node_id})

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return dict(json.loads(self._process.stdout.readline()))


def main() -> None:
    """Do what standard input says, line by line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Ray prints is no answer
    from ray.cluster_utils import Cluster

    cluster = Cluster(shutdown_at_exit=True)
    nodes: dict[str, Any] = {}
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        if "add" in request:
            node = cluster.add_node(**HERE, resources=request["add"], include_log_monitor=False)
            nodes[node.node_id] = node
            answer = {"address": cluster.address, "node": node.node_id}
        else:
            cluster.remove_node(nodes.pop(request["kill"]), allow_graceful=False)
        print(json.dumps(answer), file=answers, flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
