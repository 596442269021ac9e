"""CrypTen as it is, over plain gloo: by its insecure provider (TFP, where party 0 knows every mask) or its third party (TTP).

Bytes are by its own count.
"""

from __future__ import annotations

import threading
import warnings
from typing import Any

import torch

from cloister_privacy.mpc.crypten_compat import load_crypten
from mpc_sides.seat import Case, Seat, answer, stand_by


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    seat, crypten = Seat.taken(), load_crypten()
    crypten.cfg.mpc.provider = seat.directory.name.upper()
    if seat.rank == 2:
        threading.Thread(target=crypten.mpc.provider.TTPServer, daemon=True).start()
        return stand_by()
    crypten.init()
    case = seat.case()
    model = crypten.nn.Sequential(*_layers(crypten, case)).eval()
    for module in model.modules():
        module.encrypted = True
    model.encrypted = True
    x = crypten.cryptensor(torch.from_numpy(case.x), src=0)
    with crypten.no_grad(), torch.inference_mode():
        crypten.cfg.communicator.verbose = True
        crypten.reset_communication_stats()
        found = model(x)
        sent = crypten.comm.get().get_communication_stats()["bytes"]
        crypten.cfg.communicator.verbose = False

        def ask() -> None:
            nonlocal found
            found = model(x)

        answer(ask, told=lambda count: {"bytes": sent, "outputs": found.get_plain_text().tolist()})


def _layers(crypten: Any, case: Case) -> list[Any]:
    found = []
    for layer, weights in case.layers:
        match layer["type"]:
            case "linear":
                found.append(crypten.nn.Linear(layer["in_features"], layer["out_features"]))
            case "conv2d":
                size, padding = tuple(layer["kernel_size"]), tuple(layer["padding"])
                found.append(crypten.nn.Conv2d(layer["in_channels"], layer["out_channels"], size, padding=padding))
            case "max_pool":
                found.append(crypten.nn.MaxPool2d(layer["kernel_size"][0], stride=layer["kernel_size"][0]))
            case "relu":
                found.append(crypten.nn.ReLU())
            case "flatten":
                found.append(crypten.nn.Flatten())
            case other:
                raise AssertionError(f"no {other} here")
        for key, weight in weights.items():
            found[-1].set_parameter(key, crypten.cryptensor(torch.from_numpy(weight), src=0))
    return found


if __name__ == "__main__":
    main()
