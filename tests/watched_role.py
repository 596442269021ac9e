"""`cloister-server party|dealer` as it is, and a file in which each index is written, synced, when it is burned, used or dealt.

python watched_role.py FILE party|dealer
"""

from __future__ import annotations

import os
import sys
from hashlib import sha256
from typing import Any

from cloister_privacy.mpc import dealer
from cloister_privacy.mpc.keystream import Index, Keystream
from cloister_privacy.mpc.marks import Marks
from cloister_privacy.mpc.material import Material
from cloister_server.cli.server import main


def _watch(path: str) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    burn, use, deal = Marks.burn, Material.__init__, dealer.deal

    def write(*words: object) -> None:
        os.write(file, (" ".join(map(str, words)) + "\n").encode())
        os.fsync(file)

    def burned(self: Marks, generation: str, index: Index) -> None:
        burn(self, generation, index)
        write("burned", generation, index.rows, index.count)

    def used(self: Material, stream: Keystream, **more: Any) -> None:
        write("used", sha256(stream.key).hexdigest())  # what a stream's key is told by, and not the key
        use(self, stream, **more)

    def dealt(*given: Any, generation: str, index: Index, **more: Any) -> bytes:
        write("dealt", generation, index.rows, index.count)
        return deal(*given, generation=generation, index=index, **more)

    # Watched, and otherwise as they are.
    Marks.burn, Material.__init__, dealer.deal = burned, used, dealt  # type: ignore[method-assign]


if __name__ == "__main__":
    _watch(sys.argv[1])
    del sys.argv[1]
    main()
