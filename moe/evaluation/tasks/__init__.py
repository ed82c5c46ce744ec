"""Tasks for lm-evaluation-harness that need no network: a YAML file each, in its own format, and a small data file.

They come in sets of items that have the same choices, of which each is right as often as every other. So a model that
answers without reading the question scores exactly what the task calls chance, whatever it prefers; where an answer is
to be written, chance is 0. The data files are
written by :mod:`moe.evaluation.tasks.write`; those of a run's held-out text by :mod:`moe.evaluation.tasks.held_out`.

With the package installed, the harness's own command finds them too: ``lm_eval --include_path moe/evaluation/tasks``.
"""
