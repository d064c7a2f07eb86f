"""How the demo's model is made: generated pairs of question and query, a tokenizer, a small Llama.

    python -m examples.text2sql.train --out examples/text2sql/model --minutes 60

The questions of ``questions.yaml`` are never among the pairs.
"""
