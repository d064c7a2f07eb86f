"""Manifests and a Helm chart for Kubernetes; docs/kubernetes.md explains them."""

from __future__ import annotations
