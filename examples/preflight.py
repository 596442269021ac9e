"""What an installation needs, checked before it begins: the Python, the platform, the disk. Standard library only."""

import shutil
import sys
from pathlib import Path

NEEDED_GB = 3 if shutil.which("nvidia-smi") is None else 8


def main() -> int:
    if sys.version_info < (3, 11):  # noqa: UP036 (this very file is run by whatever Python there is)
        print(
            f"Cloister needs Python 3.11 or newer; this is {sys.version.split()[0]}. Try: make PYTHON=python3.11 install"
        )
        return 1
    if not sys.platform.startswith("linux"):
        print(
            "Cloister's server runs on Linux (it relies on flock and process groups); use a Linux machine or a container."
        )
        return 1
    free_gb = shutil.disk_usage(Path.cwd()).free / 1e9
    if free_gb < NEEDED_GB:
        print(
            f"An installation takes up to {NEEDED_GB} GB and {free_gb:.1f} GB are free here; make room, then try again."
        )
        return 1
    print(
        "Installing into .venv, once: PyTorch 2.13.0 (about 200 MB for a CPU build, up to 3 GB with CUDA, as your package"
    )
    print("index serves it) and about 250 MB of other packages, all at the versions pinned in constraints.txt.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
