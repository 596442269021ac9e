"""How long `import cloister` takes, beside a bare interpreter and `import httpx2`.

make bench NAME=import
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time

ROUNDS = 21
BOUND_S = 0.4


def seconds(statement: str) -> float:
    """One fresh interpreter that runs the statement and ends."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - started


def main() -> None:
    statements = {"nothing": "pass", "cloister": "import cloister", "httpx2": "import httpx2"}
    client = "import cloister; cloister.Cloister('http://127.0.0.1:1', client_id='ap_x', client_secret='x')"
    statements["client"] = client
    times: dict[str, list[float]] = {name: [] for name in statements}
    for statement in statements.values():
        seconds(statement)  # warm the file cache
    for _ in range(ROUNDS):
        for name, statement in statements.items():
            times[name].append(seconds(statement))
    net = [a - b for a, b in zip(times["cloister"], times["nothing"], strict=True)]
    median = {name: statistics.median(values) for name, values in times.items()}
    answer = {
        "name": "import",
        "ratios": {
            "cloister_over_bound": round(statistics.median(net) / BOUND_S, 4),
            "cloister_over_httpx2": round(
                statistics.median(a / b for a, b in zip(times["cloister"], times["httpx2"], strict=True)), 4
            ),
            "ready_client_over_httpx2": round(
                statistics.median(a / b for a, b in zip(times["client"], times["httpx2"], strict=True)), 4
            ),
        },
        "conditions": {
            "rounds": ROUNDS,
            "bound_s": BOUND_S,
            "median_s": {name: round(value, 4) for name, value in median.items()},
            "python": platform.python_version(),
            "device": "cpu",
        },
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
