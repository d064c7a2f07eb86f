"""Measurements: live load on real endpoints, costs of single parts, tables and plots."""

from __future__ import annotations
