"""What sealing costs: opening sealed weights beside plain ones and beside other encrypted formats, in interleaved rounds.

make bench NAME=sealing [ARGS="--quick --rounds 11"]

A load is from a file in the page cache to tensors in memory, counted in CPU seconds of the whole process. Plain weights are
`safetensors.torch.load_file` and `copy_` into a buffer that is there already (load_file alone only maps the file, and
reads nothing); ours are opened, every tag checked, into an arena: warm (`_reused`) or new (`_fresh`). The peers allocate for
themselves; each runs with the allocator as glibc has it and again with thresholds that let it reuse its memory. `_reused` is
its better one over our warm arena, `_reused_default_malloc` its ordinary one over that, `_fresh` its ordinary one over our new
arena. `tink` decrypts by 1 MiB into a buffer that is there already, `tink_read` by one `read()`. After each load, outside the
time, the bytes of all tensors are summed and must be those of the plain weights. One process for each side, one load of each in every
round, in random order; ratios are medians over the rounds. The peers have a virtual environment of their own,
`.venv-bench-sealing`, made at the first run out of the dependency group `bench-sealing`.
"""

from __future__ import annotations

import argparse
import base64
import gc
import json
import os
import platform
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PEERS_VENV = ROOT / ".venv-bench-sealing"
PEERS = ("tensorizer", "tink", "cryptotensors")
TUNED = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592", "MALLOC_TOP_PAD_": "268435456"}
MIB = 2**20
BLOCKS = 12
CONTEXT = {"tenant": "tn_" + "0" * 32, "kind": "weights", "object": "obj_" + "1" * 32}
Load = Callable[[], Any]


def settle(path: Path) -> None:
    """On the disk, and then in the page cache by plain reading, the same way for every file."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        while os.read(handle, 16 * MIB):
            pass
    finally:
        os.close(handle)


def weights(blocks: int) -> dict[str, Any]:
    """Tensors of GPT-2 small's shapes in half precision, random: 249 MB with all its 12 blocks."""
    import torch

    shapes: dict[str, tuple[int, ...]] = {"wte": (50_257, 768), "wpe": (1024, 768), "ln_f": (2, 768)}
    for block in range(blocks):
        parts = {"qkv": (768, 2304), "out": (768, 768), "up": (768, 3072), "down": (3072, 768), "norms": (2, 2, 768)}
        shapes |= {f"h.{block}.{name}": shape for name, shape in parts.items()}
        shapes |= {f"h.{block}.{name}.bias": shape[-1:] for name, shape in parts.items() if len(shape) == 2}
    return {name: torch.rand(shape, dtype=torch.float16) for name, shape in shapes.items()}


def checksum(tensors: dict[str, Any]) -> int:
    """The sum of all 64-bit words, modulo 2^64."""
    import torch

    return sum(int(tensor.reshape(-1).view(torch.int64).sum()) for tensor in tensors.values()) % 2**64


# The sides: each makes its file at first and then loads it as often as it is told. ---------------------------------------------


def our_sides(plain: Path, work: Path) -> dict[str, Load]:
    """Plain safetensors and ours, in one process."""
    import torch
    from safetensors.torch import load_file

    from cloister_privacy.sealing import Arena, Context, new_key, seal
    from cloister_privacy.sealing.memory import private_memory
    from cloister_privacy.sealing.tensors import open_tensors

    context, keys, size = Context(**CONTEXT), {}, plain.stat().st_size
    for chunk_mib in (1, 4):
        keys[chunk_mib] = new_key()
        sealed = seal(plain.read_bytes(), key=keys[chunk_mib], context=context, chunk_bytes=chunk_mib * MIB)
        (work / f"ours-{chunk_mib}").write_bytes(sealed)
        settle(work / f"ours-{chunk_mib}")
        del sealed
    arena, buffers = Arena(2 * size + 64 * MIB), {}
    for name, tensor in load_file(plain).items():
        large = memoryview(private_memory(tensor.nbytes))
        buffers[name] = (torch.zeros_like(tensor), torch.frombuffer(large, dtype=tensor.dtype).reshape(tensor.shape))

    def copied(which: int) -> dict[str, Any]:
        for name, tensor in load_file(plain).items():
            buffers[name][which].copy_(tensor)
        return {name: pair[which] for name, pair in buffers.items()}

    def opened(arena: Arena, *, chunk_mib: int = 1, threads: int = 1) -> Any:
        path = work / f"ours-{chunk_mib}"
        return open_tensors(path, key=keys[chunk_mib], context=context, arena=arena, threads=threads)

    return {
        "plain": lambda: copied(0),
        "plain_large_pages": lambda: copied(1),
        "ours_reused": lambda: opened(arena),
        "ours_reused_4mib": lambda: opened(arena, chunk_mib=4),
        "ours_reused_2_threads": lambda: opened(arena, threads=2),
        "ours_fresh": lambda: opened(Arena(2 * size + 64 * MIB)),
    }


