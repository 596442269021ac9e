"""What children that are forked from one process do not share: what they draw at random."""

from __future__ import annotations

import json
import subprocess
import sys

_SCRIPT = """
import json, os, random, secrets, sys
from cloister_server.work import template

def draw():
    import numpy as np
    import torch
    from cryptography.hazmat.primitives.asymmetric import ec
    from cloister_privacy.sealing import new_key
    from cloister_privacy.training.keystream import random_words
    from cloister_server.ids import random_hex
    curve = ec.generate_private_key(ec.SECP256R1()).private_numbers().private_value
    return {
        "noise": [int(word) for word in random_words(2)], "key": new_key().hex(), "id": random_hex(), "curve": curve,
        "urandom": os.urandom(16).hex(), "secrets": secrets.token_hex(), "random": random.getrandbits(64),
        "numpy": np.random.default_rng().bytes(16).hex(), "numpy's own": np.random.bytes(16).hex(), "dropout": torch.rand(2).tolist(),
    }

template._load()
drawn = [draw()]
for _ in range(2):
    read, write = os.pipe()
    if template._fork_child() == 0:
        os.write(write, json.dumps(draw()).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        drawn.append(json.loads(pipe.read()))
print(json.dumps(drawn))
"""


def test_no_two_children_draw_the_same() -> None:
    drawn = json.loads(subprocess.check_output([sys.executable, "-c", _SCRIPT], timeout=300))
    assert len(drawn) == 3, "the process itself and two children"
    for name in drawn[0]:
        assert len({json.dumps(each[name]) for each in drawn}) == len(drawn), name
