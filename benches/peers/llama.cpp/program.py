"""ggml's functions as candidates, from the libraries that llama-cpp-python brings: `program.py OP`.

llama-cpp-python's own Python is an interface to whole models. The libggml that lies in its folder has the public
C functions of ggml.h, and those are called here, each op as the graph that llama.cpp builds of it for this
model. The graph, and weights in the layout that a GGUF file has, are made once for a problem; a call computes
the graph. What ggml cannot be given (its results are f32) is rounded on the way out.
"""

import ctypes
import os
import sys
from ctypes import POINTER, Structure, c_bool, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "optimized/src/doors"))

from karat_kernel import kernel, needs, serve, unfit

with needs("pip install llama-cpp-python numpy"):
    import llama_cpp
    import numpy as np

    FOLDER = Path(llama_cpp.__file__).parent / "lib"
    base, cpu = (
        ctypes.CDLL(str(FOLDER / name), mode=ctypes.RTLD_GLOBAL)
        for name in ("libggml-base.so", "libggml-cpu.so")
    )

F32, BF16 = 0, 30


class Params(Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


def function(library, name, result, *arguments):
    try:
        found = getattr(library, name)
    except AttributeError:
        unfit(f"this libggml has no {name}: pip install 'llama-cpp-python>=0.3.36'")
    found.restype, found.argtypes = result, arguments
    return found


# ggml_init_params goes by value.
init = function(base, "ggml_init", c_void_p, Params)
free = function(base, "ggml_free", None, c_void_p)
new_tensor = function(base, "ggml_new_tensor", c_void_p, c_void_p, c_int, c_int, POINTER(c_int64))
get_data = function(base, "ggml_get_data", c_void_p, c_void_p)
new_graph = function(base, "ggml_new_graph", c_void_p, c_void_p)
expand = function(base, "ggml_build_forward_expand", None, c_void_p, c_void_p)
compute = function(base, "ggml_backend_graph_compute", c_int, c_void_p, c_void_p)
backend_init = function(cpu, "ggml_backend_cpu_init", c_void_p)
set_threads = function(cpu, "ggml_backend_cpu_set_n_threads", None, c_void_p, c_int)

add = function(base, "ggml_add", c_void_p, *[c_void_p] * 3)
mul = function(base, "ggml_mul", c_void_p, *[c_void_p] * 3)
mul_mat = function(base, "ggml_mul_mat", c_void_p, *[c_void_p] * 3)
rms = function(base, "ggml_rms_norm", c_void_p, c_void_p, c_void_p, c_float)
scale = function(base, "ggml_scale", c_void_p, c_void_p, c_void_p, c_float)

backend = backend_init()
set_threads(backend, int(os.environ.get("OMP_NUM_THREADS", 0)) or len(os.sched_getaffinity(0)))


class Graph:
    """Tensors and what is computed of them."""

    def __init__(self, elements):
        # Of what is drawn and what is computed, with room for the graph itself.
        self.context = init(Params(4 * elements + (16 << 20), None, False))
        self.graph = new_graph(self.context)

    def tensor(self, x, kind=F32):
        """A copy of an array; ggml names sizes from the innermost one on."""
        sizes = (c_int64 * x.ndim)(*reversed(x.shape))
        tensor = new_tensor(self.context, kind, x.ndim, sizes)
        x = np.ascontiguousarray(x, np.float32)
        if kind == BF16:
            x = (x.view(np.uint32) >> 16).astype(np.uint16)
        ctypes.memmove(get_data(tensor), x.ctypes.data, x.nbytes)
        return tensor

    def wanted(self, *tensors):
        for tensor in tensors:
            expand(self.graph, tensor)

    def compute(self):
        status = compute(backend, self.graph)
        if status:
            raise RuntimeError(f"ggml_backend_graph_compute: {status}")

    def then(self, read):
        """A call: computes, and leaves it to karat when to `read` what was computed."""

        def call():
            self.compute()
            return read

        return call

    @staticmethod
    def read(tensor, *shape):
        """A view of what was computed."""
        n = int(np.prod(shape))
        data = ctypes.cast(get_data(tensor), POINTER(c_float))
        return np.ctypeslib.as_array(data, (n,)).reshape(shape)

    def __del__(self):
        free(self.context)


def linear():
    """ggml_mul_mat."""

    @kernel("linear")
    def linear(x, weight, dtype):
        graph = Graph(x.size + weight.size + len(x) * len(weight))
        w = graph.tensor(weight, BF16 if dtype == "bf16" else F32)
        o = mul_mat(graph.context, w, graph.tensor(x))
        graph.wanted(o)

        return graph.then(lambda: graph.read(o, len(x), len(weight)))


def rms_norm():
    """ggml_add, ggml_rms_norm, ggml_mul by weights that were stored with their one, as in GGUF files."""

    @kernel("rms_norm")
    def rms_norm(x, weight, eps, residual=None):
        graph = Graph(6 * x.size)
        h = graph.tensor(x)
        if residual is not None:
            h = add(graph.context, h, graph.tensor(residual))
        o = mul(graph.context, rms(graph.context, h, eps), graph.tensor(1 + weight))
        graph.wanted(h, o)

        names = {"o": o} if residual is None else {"o": o, "h": h}
        return graph.then(lambda: {name: graph.read(t, *x.shape) for name, t in names.items()})


def gated_delta_rule():
    """ggml_gated_delta_net on queries and keys that ggml_rms_norm made unit vectors, as llama.cpp has them.

    Its value head h reads key head h % HK, so value heads are put in that order; states are stored transposed.
    """
    delta_net = function(base, "ggml_gated_delta_net", c_void_p, *[c_void_p] * 7, c_int64)

    @kernel("gated_delta_rule")
    def gated_delta_rule(q, k, v, g, beta, state, cu_seqlens, eps):
        (_, hk, size), hv = q.shape, v.shape[1]
        order = np.arange(hv).reshape(hk, hv // hk).T.ravel()
        back = np.argsort(order)
        graph = Graph(8 * (q.size + k.size + v.size + g.size + beta.size) + 4 * state.size)
        context = graph.context

        def unit(x):
            # x / sqrt(sum + eps) is rms_norm with eps / size, over sqrt(size).
            return scale(context, rms(context, x, eps / size), size**-0.5)

        cuts = cu_seqlens.tolist()
        spans = [(i, a, b) for i, (a, b) in enumerate(zip(cuts, cuts[1:])) if a < b]
        if len({b - a for _, a, b in spans}) == 1 and len(spans) == len(state):
            groups = [(slice(None), slice(None), len(spans))]
        else:
            groups = [(slice(i, i + 1), slice(a, b), 1) for i, a, b in spans]
        parts = []
        for which, rows, n in groups:
            t = len(v[rows]) // n
            q_k = [unit(graph.tensor(x[rows].reshape(n, t, hk, size))) for x in (q, k)]
            values = graph.tensor(v[rows][:, order].reshape(n, t, hv, size))
            gates = [graph.tensor(x[rows][:, order].reshape(n, t, hv, 1)) for x in (g, beta)]
            before = graph.tensor(state[which][:, order].swapaxes(2, 3))
            got = delta_net(context, *q_k, values, *gates, before, 1)
            graph.wanted(got)
            parts.append((which, rows, n, t, got))

        def read():
            o, after = np.empty_like(v), state.copy()
            for which, rows, n, t, got in parts:
                flat = graph.read(got, n * (t + size) * hv * size)
                tokens = n * t * hv * size
                o[rows] = flat[:tokens].reshape(n * t, hv, size)[:, back]
                after[which] = flat[tokens:].reshape(n, hv, size, size)[:, back].swapaxes(2, 3)
            return {"o": o, "state": after}

        return graph.then(read)


WAYS = {"linear": linear, "rms_norm": rms_norm, "gated_delta_rule": gated_delta_rule}
WAYS[sys.argv[1]]()
serve()
