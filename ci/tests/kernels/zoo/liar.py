"""A program behind the process door that does not keep to it. Needs nothing but Python.

`liar.py WAY`: it says hello as it should, and answers the first question in that way.
"""

import json
import os
import struct
import sys
import time

way = sys.argv[1]
source, sink = sys.stdin.buffer, sys.stdout.buffer


def frame(header, payload=b"", claimed=None):
    header = {"karat": 1, "bytes": len(payload) if claimed is None else claimed, **header}
    text = json.dumps(header).encode()
    return b"KRT1" + struct.pack("<I", len(text)) + text + payload


def tensors(outputs, size=lambda n: n):
    """Safetensors of zeros."""
    header, end = {}, 0
    for name, dtype, shape in outputs:
        n = 4
        for s in shape:
            n *= s
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + n]}
        end += n
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size(end))


def send(data):
    sink.write(data)
    sink.flush()


while True:
    start = source.read(8)
    if len(start) < 8:
        break
    asked = json.loads(source.read(struct.unpack("<I", start[4:])[0]))
    source.read(asked["bytes"])
    if asked["call"] == "hello":
        if way == "another-version":
            send(frame({"karat": 7, "status": "ok"}))
        elif way == "hello-garbage":
            send(b"Traceback (most recent call last):\n")
        elif way == "other-ops":
            send(frame({"status": "ok", "ops": ["attention"]}))
        else:
            send(frame({"status": "ok"}))
        continue
    wanted = [(t["name"], t["dtype"], t["shape"]) for t in asked["outputs"]]
    right = tensors(wanted)
    if way == "garbage":
        send(bytes(range(256)) * 64)
    elif way == "garbage-tensors":
        send(frame({"status": "ok"}, b"\xff" * 100))
    elif way == "too-much":
        send(frame({"status": "ok"}, right + bytes(1 << 20)))
    elif way == "claims-too-much":
        send(frame({"status": "ok"}, right, claimed=1 << 40))
    elif way == "too-little":
        send(frame({"status": "ok"}, right)[:-10])
        break
    elif way == "nothing":
        break
    elif way == "leaves":
        # Its output has ended before it has.
        os.close(1)
        time.sleep(0.05)
        os._exit(7)
    elif way == "silence":
        time.sleep(3600)
    elif way == "other-shape":
        send(frame({"status": "ok"}, tensors([(n, t, [*s[:-1], s[-1] + 1]) for n, t, s in wanted])))
    elif way == "other-dtype":
        send(frame({"status": "ok"}, tensors([(n, "I32", s) for n, t, s in wanted])))
    elif way == "other-output":
        send(frame({"status": "ok"}, tensors([*wanted, ("extra", "F32", [1])])))
    elif way == "fewer-outputs":
        send(frame({"status": "ok"}, tensors(wanted[:-1])))
    elif way == "no-status":
        send(frame({}, right))
    elif way == "header-no-json":
        send(b"KRT1" + struct.pack("<I", 3) + b"{{{")
    elif way == "says-error":
        send(frame({"status": "error", "message": "out of luck\nand of lines"}))
    elif way == "dies-with-words":
        print("liar: no such GPU", file=sys.stderr, flush=True)
        os._exit(3)
    elif way == "zeros":
        send(frame({"status": "ok"}, right))
