"""Measures an engine from outside: what to send, how to send it, what it says of the engine."""
