//! Gated delta rule, the token mixer of the linear-attention layers.
//!
//! Per value head, with a state `S: [K, V]`, `q = l2norm(q) / sqrt(K)`, `k = l2norm(k)`:
//!
//! ```text
//! S <- exp(g_t) S                  forget
//! d  = beta_t (v_t - S' k_t)       what the state does not yet say of this key
//! S <- S + k_t d'                  write it
//! o_t = S' q_t                     answer from the state just written
//! ```
//!
//! All in f32, the state too. Value head `h` uses query and key head `h / (HV / HK)`. The op
//! normalises `q` and `k` itself, as the official call does (`use_qk_l2norm_in_kernel=True`): where
//! eps stands is where kernels go wrong (see [`l2_norm`](super::l2_norm)).
//!
//! The chunked (WY) form gives the same answer with matrix products over chunks of `BT` tokens. With
//! `G_i = sum_{l <= i} g_l` inside the chunk and `D_ij = exp(G_i - G_j)` for `i >= j`, else 0 (mask
//! *before* the exponential: `exp` of a positive difference overflows):
//!
//! ```text
//! A = strict_lower((beta K) K' * D)      Tm = (I + A)^-1
//! U = Tm (beta V)                        W  = Tm (beta exp(G) K)
//! Vn = U - W S                           O  = (exp(G) Q) S + (Q K' * D) Vn
//! S <- exp(G_last) S + (exp(G_last - G) K)' Vn
//! ```
//!
//! Source: `torch_recurrent_gated_delta_rule` and `torch_chunk_gated_delta_rule` in transformers
//! 5.23.0, `modeling_qwen3_next.py`.

use crate::{
    Apart, Cost, DOMAIN, Dtype, Fill, Number, Op, Rng, Set, Spec, Tensor1, Tensor2, Tensor3,
    Tensor4,
    packed::{cu_seqlens, ragged},
    tensor::unwritten,
};

/// The op.
#[derive(Debug)]
pub struct GatedDeltaRule;

case! {
    /// `B` sequences of `T` tokens, `HK` key heads shared by `HV` value heads.
    pub struct Case {
        /// Sequences.
        "B" b,
        /// Tokens of each.
        "T" t,
        /// `linear_num_key_heads`.
        "HK" hk,
        /// `linear_num_value_heads`, a multiple of `HK`.
        "HV" hv,
        /// `linear_key_head_dim`.
        "K" k,
        /// `linear_value_head_dim`.
        "V" v,
    }
}

tensors! {
    /// Inputs.
    pub struct Inputs<R> {
        /// `[N, HK, K]` raw queries, all sequences one after another.
        pub q: Tensor3<R>,
        /// `[N, HK, K]` raw keys.
        pub k: Tensor3<R>,
        /// `[N, HV, V]` values.
        pub v: Tensor3<R>,
        /// `[N, HV]` log decay, at most 0.
        pub g: Tensor2<R>,
        /// `[N, HV]` write strength in (0, 1).
        pub beta: Tensor2<R>,
        /// `[S, HV, K, V]` state before the first token.
        pub state: Tensor4<R>,
        /// `[S + 1]` first row of each sequence, then `N`.
        pub cu_seqlens: Tensor1<i64>,
        /// Added to the sums of squares of queries and keys, 1e-6.
        pub eps: f64,
    }
}

tensors! {
    /// Outputs.
    pub struct Outputs<R> {
        /// `[N, HV, V]`.
        pub o: Tensor3<R>,
        /// `[S, HV, K, V]` state after the last token.
        pub state: Tensor4<R>,
    }
}

