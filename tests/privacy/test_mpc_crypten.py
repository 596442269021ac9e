"""The shims around CrypTen hold with this torch, and what is missing is told by name. In processes of their own: it changes torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import ModuleType

import pytest

from cloister_privacy.mpc.crypten_compat import MOVED, CrypTenIncompatible, CrypTenMissing, load_crypten

_RUN = """
from cloister_privacy.mpc.crypten_compat import load_crypten
crypten = load_crypten()
import torch
crypten.init()
layer = crypten.nn.Linear(3, 2)
layer.set_parameter("weight", crypten.cryptensor(torch.eye(3)[:2]))
layer.set_parameter("bias", crypten.cryptensor(torch.zeros(2)))
layer.encrypted = True
with crypten.no_grad():
    found = layer.eval()(crypten.cryptensor(torch.tensor([[1.0, 2.0, 3.0]]))).get_plain_text()
assert torch.allclose(found, torch.tensor([[1.0, 2.0]]), atol=1e-3), found
"""


def test_crypten_computes_with_this_torch() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", _RUN], capture_output=True, text=True)
    assert done.returncode == 0, f"a shim of crypten_compat has come off with this torch:\n{done.stderr}"


def _without(missing: str) -> Callable[[str], ModuleType]:
    def load(name: str) -> ModuleType:
        if name == missing:
            raise ModuleNotFoundError(name=name)
        return ModuleType(name)

    return load


def test_a_missing_crypten_and_a_moved_torch_are_told_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    with pytest.raises(CrypTenMissing, match="make install"):
        load_crypten(load=_without("crypten"))
    moved = next(iter(MOVED.values()))
    with pytest.raises(CrypTenIncompatible, match=moved):
        load_crypten(load=_without(moved))
