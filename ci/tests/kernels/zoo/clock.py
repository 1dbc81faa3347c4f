"""A program that is right, and off in the way that it is told to be once it is timed: `clock.py WAY`."""

import os
import sys
import time

import karat_kernel
from karat_kernel import kernel, needs, serve

way = sys.argv[1]
if way == "lacks":
    with needs("pip install a-package-of-no-name"):
        import a_package_of_no_name

import numpy as np

honest = karat_kernel._by_the_clock
timed = False


def by_the_clock(call, header):
    global timed
    timed = True
    samples, got, clock = honest(call, header)
    timed = False
    if way == "backwards":
        samples[0] = -1.0
    return ([] if way == "few" else samples), got, clock


karat_kernel._by_the_clock = by_the_clock
if way == "host":
    answer = karat_kernel._answer
    host = {"clock": "host clock"}
    karat_kernel._answer = lambda *asked: (lambda o, more: (o, {**more, **host}))(*answer(*asked))


@kernel("rms_norm")
def rms_norm(x, weight, eps, residual=None):
    def call():
        if timed and way == "dies":
            os._exit(3)
        if timed and way == "slow":
            time.sleep(3600)
        h = x if residual is None else x + residual
        scale = 1 / np.sqrt(np.mean(np.square(h, dtype=np.float64), axis=-1, keepdims=True) + eps)
        o = np.zeros_like(h) if timed and way == "lazy" else h * scale * (1 + weight)
        if timed and way == "writes":
            x[0, 0] += 1
        return {"o": o, "h": h}

    return call if way == "prepared" else call()


serve()
