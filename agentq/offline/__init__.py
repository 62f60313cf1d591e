"""The offline model server: the OpenAI and Anthropic wire formats on loopback, answered without any model.

``text`` and ``parts`` read language, ``route``, ``plan``, ``compose`` and ``critic`` decide (pure functions of the
prompt), ``wire`` translates the two formats, ``faults`` injects failures from a scenario, ``server`` ties them to HTTP.
"""
