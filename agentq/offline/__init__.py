"""The offline model server: the OpenAI and Anthropic wire formats on loopback, answered without any model.

``text`` and ``parts`` read language, ``route``, ``plan``, ``compose`` and ``critic`` decide (pure functions of the
prompt), ``wire`` translates the two formats, ``faults`` injects failures from a scenario, ``calls`` is the one way from
a prompt to its answer and its entry in the ``journal``, ``server`` ties them to HTTP.

OpenAI's batches: ``batch_lines`` and ``batches`` are what they look like (pure), ``jobs`` runs them, ``files`` keeps
their files, ``files_http`` and ``batches_http`` are the endpoints. ``embeddings`` makes vectors of hashed words.
"""
