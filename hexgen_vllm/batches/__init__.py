"""OpenAI's Files and Batch API on the server side: requests by file in, answers by file out.

:mod:`store` keeps files, batches and answers on disk, :mod:`api` answers HTTP requests about them,
:mod:`runner` sends the requests. What sends one and what the HTTP server is called belongs to
whoever serves: the router (``router/batches.py``) and one vLLM engine
(``engine/server/batches.py``).
"""