def tensorizer_sides(plain: Path, work: Path) -> dict[str, Load]:
    from cryptotensors.torch import load_file
    from tensorizer import DecryptionParams, EncryptionParams, TensorDeserializer, TensorSerializer

    encryption = EncryptionParams.random()
    decryption = DecryptionParams.from_key(encryption.key)
    for name, params in (("plain", None), ("encrypted", encryption)):
        serializer = TensorSerializer(str(work / f"tensorizer-{name}"), encryption=params)
        serializer.write_state_dict(load_file(plain))
        serializer.close()
        settle(work / f"tensorizer-{name}")

    def load(name: str, params: Any) -> dict[str, Any]:
        path = str(work / f"tensorizer-{name}")
        with TensorDeserializer(path, device="cpu", encryption=params, num_readers=1) as tensors:
            return dict(tensors.items())

    return {
        "tensorizer_plain": lambda: load("plain", None),
        "tensorizer_encrypted": lambda: load("encrypted", decryption),
    }


def tink_sides(plain: Path, work: Path) -> dict[str, Load]:
    import torch
    from tink import new_keyset_handle, streaming_aead

    streaming_aead.register()
    primitive = new_keyset_handle(streaming_aead.streaming_aead_key_templates.AES256_GCM_HKDF_1MB).primitive(
        streaming_aead.StreamingAead
    )
    path, bound = work / "tink", json.dumps(CONTEXT).encode()
    with primitive.new_encrypting_stream(path.open("wb"), bound) as sealing:
        sealing.write(plain.read_bytes())
    settle(path)
    length, header_bytes = plain.stat().st_size, 8 + int.from_bytes(plain.open("rb").read(8), "little")
    header = json.loads(plain.read_bytes()[8:header_bytes])
    header.pop("__metadata__", None)
    kept = memoryview(bytearray(length))  # there already, and warm, as ours

    def in_blocks(opening: Any) -> memoryview:
        filled = 0
        while count := opening.readinto(kept[filled : filled + MIB]):
            filled += count
        return kept[:filled]

    def load(body_of: Callable[[Any], memoryview]) -> dict[str, Any]:
        with primitive.new_decrypting_stream(path.open("rb"), bound) as opening:
            body = body_of(opening)
        if len(body) != length:
            raise ValueError("tink gave another length")
        places = {name: entry["data_offsets"] for name, entry in header.items()}
        return {
            name: torch.frombuffer(body[header_bytes + start : header_bytes + stop], dtype=torch.float16)
            for name, (start, stop) in places.items()
        }

    return {
        "tink": lambda: load(in_blocks),
        "tink_read": lambda: load(lambda opening: memoryview(bytearray(opening.read()))),
    }


