"""Metrics: pure functions from a :class:`~moe.study.record.Record` (or a model) to a
:class:`~moe.study.measurement.Measurement`, which holds the chance value and how to read it.
"""
