"""Verify a certificate without Cloister: python docs/verify.py CERTIFICATE.json PUBLIC_KEY_IN_HEX [WEIGHTS.safetensors]"""

import hashlib
import json
import sys
from base64 import b64decode, b64encode
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

KIND, TYPES = "application/vnd.in-toto+json", ["https://in-toto.io/Statement/v1", "urn:cloister:certificate:1"]


def need(holds, why):
    return holds or sys.exit(f"refused: {why}")


def once(pairs):
    return need(len(dict(pairs)) == len(pairs), "a JSON object repeats a key") and dict(pairs)


need(len(sys.argv) in (3, 4), __doc__)
try:
    envelope = json.loads(Path(sys.argv[1]).read_bytes(), object_pairs_hook=once)
    need(envelope["payloadType"] == KIND, f"the payloadType is not {KIND}")
    need(len(envelope["signatures"]) == 1, "there is not exactly one signature")
    key, keyid = bytes.fromhex(sys.argv[2]), envelope["signatures"][0]["keyid"]
    texts = [envelope["payload"], envelope["signatures"][0]["sig"]]
    payload, signature = map(b64decode, texts)
    need([b64encode(raw).decode() for raw in (payload, signature)] == texts, "base64 has one spelling, and not this")
    need(keyid == f"ed25519:{hashlib.sha256(key).hexdigest()[:32]}", "it was signed by another key")
    signed = f"DSSEv1 {len(KIND)} {KIND} {len(payload)} ".encode() + payload
    Ed25519PublicKey.from_public_bytes(key).verify(signature, signed)
    statement = json.loads(payload, object_pairs_hook=once)
    stated = statement["predicate"]
    need([statement["_type"], statement["predicateType"]] == TYPES, "it states something else than a certificate")
    need(0 < stated["epsilon"] < float("inf"), "epsilon is no positive number")
    named = {"name": f"{stated['model']}/versions/{stated['version']}", "digest": {"sha256": stated["weights_digest"]}}
    need(statement["subject"] == [named], "its subject is not the weights that it is about")
    for path in sys.argv[3:]:
        found = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        need(found == stated["weights_digest"], f"the weights are others: their SHA-256 is {found}")
except InvalidSignature:
    sys.exit("refused: the signature is not the key's, so the certificate was changed or forged")
except (OSError, LookupError, AttributeError, TypeError, ValueError, RecursionError) as error:
    sys.exit(f"refused: this is no certificate, key or file of weights ({error!r})")
print(json.dumps(statement, indent=1))
