"""Two calls of one workflow, with nothing but headers, from different client libraries.

Each program takes the base URL of a router or engine, with ``/v1``, and a model name.
"""
