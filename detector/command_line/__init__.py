"""The command lines of ``tools/eval.py``, ``tools/predict.py`` and ``tools/export.py``, a module each."""