const FILLS: &[Fill] = &[
    Fill {
        name: DOMAIN,
        why: "rates from U(0.01, 16) with offsets around 1 and normal projections, as the model's own gates, so that \
              some heads remember hundreds of tokens and others one; a state left by earlier tokens",
        cites: &[],
    },
    Fill {
        name: "fresh",
        why: "no earlier tokens, zero state",
        cites: &["https://github.com/vllm-project/vllm/issues/55766"],
    },
    Fill {
        name: "packed",
        why: "sequences of 0, 1, 2, … tokens and one long one: a state that leaks into the next sequence shows",
        cites: &[
            "https://github.com/huggingface/transformers/issues/46859",
            "https://github.com/THUDM/slime/issues/1686",
        ],
    },
    Fill {
        name: "tiny-norm-k",
        why: "keys and queries of norm about 1e-3, where eps is as large as the sum of squares",
        cites: &[
            "https://github.com/ml-explore/mlx-lm/issues/1624",
            "https://github.com/flashinfer-ai/flashinfer/issues/5255",
        ],
    },
    Fill {
        name: "remember",
        why: "g between -1e-4 and 0: every token stays, and an error of the decay adds up over the sequence",
        cites: &[
            "https://github.com/sgl-project/sglang/issues/10258",
            "https://github.com/ml-explore/mlx-lm/issues/997",
        ],
    },
    Fill {
        name: "forget",
        why: "g of -60: exp(G_i - G_j) above the diagonal overflows unless it is masked first",
        cites: &[
            "https://github.com/ggml-org/llama.cpp/issues/19324",
            "https://github.com/ggml-org/llama.cpp/issues/17578",
        ],
    },
    Fill {
        name: "mixed-gates",
        why: "in each head some tokens forget everything and others nothing: the last gate of a short chunk decides",
        cites: &[
            "https://github.com/gittensor-ai-lab/sparkinfer/issues/604",
            "https://github.com/flashinfer-ai/flashinfer/issues/4311",
        ],
    },
    Fill {
        name: "beta-ends",
        why: "write strengths of 1e-4 and 1 - 1e-4: tokens that write nothing, tokens that overwrite",
        cites: &["https://github.com/sgl-project/sglang/issues/40362"],
    },
    Fill {
        name: "same-key",
        why: "all keys of a head point the same way: the chunked form's triangular system is at its worst",
        cites: &["https://github.com/sgl-project/sglang/issues/33515"],
    },
    Fill {
        name: "outlier",
        why: "one value 1e4 times the others, as the massive activations of trained models",
        cites: &["https://github.com/ollama/ollama/issues/15865"],
    },
];

