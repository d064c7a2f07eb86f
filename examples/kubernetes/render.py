"""Render the chart to plain manifests, with Helm's own library.

python -m examples.kubernetes.render                 write examples/kubernetes/manifests, and what
                                                     the chart's schema says of router.options
python -m examples.kubernetes.render my.values.yaml  print what these values give
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Final

import yaml
from helm_python import HelmError
from helm_python.chart import Chart

from examples.kubernetes.options_schema import router_options

HERE: Final = Path(__file__).parent
CHART: Final = HERE / "chart"
SCHEMA: Final = CHART / "values.schema.json"
EXAMPLE: Final = HERE / "example.values.yaml"
MANIFESTS: Final = HERE / "manifests"
RELEASE: Final = "hexgen"
NAMESPACE: Final = "llm"
_BY_LABELS: Final = ("router.yaml", "rbac.yaml")  # what differs from discovery by DNS
_COMMENT: Final = (
    "# Written by `python -m examples.kubernetes.render` from examples/kubernetes/chart.\n"
)


class BadValues(Exception):  # noqa: N818 - what they are
    """The chart refuses the values; ``str()`` says which and why."""


def render(values: Mapping[str, Any], release: str = RELEASE) -> dict[str, str]:
    """Return the manifests that ``values`` give, by file name.

    Raises:
        BadValues: the schema or a template refuses them.
    """
    if not isinstance(values, Mapping):
        raise BadValues("values must be a mapping.")
    with Chart.load(CHART) as chart:
        try:
            found = chart.render(dict(values), name=release, namespace=NAMESPACE)
        except HelmError as error:
            raise BadValues(_sentence(str(error))) from None
    texts = {PurePosixPath(path).name: text.strip() for path, text in found.items()}
    return {
        name: f"{text.removeprefix('---').strip()}\n"
        for name, text in sorted(texts.items())
        if text and name.endswith(".yaml")
    }


def manifests() -> dict[str, str]:
    """Return what belongs into the folder of manifests, by path below it."""
    values = yaml.safe_load(EXAMPLE.read_text())
    by_labels = render(values | {"router": {"discovery": "labels"}})
    found = render(values) | {f"by-label/{name}": by_labels[name] for name in _BY_LABELS}
    return {path: _COMMENT + text for path, text in found.items()}


def schema() -> str:
    """Return the schema of the values, with what the router's options are now."""
    found = json.loads(SCHEMA.read_text())
    found["properties"]["router"]["properties"]["options"] = router_options()
    return f"{json.dumps(found, indent=2)}\n"


def _sentence(said: str) -> str:
    """Return the findings of Helm in one line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    findings = [line.removeprefix("- ") for line in lines if line.startswith("- ")]
    return "; ".join(findings) or lines[-1]


def main(argv: list[str] | None = None) -> int:
    """Write the manifests, or print those of other values."""
    parser = argparse.ArgumentParser(prog="python -m examples.kubernetes.render")
    parser.add_argument("values", nargs="?", type=Path, help="a file of values to print")
    args = parser.parse_args(argv)
    try:
        if args.values is not None:
            print(
                "---\n".join(render(yaml.safe_load(args.values.read_text()) or {}).values()), end=""
            )
            return 0
        SCHEMA.write_text(schema())
        for path, text in manifests().items():
            (MANIFESTS / path).parent.mkdir(parents=True, exist_ok=True)
            (MANIFESTS / path).write_text(text)
    except (BadValues, OSError, yaml.YAMLError) as error:
        print(f"{parser.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
