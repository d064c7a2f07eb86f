"""How the demo's model is made: generated pairs of question and query, a tokenizer, a small Llama.

    python -m examples.text2sql.train --minutes 60 --out out/text2sql-model

The questions of ``questions.yaml`` are never among the pairs.
"""
