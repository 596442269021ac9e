"""Planted from outside through PYTHONPATH: every training step that a process executes is written down before it runs.

The product knows nothing of this. Lines are `pid monotonic-time`, one a step, appended with one write each.
"""

import importlib.abc
import importlib.machinery
import os
import sys
import time

_TRACE = os.environ.get("STEP_TRACE")
_ENGINE = "cloister_privacy.training.engine"


class _Tracer(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name != _ENGINE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        run_module = spec.loader.exec_module

        def exec_module(module):  # type: ignore[no-untyped-def]
            run_module(module)
            step = module._Run._step

            def traced(self, *arguments, **named):  # type: ignore[no-untyped-def]
                os.write(trace, f"{os.getpid()} {time.monotonic()}\n".encode())
                time.sleep(float(os.environ.get("STEP_SLEEP_S", "0")))
                return step(self, *arguments, **named)

            module._Run._step = traced

        spec.loader.exec_module = exec_module
        return spec


if _TRACE:
    trace = os.open(_TRACE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    sys.meta_path.insert(0, _Tracer())
