"""What users may write of kinds that others add to Kubernetes, which has no schema of them."""

from __future__ import annotations

from typing import Any

_LABELS: dict[str, Any] = {"type": "object", "additionalProperties": {"type": "string"}}
_ENDPOINT: dict[str, Any] = {
    "type": "object",
    "required": ["port", "path"],
    "additionalProperties": False,
    "properties": {
        "port": {"type": "string", "maxLength": 15},
        "path": {"type": "string", "pattern": "^/"},
        "interval": {"type": "string", "pattern": "^([0-9]+(ms|s|m|h|d))+$"},
    },
}
POD_MONITOR: dict[str, Any] = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "monitoring.coreos.com/v1"},
        "kind": {"const": "PodMonitor"},
        "metadata": {
            "type": "object",
            "required": ["name"],
            "properties": {"name": {"type": "string"}, "labels": _LABELS},
        },
        "spec": {
            "type": "object",
            "required": ["selector", "podMetricsEndpoints"],
            "additionalProperties": False,
            "properties": {
                "selector": {
                    "type": "object",
                    "required": ["matchLabels"],
                    "additionalProperties": False,
                    "properties": {"matchLabels": _LABELS},
                },
                "podTargetLabels": {"type": "array", "items": {"type": "string"}},
                "podMetricsEndpoints": {"type": "array", "minItems": 1, "items": _ENDPOINT},
            },
        },
    },
}

_REFERENCE: dict[str, Any] = {
    "type": "object",
    "required": ["name"],
    "properties": {"name": {"type": "string"}, "port": {"type": "integer"}},
}
_MATCH: dict[str, Any] = {
    "type": "object",
    "required": ["path"],
    "additionalProperties": False,
    "properties": {
        "path": {
            "type": "object",
            "required": ["type", "value"],
            "properties": {
                "type": {"enum": ["Exact", "PathPrefix", "RegularExpression"]},
                "value": {"type": "string", "pattern": "^/"},
            },
        }
    },
}
_RULE: dict[str, Any] = {
    "type": "object",
    "required": ["backendRefs"],
    "additionalProperties": False,
    "properties": {
        "matches": {"type": "array", "items": _MATCH},
        "backendRefs": {"type": "array", "minItems": 1, "items": _REFERENCE},
        "timeouts": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "request": {"type": "string", "pattern": "^([0-9]{1,5}(h|m|s|ms)){1,4}$"}
            },
        },
    },
}
HTTP_ROUTE: dict[str, Any] = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "gateway.networking.k8s.io/v1"},
        "kind": {"const": "HTTPRoute"},
        "metadata": POD_MONITOR["properties"]["metadata"],
        "spec": {
            "type": "object",
            "required": ["parentRefs", "rules"],
            "additionalProperties": False,
            "properties": {
                "parentRefs": {"type": "array", "minItems": 1, "items": _REFERENCE},
                "hostnames": {"type": "array", "items": {"type": "string"}},
                "rules": {"type": "array", "minItems": 1, "items": _RULE},
            },
        },
    },
}
OTHERS = {"PodMonitor": POD_MONITOR, "HTTPRoute": HTTP_ROUTE}
"""Kinds that Kubernetes itself does not know."""
