"""What all parts of the recorder share: refusing an unfit interpreter, files, distances, sketches."""

import importlib.util
import json
import os
import platform
import sys
from pathlib import Path

import numpy as np

FAILED = 1
REFUSED = 2
UNCERTAIN = 8
UNFIT = 9


def end(code, line):
    print(f"record.py: {line}", file=sys.stderr)
    sys.exit(code)


def note(line):
    print(line, file=sys.stderr, flush=True)


def require_reference_kernels():
    """The torch functions are what runs only where nothing faster is installed."""
    for package in ("fla", "causal_conv1d", "kernels"):
        if importlib.util.find_spec(package) is not None:
            end(UNFIT, f"the package {package} is installed: transformers would silently call it. Use a clean environment")
    try:
        import blake3  # noqa: F401
        import torch
        import transformers
    except ImportError as error:
        end(UNFIT, f"{error}: pip install -r golden/scripts/requirements.txt")
    wanted = {
        line.split("==")[0]: line.split("==")[1]
        for line in (Path(__file__).parent / "requirements.txt").read_text().split("\n")
        if "==" in line and not line.startswith("#")
    }
    if transformers.__version__ != wanted["transformers"]:
        end(UNFIT, f"transformers {transformers.__version__}: recordings are made with {wanted['transformers']}")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False


def blake3_hex(data):
    from blake3 import blake3

    return blake3(data).hexdigest()


def blake3_file(path):
    from blake3 import blake3

    hasher = blake3()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            hasher.update(block)
    return hasher.hexdigest()


def script_hash():
    texts = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    return blake3_hex(b"".join(texts))


def versions():
    import safetensors
    import torch
    import transformers

    return {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "safetensors": safetensors.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def producer(dtype, extra=None):
    return {
        "tool": "transformers",
        "versions": versions(),
        "script_blake3": script_hash(),
        "dtype": dtype,
        "attention": "eager",
        "experts": "eager",
        "gated_delta_rule": "torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule",
        "fla": None,
        "causal_conv1d": None,
        "kernels": None,
        "tf32": False,
        "device": "cpu",
        "threads": 1,
        **(extra or {}),
    }


def rows(x):
    """One row per token: a [B, T, ...] tap as [B * T, ...]."""
    x = np.asarray(x, dtype=np.float64)
    return x.reshape(-1, x.shape[-1])


def distance(got, want, keep=None):
    """Relative RMS of the whole, and of the worst row."""
    got, want = rows(got), rows(want)
    if keep is not None:
        got, want = got[keep], want[keep]
    err2, want2 = ((got - want) ** 2).sum(-1), (want**2).sum(-1)
    whole = float(np.sqrt(err2.sum() / max(want2.sum(), 1e-300)))
    per_row = np.sqrt(err2 / np.where(want2 == 0, np.where(err2 == 0, 1.0, 1e-300), want2))
    return {"rel_rms": whole, "worst_token": float(per_row.max(initial=0.0))}


GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)


def mix(z):
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def sketch(name, x):
    """f64 [99]: sum, sum of squares, absmax, 64 samples, 32 projections of the flattened tap.

    key = first 8 bytes of blake3(name), little-endian; h(key, i) = mix(key + (i + 1) * golden ratio).
    Sample i is element (h(key, i) * n) >> 64. Projection j sums the elements, element e negated where
    bit j of h(mix(key), e) is set.
    """
    from blake3 import blake3

    x = np.ascontiguousarray(x, dtype=np.float64).reshape(-1)
    n = x.size
    with np.errstate(over="ignore"):
        key = np.frombuffer(blake3(name.encode()).digest()[:8], dtype="<u8")[0]
        h = mix(key + np.arange(1, 65, dtype=np.uint64) * GOLDEN_RATIO)
        samples = x[[(int(v) * n) >> 64 for v in h]]
        signs = mix(mix(key) + np.arange(1, n + 1, dtype=np.uint64) * GOLDEN_RATIO)
    projections = [
        float((x * (1.0 - 2.0 * ((signs >> np.uint64(j)) & np.uint64(1)).astype(np.float64))).sum()) for j in range(32)
    ]
    head = [float(x.sum()), float((x * x).sum()), float(np.abs(x).max(initial=0.0))]
    return np.array(head + samples.tolist() + projections, dtype=np.float64)


def write_recording(out, tensors, manifest):
    """Both files, each beside its place and then renamed."""
    from safetensors.numpy import save

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.ascontiguousarray(x) for name, x in sorted(tensors.items())}
    manifest["taps"] = [
        {
            "name": name,
            "shape": list(x.shape),
            "dtype": {"float32": "f32", "float64": "f64", "int64": "i64", "uint8": "u8"}[str(x.dtype)],
            "tier": "sketch" if name.endswith(".sketch") else "topk" if "/topk." in name or name.endswith("/logsumexp") else "full",
            "blake3": blake3_hex(x.tobytes()),
        }
        for name, x in tensors.items()
    ]
    data = save(tensors, metadata={"schema": "karat.golden/1", "id": manifest["id"]})
    manifest["recording"] = {"path": "recording.safetensors", "bytes": len(data), "blake3": blake3_hex(data)}
    text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    for name, content in (("recording.safetensors", data), ("manifest.json", text.encode())):
        partial = out / f".{name}.{os.getpid()}.partial"
        partial.write_bytes(content)
        os.replace(partial, out / name)
    note(f"{manifest['id']}: {len(tensors)} tensors, {len(data)} bytes")