impl Op for GatedDeltaRule {
    const NAME: &'static str = "gated_delta_rule";
    const WIDE: &'static [&'static str] = &["g", "state"];
    const APART: &'static [Apart] = &[Apart {
        output: "state",
        inputs: &["q"],
        why: "keys and values write, queries only read",
    }];
    type Case = Case;
    type Inputs<R: Number> = Inputs<R>;
    type Outputs<R: Number> = Outputs<R>;

    fn fills() -> &'static [Fill] {
        FILLS
    }

    fn specs(set: Set) -> Vec<Spec<Case>> {
        let new = |(b, t, hk, hv, k, v)| Spec::new(Case { b, t, hk, hv, k, v });
        let mut specs: Vec<_> =
            [(1, 1, 1, 1, 4, 4), (1, 3, 1, 2, 8, 4), (2, 5, 2, 6, 6, 10), (1, 65, 2, 4, 16, 16)]
                .map(new)
                .to_vec();
        specs.extend(FILLS[1..].iter().map(|fill| new((3, 23, 2, 4, 16, 12)).fill(fill.name)));
        if set >= Set::Ci {
            specs.extend([1, 2, 63, 64, 65, 127, 128, 129, 273].map(|t| new((1, t, 2, 6, 24, 16))));
            specs.extend(FILLS[1..].iter().map(|fill| new((2, 130, 2, 4, 16, 24)).fill(fill.name)));
            specs.push(new((1, 130, 1, 2, 128, 128)));
            specs.push(new((1, 129, 2, 4, 32, 32)).dtype(Dtype::F16));
            let stored = |case| new(case).dtype(Dtype::Bf16);
            specs.push(stored((1, 129, 2, 4, 32, 32)));
            // Tensor cores want the model's channels.
            let channels = || stored((1, 70, 1, 1, 128, 128));
            specs.push(channels());
            specs.extend(["forget", "same-key"].map(|fill| channels().fill(fill)));
            // More chunks than any kernel has under way; more heads than a GPU has thirds of its multiprocessors, an odd
            // number to a key head.
            specs.push(stored((1, 260, 1, 1, 128, 128)));
            specs.push(stored((15, 5, 1, 3, 128, 128)).fill("packed"));
            specs.extend(
                FILLS[1..].iter().map(|fill| stored((2, 130, 2, 4, 32, 24)).fill(fill.name)),
            );
        }
        if set >= Set::Nightly {
            specs.extend(
                [(1, 1, 16, 32, 128, 128), (1, 273, 16, 32, 128, 128), (1, 4096, 2, 4, 128, 128)]
                    .map(new),
            );
        }
        specs
    }

    fn refuse(c: &Case) -> Option<String> {
        (!c.hv.is_multiple_of(c.hk)).then(|| format!("HV {} is no multiple of HK {}", c.hv, c.hk))
    }

    fn unfelt(spec: &Spec<Case>, input: &str, output: &str) -> Option<&'static str> {
        match (input, output, spec.fill.as_str()) {
            ("state", "o" | "state", "forget") => Some("a gate of -60 forgets"),
            ("state", "state", "mixed-gates") => {
                Some("some token of every head forgets all that was before it")
            }
            ("state", "state", DOMAIN) if 64 < spec.case.t => {
                Some("the gates of that many tokens leave less of it than the bound")
            }
            _ => None,
        }
    }

    fn inputs(spec: &Spec<Case>, rng: &mut Rng) -> Inputs {
        let Case { b, t, hk, hv, k, v } = spec.case;
        let n = b * t;
        let lengths = if spec.is("packed") { ragged(b, t, rng) } else { vec![t; b] };
        // What SiLU leaves of a normal value is bounded below by -0.28.
        let scale = if spec.is("tiny-norm-k") { 1e-3 / (k as f32).sqrt() } else { 1.0 };
        let mut keys = || {
            let mut x = rng.normals((n, hk, k), 0.1, 0.5);
            x.mapv_inplace(|v| v.max(-0.28) * scale);
            x
        };
        let (q, mut key) = (keys(), keys());
        if spec.is("same-key") {
            let first = key.index_axis(ndarray::Axis(0), 0).to_owned();
            key.outer_iter_mut()
                .for_each(|mut row| row.zip_mut_with(&first, |k, first| *k = *first + 1e-3 * *k));
        }
        let mut value = rng.normals((n, hv, v), 0.0, 0.5);
        if spec.is("outlier") {
            value[[n / 2, hv / 2, v / 2]] = 5e3;
        }
        // g = -rate * softplus(a + offset), with the rates and offsets of the initialisation.
        let rates: Vec<f32> = (0..hv).map(|_| rng.uniform(0.01, 16.0)).collect();
        let g = Tensor2::from_shape_fn((n, hv), |(_, h)| {
            let a = rng.normal(1.0, 1.0);
            match spec.fill.as_str() {
                "remember" => rng.uniform(-1e-4, 0.0),
                "forget" => -60.0,
                "mixed-gates" if rng.below(4) == 0 => -60.0,
                "mixed-gates" | "same-key" => rng.uniform(-1e-2, 0.0),
                _ => -rates[h] * 0.05 * a.exp().ln_1p(),
            }
        });
        let beta = Tensor2::from_shape_simple_fn((n, hv), || match spec.fill.as_str() {
            "beta-ends" => [1e-4, 1.0 - 1e-4][rng.below(2)],
            _ => rng.uniform(0.05, 0.95),
        });
        let std = if spec.is("fresh") { 0.0 } else { 0.3 };
        Inputs {
            q: spec.round(q),
            k: spec.round(key),
            v: spec.round(value),
            g,
            beta: spec.round(beta),
            state: rng.normals((b, hv, k, v), 0.0, std),
            cu_seqlens: cu_seqlens(&lengths),
            eps: 1e-6,
        }
    }

    fn unwritten(_: &Spec<Case>, x: &Inputs) -> Outputs {
        Outputs { o: unwritten(x.v.raw_dim()), state: unwritten(x.state.raw_dim()) }
    }

    fn lift<R: Number>(inputs: &Inputs) -> Inputs<R> {
        Inputs::lift(inputs)
    }

    fn cost(spec: &Spec<Case>) -> Cost {
        let Case { b, t, hk, hv, k, v } = spec.case;
        let [b, t, hk, hv, k, v] = [b, t, hk, hv, k, v].map(|size| size as u64);
        let size = spec.dtype.size() as u64;
        // Activations once, gates and the state in f32; the recurrent form needs the least work.
        let bytes = b * t * (size * (2 * hk * k + 2 * hv * v) + 8 * hv) + 8 * b * hv * k * v;
        Cost { bytes, flops: b * t * hv * (7 * k * v + 3 * v) }
    }
}
