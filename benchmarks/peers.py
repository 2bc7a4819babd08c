"""Encrypting formats for tensors, in an environment of their own (`scripts/peers`): CryptoTensors and tensorizer."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.measure import run, told

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.measure import Run

PYTHON = Path(__file__).parents[1] / ".peers" / "bin" / "python"
TENSOR = 64 << 20

# Each is given the source, what it writes and its keys, and prints the seconds after its imports, and bytes.
_PREPARED = """
import base64, json, mmap, os, sys, time
import numpy
source, sealed, keys = sys.argv[1:4]
size = os.path.getsize(source)
def source_tensors():
    data = numpy.fromfile(source, dtype="u1")
    return {{f"tensor{{at:05}}": data[at * {tensor}:][:{tensor}] for at in range(-(-size // {tensor}))}}
def touch():
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    memory.madvise(23)
    memory.close()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak
{imports}
{prepare}
touch()
started = time.perf_counter()
{work}
seconds = time.perf_counter() - started
print(json.dumps([seconds, {told}]))
"""


class Peer(NamedTuple):
    """How a peer writes and reads."""

    name: str
    package: str
    imports: str
    keys: str
    write: str
    prepare: str
    read: str


_BASE64 = "base64.b64encode"
PEERS = (
    Peer(
        "CryptoTensors",
        "cryptotensors",
        "import cryptotensors, cryptotensors.numpy\n"
        "from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey\n",
        f"""
key = Ed25519PrivateKey.generate()
made = [
    {{"kty": "oct", "alg": "aes256gcm", "kid": "e", "k": {_BASE64}(os.urandom(32)).decode()}},
    {{"kty": "okp", "alg": "ed25519", "kid": "s", "d": {_BASE64}(key.private_bytes_raw()).decode(),
     "x": {_BASE64}(key.public_key().public_bytes_raw()).decode()}},
]
json.dump(made, open(keys, "w"))
tensors = source_tensors()
""",
        'cryptotensors.numpy.save_file(tensors, sealed, config={"enc_key": made[0], "sign_key": made[1]})',
        "cryptotensors.register_direct_key_provider(keys=json.load(open(keys)))",
        "read = cryptotensors.numpy.load_file(sealed)",
    ),
    Peer(
        "tensorizer, encrypted",
        "tensorizer",
        "import torch\n"
        "from tensorizer import DecryptionParams, EncryptionParams, TensorDeserializer, TensorSerializer\n",
        """
made = EncryptionParams.random()
open(keys, "wb").write(made.key)
tensors = {name: torch.from_numpy(one) for name, one in source_tensors().items()}
""",
        """
writer = TensorSerializer(sealed, encryption=made)
writer.write_state_dict(tensors)
writer.close()
""",
        'key = DecryptionParams.from_key(open(keys, "rb").read())',
        'read = dict(TensorDeserializer(sealed, device="cpu", encryption=key))',
    ),
)


class Measures(NamedTuple):
    """What `in_turn` takes, by the peers' names."""

    packing: dict[str, Callable[[], Run]]
    reading: dict[str, Callable[[], Run]]


def measures(folder: Path, source: Path) -> Measures:
    """Of the peers that are there; none without `scripts/peers`."""
    found = Measures({}, {})
    there, size = versions(), [source.stat().st_size]
    for place, peer in enumerate(peer for peer in PEERS if peer.package in there):
        paths = [str(source), str(folder / f"peer{place}.sealed"), str(folder / f"peer{place}.keys")]
        write = _script(peer.imports, peer.keys, peer.write, "size")
        read = _script(peer.imports, peer.prepare, peer.read, "sum(one.nbytes for one in read.values())")
        for way, script, ways in (("write", write, found.packing), ("read", read, found.reading)):
            ways[f"{peer.name}: {way}"] = partial(told, [str(PYTHON), "-P", "-c", script, *paths], expected=size)
    return found


def versions() -> dict[str, str]:
    """What is installed there."""
    if not PYTHON.exists():
        return {}
    listed = json.loads(run([str(PYTHON), "-m", "pip", "list", "--format=json"]).output)
    found = {one["name"]: one["version"] for one in listed}
    return {name: found[name] for name in ("cryptotensors", "tensorizer", "torch", "matplotlib") if name in found}


def _script(imports: str, prepare: str, work: str, told: str) -> str:
    return _PREPARED.format(imports=imports, prepare=prepare, work=work, told=told, tensor=TENSOR)
