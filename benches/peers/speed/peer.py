"""A peer that stays loaded and is asked line by line; `peers.py` starts it.

    python peer.py llama.cpp FILE.gguf THREADS DEPTH STATE
    python peer.py transformers CHECKPOINT THREADS DEPTH STATE

STATE is a file with the context of llama.cpp at DEPTH, written if it is not there; none at depth 0.
Answers one JSON line when it is ready, and one to each line on standard input:
{"ask": "turn", "prefill": N, "decode": N} with tokens per second, {"ask": "logits", "tokens": [..], "out": F}
with a file of f32 [T, V] as numpy writes it.
"""

import ctypes
import json
import os
import sys
import time


def token(i, vocab):
    """The tokens that `karat bench` feeds."""
    return (i * 7919 + 13) % vocab


def clock(tokens, work):
    start = time.perf_counter()
    work()
    return tokens / (time.perf_counter() - start)


class LlamaCpp:
    def __init__(self, path, threads, depth, state):
        import llama_cpp

        self.c = c = llama_cpp
        # It is held for as long as the library may call it.
        self.silent = c.llama_log_callback(lambda *_: None)
        c.llama_log_set(self.silent, None)
        c.llama_backend_init()
        self.model = c.llama_model_load_from_file(path.encode(), c.llama_model_default_params())
        if not self.model:
            raise ValueError(f"{path}: llama.cpp does not load it")
        params = c.llama_context_default_params()
        params.n_ctx = depth + 4096
        params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = threads
        self.context = c.llama_init_from_model(self.model, params)
        if not self.context:
            raise ValueError(f"{path}: no context of {params.n_ctx} tokens")
        self.vocab = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self.model))
        system = c.llama_print_system_info().decode()
        self.versions = {"llama-cpp-python": c.__version__, "system": system}
        self.depth = depth
        self.fed = 0
        # The context then grows by what each turn feeds, little beside its depth.
        if depth and not self.load(state, depth):
            while self.fed < depth:
                self.feed([token(self.fed + i, self.vocab) for i in range(min(512, depth - self.fed))])
            self.save(state)

    def load(self, state, depth):
        """What a state holds does not change how long it takes: one is used with all formats."""
        if not os.path.exists(state):
            return False
        c = self.c
        tokens, count = (c.llama_token * 1)(), ctypes.c_size_t(0)
        if c.llama_state_seq_load_file(self.context, state.encode(), 0, tokens, 1, ctypes.byref(count)) == 0:
            raise ValueError(f"{state}: llama.cpp does not load it; remove it")
        self.fed = c.llama_memory_seq_pos_max(c.llama_get_memory(self.context), 0) + 1
        if self.fed != depth:
            raise ValueError(f"{state}: {self.fed} tokens, not {depth}; remove it")
        return True

    def save(self, state):
        c = self.c
        part = f"{state}.{os.getpid()}.part"
        try:
            if c.llama_state_seq_save_file(self.context, part.encode(), 0, (c.llama_token * 1)(), 0) == 0:
                raise ValueError(f"{state}: llama.cpp does not write it")
            os.rename(part, state)
        finally:
            if os.path.exists(part):
                os.remove(part)

    def feed(self, tokens):
        c = self.c
        array = (c.llama_token * len(tokens))(*tokens)
        code = c.llama_decode(self.context, c.llama_batch_get_one(array, len(tokens)))
        if code != 0:
            raise ValueError(f"llama_decode returned {code}")
        c.llama_synchronize(self.context)
        self.fed += len(tokens)

    def reset(self):
        if self.depth == 0:
            self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)

    def turn(self, prefill, decode):
        said = {}
        tokens = [token(i, self.vocab) for i in range(max(prefill, decode))]
        if prefill:
            self.reset()
            said["prefill"] = clock(prefill, lambda: self.feed(tokens[:prefill]))
        if decode:
            self.reset()
            said["decode"] = clock(decode, lambda: [self.feed([t]) for t in tokens[:decode]])
        return said

    def logits(self, tokens):
        import numpy as np

        c = self.c
        self.reset()
        batch = c.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, t in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = t, i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        code = c.llama_decode(self.context, batch)
        if code != 0:
            raise ValueError(f"llama_decode returned {code}")
        row = lambda i: np.ctypeslib.as_array(c.llama_get_logits_ith(self.context, i), (self.vocab,)).copy()
        rows = [row(i) for i in range(len(tokens))]
        c.llama_batch_free(batch)
        return np.stack(rows)


class Transformers:
    def __init__(self, path, threads, depth, state):
        import torch
        import transformers

        if depth:
            raise ValueError("transformers is asked at depth 0 only")
        torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.torch, self.cache = torch, transformers.DynamicCache
        load = transformers.AutoModelForCausalLM.from_pretrained
        self.model = load(path, dtype=torch.bfloat16).eval()
        self.vocab = self.model.config.vocab_size
        isa = os.environ.get("ONEDNN_MAX_CPU_ISA", "as detected")
        self.versions = {"transformers": transformers.__version__, "torch": torch.__version__, "oneDNN": isa}

    def feed(self, tokens, cache):
        with self.torch.inference_mode():
            ids = self.torch.tensor([tokens])
            return self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def turn(self, prefill, decode):
        said = {}
        new = lambda: self.cache(config=self.model.config)
        tokens = [token(i, self.vocab) for i in range(max(prefill, decode))]
        if prefill:
            cache = new()
            said["prefill"] = clock(prefill, lambda: self.feed(tokens[:prefill], cache))
        if decode:
            # One token is a step of decoding only after a prompt.
            cache = new()
            self.feed([token(i, self.vocab) for i in range(4)], cache)
            said["decode"] = clock(decode, lambda: [self.feed([t], cache) for t in tokens[:decode]])
        return said

    def logits(self, tokens):
        with self.torch.inference_mode():
            return self.model(self.torch.tensor([tokens])).logits[0].float().numpy()


def main():
    # What libraries print goes where it does not stand between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(said):
        print(json.dumps(said), file=answers, flush=True)

    try:
        kind, path, threads, depth, state = sys.argv[1:6]
        peer = {"llama.cpp": LlamaCpp, "transformers": Transformers}[kind](path, int(threads), int(depth), state)
    except Exception as error:  # noqa: BLE001: the one who asked is told in one line
        answer({"error": f"{type(error).__name__}: {error}"})
        return
    answer({"versions": peer.versions})
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if asked["ask"] == "turn":
                answer(peer.turn(asked["prefill"], asked["decode"]))
            else:
                import numpy as np

                with open(asked["out"], "wb") as file:
                    np.save(file, peer.logits(asked["tokens"]))
                answer({})
        except Exception as error:  # noqa: BLE001
            answer({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
