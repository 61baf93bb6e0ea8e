"""Lookahead sparse attention inside stock vLLM: a general plugin that changes no file of the engine.

settings, sequences, keys, tables: the logic, without an engine; plugin: entry point; checks: what is refused when the
server starts; worker: one engine process's state; backend: attention backends whose decode rows read fewer blocks.
"""
