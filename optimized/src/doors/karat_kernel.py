"""Kernels in Python for karat: one file that needs only numpy (safetensors are read and written here).

    from karat_kernel import kernel, serve

    @kernel("rms_norm")
    def rms_norm(x, weight, eps, residual=None):
        ...
        return {"o": o, "h": h}          # or a tuple in the op's order, or the one output

    serve()

A function gets the op's tensors and scalars by name, as far as it asks for them; an optional tensor
that is not there is None. `case` and `dtype` may be asked for too: the case's letters, and the storage
type.

Without `framework`, tensors are numpy arrays; numpy has no bf16, so those arrive widened to f32, and
what is returned is rounded to the storage type of the output, to nearest even. With
`framework="torch"` tensors are torch's, in their storage type, on `device`; a Triton kernel is a torch
function that launches it.

    @kernel("rms_norm", framework="torch", device="cuda")
    def rms_norm(x, weight, eps, residual=None): ...

What the function prints goes to standard error. An input that it writes to is found and told.
"""

import inspect
import json
import os
import struct
import sys
import traceback

import numpy as np

__all__ = ["kernel", "serve"]

VERSION = 1
_KERNELS = {}
_NUMPY = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "U8": np.uint8}


def kernel(op, framework="numpy", device="cpu"):
    """Registers a function as karat's candidate for `op`."""
    if framework not in ("numpy", "torch"):
        raise ValueError(f"framework {framework!r}: expected numpy or torch")

    def register(function):
        _KERNELS[op] = (function, framework, device)
        return function

    return register


def _numpy_in(dtype, shape, data):
    if dtype == "BF16":
        wide = np.frombuffer(data, np.uint16).astype(np.uint32) << 16
        return wide.view(np.float32).reshape(shape)
    return np.frombuffer(data, _NUMPY[dtype]).reshape(shape).copy()


def _numpy_out(x, dtype):
    x = np.asarray(x)
    if dtype == "BF16":
        bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(bits.view(np.float32)), np.uint16(0x7FC0), rounded)
    return np.ascontiguousarray(x, _NUMPY[dtype])


def _torch_types():
    import torch

    return torch, {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
                   "BF16": torch.bfloat16, "I64": torch.int64, "U8": torch.uint8}


def _torch_in(dtype, shape, data, device):
    torch, types = _torch_types()
    if 0 in shape:
        return torch.empty(shape, dtype=types[dtype], device=device)
    return torch.frombuffer(bytearray(data), dtype=types[dtype]).reshape(shape).to(device)


def _torch_out(x, dtype):
    torch, types = _torch_types()
    x = torch.as_tensor(x).detach().to("cpu", types[dtype]).contiguous()
    return x.reshape(-1).view(torch.uint8).numpy() if x.numel() else np.zeros(0, np.uint8), x.shape


def _parse(payload):
    """Safetensors: the length of a JSON header, the header, the bytes of all tensors."""
    (length,) = struct.unpack("<Q", payload[:8])
    data = memoryview(payload)[8 + length:]
    header = json.loads(payload[8:8 + length])
    header.pop("__metadata__", None)
    return {name: (t["dtype"], t["shape"], data[slice(*t["data_offsets"])]) for name, t in header.items()}


def _serialize(tensors):
    """The same the other way: name -> (dtype, shape, bytes)."""
    header, end = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values())


def _answer(header, payload):
    function, framework, device = _KERNELS[header["op"]]
    tensors = _parse(payload)
    if framework == "torch":
        given = {name: _torch_in(*t, device) for name, t in tensors.items()}
        kept = {name: t.clone() for name, t in given.items()}
    else:
        given = {name: _numpy_in(*t) for name, t in tensors.items()}
        kept = {name: t.copy() for name, t in given.items()}
    told = {**header["scalars"], **given, "case": header["case"], "dtype": header["dtype"]}
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        arguments = told
    else:
        arguments = {p.name: told.get(p.name) for p in parameters}
    got = function(**arguments)
    wanted = header["outputs"]
    if not isinstance(got, dict):
        got = got if isinstance(got, (tuple, list)) else (got,)
        if len(got) != len(wanted):
            raise ValueError(f"returned {len(got)} outputs, expected {[w['name'] for w in wanted]}")
        got = {w["name"]: x for w, x in zip(wanted, got)}
    missing = [w["name"] for w in wanted if got.get(w["name"]) is None]
    if missing:
        raise ValueError(f"did not return {missing}")
    outputs = {}
    for w in wanted:
        if framework == "torch":
            data, shape = _torch_out(got[w["name"]], w["dtype"])
        else:
            data = _numpy_out(got[w["name"]], w["dtype"])
            shape = data.shape
        outputs[w["name"]] = (w["dtype"], list(shape), data.tobytes())
    return outputs, [name for name, t in given.items() if not _same(t, kept[name], framework)]


def _same(a, b, framework):
    if framework == "torch":
        torch, _ = _torch_types()
        if a.shape != b.shape:
            return False
        raw = (lambda x: x.contiguous().reshape(-1).view(torch.uint8)) if a.numel() else (lambda x: x)
        return bool(torch.equal(raw(a), raw(b)))
    return a.tobytes() == b.tobytes()


def _exactly(stream, n):
    data = stream.read(n)
    return data if data is not None and len(data) == n else None


def serve():
    """Answers karat until it asks no more."""
    source = sys.stdin.buffer
    sink = os.fdopen(os.dup(1), "wb")
    # What kernels print, in Python or below it, must not get between frames.
    os.dup2(2, 1)
    sys.stdout = sys.stderr

    def send(header, payload=b""):
        text = json.dumps({"karat": VERSION, "bytes": len(payload), **header}).encode()
        sink.write(b"KRT1" + struct.pack("<I", len(text)) + text + payload)
        sink.flush()

    while (start := _exactly(source, 8)) is not None:
        header = json.loads(_exactly(source, struct.unpack("<I", start[4:])[0]))
        payload = _exactly(source, header["bytes"])
        if header["call"] == "hello":
            send({"status": "ok", "ops": sorted(_KERNELS)})
            continue
        try:
            outputs, changed = _answer(header, payload)
            send({"status": "ok", "changed": changed}, _serialize(outputs))
        except Exception as error:
            traceback.print_exc()
            at = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{os.path.basename(at.filename)}:{at.lineno}"
            send({"status": "error", "message": f"{where}: {type(error).__name__}: {error}"})