def cryptotensors_sides(plain: Path, work: Path) -> dict[str, Load]:
    import cryptotensors
    from cryptotensors.torch import load_file, save_file

    # The signing key is RFC 8032's first test vector: the peers' environment has no library to make one.
    key = {"kty": "oct", "alg": "aes256gcm", "kid": "enc", "k": _b64(secrets.token_bytes(32))}
    sign = {
        "kty": "okp", "alg": "ed25519", "kid": "sign",
        "d": _b64(bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")),
        "x": _b64(bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")),
    }  # fmt: skip
    cryptotensors.register_direct_key_provider(keys=[key, sign])
    path = work / "cryptotensors"
    save_file(load_file(plain), path, config={"enc_key": key, "sign_key": sign})
    settle(path)
    return {"cryptotensors": lambda: load_file(path)}


def _b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


SIDES = {
    "ours": our_sides,
    "tensorizer": tensorizer_sides,
    "tink": tink_sides,
    "cryptotensors": cryptotensors_sides,
}


def serve(side: str, plain: Path, work: Path) -> None:
    """Load what is named on each line that comes in, and answer with what it cost."""
    import torch

    torch.set_num_threads(1)
    loads = SIDES[side](plain, work)
    print(json.dumps({"loads": list(loads), "version": None if side == "ours" else version(side)}), flush=True)
    for line in sys.stdin:
        gc.collect()
        wall, cpu = time.perf_counter(), time.process_time()
        tensors = loads[line.strip()]()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        answer = {"cpu": cpu, "wall": wall, "checksum": checksum(tensors)}
        cpu = time.process_time()
        del tensors  # ours are zeroed here
        answer["release"] = time.process_time() - cpu
        print(json.dumps(answer), flush=True)


# What is measured by itself, each in a process of its own. --------------------------------------------------------------------


def measure_memory() -> dict[str, float]:
    """How much a process grows at most while it seals 4 GB from a generator to a sink, on two threads."""
    from cloister_privacy.sealing import Context, new_key, seal_stream

    class Sink:
        def write(self, data: memoryview) -> int:
            return len(data)

    def resident(field: str) -> float:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines[field].split()[0]) / 1024

    piece = bytes(MIB)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the start
    before, started = resident("VmRSS"), time.process_time()
    length = 4_000 * MIB
    seal_stream(
        (piece for _ in range(4_000)), Sink(), length=length, key=new_key(), context=Context(**CONTEXT), threads=2
    )
    return {"mb": resident("VmHWM") - before, "cpu_s_per_gb": (time.process_time() - started) / (length / 1e9)}


def measure_rotation(work: Path) -> dict[str, float]:
    """Seconds to give one version of 100 MB a new key: by sealing it anew, and by wrapping its data key anew."""
    from cloister_privacy.sealing import Arena, Context, LocalKeyProvider, new_key, open_into, seal, seal_stream

    keys = LocalKeyProvider.create(work / "keystore", key_file=work / "root.key")
    keys.create_key("old")
    keys.create_key("new")
    context, key, size = Context(**CONTEXT), new_key(), 100_000_000
    path = work / "version"
    path.write_bytes(seal(secrets.token_bytes(size), key=key, context=context))
    settle(path)
    wrapped = [keys.wrap("old", new_key(), context=context) for _ in range(1000)]

    def rewrap() -> None:
        for each in wrapped:
            keys.wrap("new", keys.unwrap("old", each, context=context), context=context)

    def reencrypt(arena: Arena) -> None:
        fresh = new_key()
        with arena.lease(size) as lease, (work / "anew").open("wb", buffering=0) as file:
            open_into(path, lease.memory, key=key, context=context)
            seal_stream([lease.memory], file, length=size, key=fresh, context=context)
            os.fsync(file.fileno())
        keys.wrap("new", fresh, context=context)

    arena = Arena(2 * size)
    reencrypt(arena)
    found: dict[str, list[float]] = {"wall_ratio": [], "cpu_ratio": [], "rewrap_us": [], "reencrypt_ms": []}
    for _ in range(5):
        times = []
        for task, repeats in ((lambda: reencrypt(arena), 1), (rewrap, 1000)):
            wall, cpu = time.perf_counter(), time.process_time()
            task()
            times.append(((time.perf_counter() - wall) / repeats, (time.process_time() - cpu) / repeats))
        found["wall_ratio"].append(times[0][0] / times[1][0])
        found["cpu_ratio"].append(times[0][1] / times[1][1])
        found["reencrypt_ms"].append(times[0][0] * 1e3)
        found["rewrap_us"].append(times[1][0] * 1e6)
    return {name: statistics.median(values) for name, values in found.items()}


def measure_rows(work: Path) -> dict[str, float]:
    """Microseconds to open one row of 4 kB out of the middle of 64 MiB, by chunk size."""
    from cloister_privacy.sealing import Context, SealedReader, new_key, seal

    context, found = Context(**CONTEXT), {}
    for chunk_mib in (1, 4):
        key, path = new_key(), work / f"rows-{chunk_mib}"
        path.write_bytes(seal(bytes(64 * MIB), key=key, context=context, chunk_bytes=chunk_mib * MIB))
        reader, buffer, times = SealedReader(path, key=key, context=context), bytearray(4096), []
        for row in range(200):
            started = time.perf_counter()
            reader.read_into(buffer, start=row * 300_000)
            times.append((time.perf_counter() - started) * 1e6)
        found[f"{chunk_mib}mib"] = round(statistics.median(times), 1)
    return found


TASKS: dict[str, Callable[[Path], dict[str, float]]] = {
    "memory": lambda _: measure_memory(),
    "rotation": measure_rotation,
    "rows": measure_rows,
}


# The run. ---------------------------------------------------------------------------------------------------------------------


def peers_python() -> tuple[Path | None, str | None]:
    """The interpreter of the peers' environment, made where it is missing; or why there is none."""
    python = PEERS_VENV / "bin" / "python"
    if not (PEERS_VENV / "installed").exists():
        print("installing the peers into", PEERS_VENV.name, flush=True)
        group = ["--group", f"{ROOT / 'pyproject.toml'}:bench-sealing"]
        for command in (
            [sys.executable, "-m", "venv", str(PEERS_VENV)],
            [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", *group],
        ):
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            if done.returncode:
                return None, done.stderr.strip()[-500:]
        (PEERS_VENV / "installed").touch()
    return python, None


def environment(*, is_tuned: bool = False) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if name not in TUNED}
    return clean | {"OMP_NUM_THREADS": "1"} | (TUNED if is_tuned else {})


def in_a_process(task: str, work: Path) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, "--task", task, "--work", str(work)],
        check=False, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{task} failed: {done.stderr[-2000:]}")
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(task, json.dumps(answer), flush=True)
    return answer


