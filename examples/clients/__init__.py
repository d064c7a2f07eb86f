"""Two calls of one workflow from different client libraries.

Each program takes the base URL of a router or engine, with ``/v1``, and a model name.
"""
