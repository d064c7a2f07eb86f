"""The agent of :mod:`hexgen_vllm.text2sql` on three databases made by script.

    python -m examples.text2sql --base-url http://127.0.0.1:30000/v1 --model NAME

``hexgen-vllm text2sql`` asks a database of your own; here are databases and questions whose right
answers are known, and two CPU engines to compare schedulers on (``--compare``).
"""
