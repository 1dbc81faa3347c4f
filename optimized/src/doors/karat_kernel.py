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

A function may return a function without arguments instead, which returns the outputs: what came before
is done once for a problem (a plan, an index, another layout of the weights), and `karat bench --kernel`
times calls of what was returned, on inputs that stay where they are. On a GPU it times by events of the
device, around replays of a graph of calls where they can be captured, else around calls. A call may in turn
return a function that hands over what was computed, in the layout that is asked for: that one is called
after the last, and not timed.

What a program needs and may not be there is imported under `needs`: karat then skips it, and says why.

    with needs("pip install torch"):
        import torch

What the function prints goes to standard error. An input that it writes to is found and told.
"""

import contextlib
import inspect
import json
import os
import struct
import sys
import time
import traceback

__all__ = ["kernel", "needs", "serve", "unfit"]

VERSION = 1
_KERNELS = {}
_NOT_CAPTURED = set()


# Frames have standard output for themselves: what is printed, in Python or below it, goes to standard error.
_SINK = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)
sys.stdout = sys.stderr


def _send(header, payload=b""):
    text = json.dumps({"karat": VERSION, "bytes": len(payload), **header}).encode()
    _SINK.write(b"KRT1" + struct.pack("<I", len(text)) + text + payload)
    _SINK.flush()


def unfit(why):
    """Tells karat that this machine cannot run the program, and ends it."""
    if _exactly(sys.stdin.buffer, 8) is not None:
        _send({"status": "unfit", "message": why})
    sys.exit(0)


@contextlib.contextmanager
def needs(install):
    """What cannot be imported inside makes the program unfit; `install` says what to type."""
    try:
        yield
    except (ImportError, OSError) as error:
        unfit(f"{error}: {install}".replace("\n", " "))


def _exactly(stream, n):
    data = stream.read(n)
    return data if data is not None and len(data) == n else None


with needs("pip install numpy"):
    import numpy as np

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
    again = got if callable(got) else lambda: function(**arguments)
    if callable(got):
        got = got()
    more = {}
    if header["call"] == "time":
        on_device = framework == "torch" and str(device).startswith("cuda")
        samples, got, clock = (_by_events if on_device else _by_the_clock)(again, header)
        more = {"samples_ns": samples, "clock": clock}
    if callable(got):
        got = got()
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
    changed = [name for name, t in given.items() if not _same(t, kept[name], framework)]
    return outputs, {"changed": changed, **more}


def _by_the_clock(call, header):
    """Times of calls on the CPU, after one for the caches, and what the last one returned."""
    away, group = header["away"], header["group"]
    walked = np.ones(away // 8, np.int64) if away else None
    got, samples = call(), []
    for _ in range(header["times"]):
        if away:
            walked += 1
            group = 1
        start = time.perf_counter_ns()
        for _ in range(group):
            got = call()
        samples.append(max(time.perf_counter_ns() - start, 1) / group)
    return samples, got, "program clock"


def _by_events(call, header):
    """The same on a GPU: events before and after a group of calls, which follow one another unwaited for."""
    torch, _ = _torch_types()
    away, group = header["away"], header["group"]
    if away:
        cached = torch.cuda.get_device_properties(0).L2_cache_size
        walked = torch.empty(max(away, 2 * cached), dtype=torch.uint8, device="cuda")
        group = 1

    def calls():
        for _ in range(group):
            got = call()
        return got

    call()
    # Another size may go another way.
    problem = header["op"], json.dumps(header["case"], sort_keys=True), header["dtype"]
    graph, got = _captured(torch, calls, problem)
    if graph:
        graph.replay()
    samples = []
    for _ in range(header["times"]):
        if away:
            walked.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        if graph:
            graph.replay()
        else:
            got = calls()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) * 1e6 / group)
    return samples, got, "graph replays" if graph else "device events"


def _captured(torch, calls, problem):
    """A graph of calls and what they returned; None twice where they cannot be captured.

    A graph has no launches from Python in it, which often take longer than what they launch. What waits for
    the device, or reads from it to decide, cannot be captured; torch gives no random numbers after it has tried,
    and is not asked again.
    """
    if problem in _NOT_CAPTURED:
        return None, None
    torch.cuda.synchronize()
    stream, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            got = calls()
    except Exception as error:
        torch.cuda.set_stream(stream)
        print(f"not captured, timed call by call: {error}")
        _NOT_CAPTURED.add(problem)
        return None, None
    return graph, got


def _same(a, b, framework):
    if framework == "torch":
        torch, _ = _torch_types()
        if a.shape != b.shape:
            return False
        raw = (lambda x: x.contiguous().reshape(-1).view(torch.uint8)) if a.numel() else (lambda x: x)
        return bool(torch.equal(raw(a), raw(b)))
    return a.tobytes() == b.tobytes()


def serve():
    """Answers karat until it asks no more."""
    source = sys.stdin.buffer
    while (start := _exactly(source, 8)) is not None:
        header = json.loads(_exactly(source, struct.unpack("<I", start[4:])[0]))
        payload = _exactly(source, header["bytes"])
        if header["call"] == "hello":
            _send({"status": "ok", "ops": sorted(_KERNELS), "times": True})
            continue
        try:
            outputs, more = _answer(header, payload)
            _send({"status": "ok", **more}, _serialize(outputs))
        except Exception as error:
            traceback.print_exc()
            at = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{os.path.basename(at.filename)}:{at.lineno}"
            _send({"status": "error", "message": f"{where}: {type(error).__name__}: {error}"})