class Worker:
    """A process that loads when it is told to."""

    def __init__(self, side: str, python: Path, *, plain: Path, work: Path, is_tuned: bool = False) -> None:
        work.mkdir()
        self.side, self.suffix = side, "_tuned" if is_tuned else ""
        self._process = subprocess.Popen(
            [str(python), __file__, "--serve", side, "--plain", str(plain), "--work", str(work)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(is_tuned=is_tuned),
        )  # fmt: skip
        hello = self._answer()
        self.loads: list[str] = hello["loads"]
        self.version: str | None = hello["version"]

    def load(self, name: str) -> dict[str, Any]:
        assert self._process.stdin
        self._process.stdin.write(name + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        while line := self._process.stdout.readline():
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise RuntimeError(f"{self.side} ended; its error is above")


@contextmanager
def started(plain: Path, work: Path, conditions: dict[str, Any]) -> Iterator[list[Worker]]:
    """A worker for us and, for each peer, one with each allocator; a peer that cannot be had is named in the conditions."""
    python, problem = peers_python()
    with ExitStack() as stack:
        ours = Worker("ours", Path(sys.executable), plain=plain, work=work / "ours")
        stack.callback(ours.close)
        workers = [ours]
        for peer in PEERS:
            if python is None:
                conditions[peer] = f"not installed: {problem}"
                continue
            try:
                for is_tuned in (False, True):
                    place = work / f"{peer}-{is_tuned}"
                    worker = Worker(peer, python, plain=plain, work=place, is_tuned=is_tuned)
                    stack.callback(worker.close)
                    workers.append(worker)
                    conditions[peer] = worker.version
            except RuntimeError as error:
                conditions[peer] = f"could not run: {error}"
        yield workers


def measured(workers: list[Worker], *, rounds: int, expected: int) -> dict[str, list[dict[str, Any]]]:
    """Every load once in every round, in an order of its own, after a round that does not count."""
    found: dict[str, list[dict[str, Any]]] = {}
    loads = [(worker, name) for worker in workers for name in worker.loads]
    for turn in range(rounds + 1):
        secrets.SystemRandom().shuffle(loads)  # what ran before shows in the caches and in the memory that is free
        for worker, name in loads:
            answer = worker.load(name)
            if answer["checksum"] != expected:
                raise SystemExit(f"{name} gave other bytes than were written")
            if turn:
                found.setdefault(name + worker.suffix, []).append(answer)
    return found


def ratios_of(found: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    def over(one: str, other: str, field: str = "cpu", *, with_release: bool = False) -> float:
        return statistics.median(
            a[field] / (b[field] + (b["release"] if with_release else 0))
            for a, b in zip(found[one], found[other], strict=True)
        )

    ratios = {
        "plain_over_ours_cpu": over("plain", "ours_reused"),
        "plain_over_ours_cpu_with_zeroing": over("plain", "ours_reused", with_release=True),
        "plain_over_ours_cpu_fresh": over("plain", "ours_fresh"),
        "plain_large_pages_over_ours_cpu": over("plain_large_pages", "ours_reused"),
        "wall_threads_1_over_2": over("ours_reused", "ours_reused_2_threads", "wall"),
        "chunks_1_mib_over_4_mib_cpu": over("ours_reused", "ours_reused_4mib"),
    }
    for peer in ("tensorizer_encrypted", "tink", "tink_read", "cryptotensors"):
        if peer in found:
            better = min((peer, peer + "_tuned"), key=lambda name: statistics.median(a["cpu"] for a in found[name]))
            ratios[f"{peer}_over_ours_reused"] = over(better, "ours_reused")
            ratios[f"{peer}_over_ours_reused_default_malloc"] = over(peer, "ours_reused")
            ratios[f"{peer}_over_ours_fresh"] = over(peer, "ours_fresh")
    return {name: round(value, 3) for name, value in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--quick", action="store_true", help="two blocks of the twelve, and few rounds")
    for hidden in ("--serve", "--plain", "--work", "--task"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        serve(asked.serve, Path(asked.plain), Path(asked.work))
        return
    if asked.task:
        print(json.dumps(TASKS[asked.task](Path(asked.work))))
        return
    import torch
    from safetensors.torch import load_file, save_file

    rounds, tensors = asked.rounds or (3 if asked.quick else 15), weights(2 if asked.quick else BLOCKS)
    gigabytes = sum(tensor.nbytes for tensor in tensors.values()) / 1e9
    conditions: dict[str, Any] = {
        "device": "cpu", "threads": 1, "rounds": rounds, "weights_mb": round(gigabytes * 1e3),
        "torch": torch.__version__, "python": platform.python_version(), "cryptography": version("cryptography"),
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix=".venv-bench-sealing-", dir=ROOT) as directory:
        work = Path(directory)
        plain = work / "plain.safetensors"
        save_file(tensors, plain)
        settle(plain)
        expected = checksum(load_file(plain))
        with started(plain, work, conditions) as workers:
            found = measured(workers, rounds=rounds, expected=expected)
        rotation, memory = in_a_process("rotation", work), in_a_process("memory", work)
        conditions["row_of_4_kb_us"] = in_a_process("rows", work)
    ratios = ratios_of(found) | {"reencrypt_over_rewrap_1000": round(rotation["wall_ratio"], 1)}
    conditions |= {
        "rss_mb_seal_4gb": round(memory["mb"], 1),
        "seal_4gb_cpu_s_per_gb": round(memory["cpu_s_per_gb"], 4),
        "reencrypt_over_rewrap_1000": "from measured parts: one version of 100 MB opened, sealed anew and synced, "
        "times 1,000, over 1,000 data keys unwrapped and wrapped by the local provider, in wall time; "
        "the rows' updates, the same for both, are left out",
        "reencrypt_over_rewrap_1000_cpu": round(rotation["cpu_ratio"], 1),
        "reencrypt_ms": round(rotation["reencrypt_ms"], 1),
        "rewrap_us": round(rotation["rewrap_us"], 1),
        "fresh": "the system's cost of new memory is in it: much where a guest has given its free pages back to its host",
        "cpu_s_per_gb": {
            name: round(statistics.median(each["cpu"] for each in answers) / gigabytes, 4) for name, answers in sorted(found.items())
        },
        "zeroing_cpu_s_per_gb": round(statistics.median(each["release"] for each in found["ours_reused"]) / gigabytes, 4),
    }  # fmt: skip
    print(json.dumps({"name": "sealing", "ratios": ratios, "conditions": conditions}))


if __name__ == "__main__":
    main()
