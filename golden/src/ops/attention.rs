//! Gated causal attention over a cache:
//!
//! `p_ij = softmax_j(q_i k_j / sqrt(H))` over the keys that token `i` may see,
//! `o_i = (sum_j p_ij v_j) * sigmoid(gate_i)`.
//!
//! Query head `h` uses key/value head `h / (HQ / HKV)`. Keys and values of a sequence are its cache
//! followed by its new tokens, `Tk` in all, of which the last `Tq` are new: query `i` sees keys
//! `0 ..= Tk - Tq + i`. The gate comes from `q_proj`, is neither normed nor rotated, and multiplies
//! before `o_proj`. No sinks, no soft cap, no window, no bias.
//! Source: `Qwen3NextAttention.forward` and `eager_attention_forward` in transformers 5.23.0,
//! `modeling_qwen3_next.py`.

use crate::{
    Cost, DOMAIN, Dtype, Fill, Number, Op, Rng, Set, Spec, Tensor1, Tensor3,
    packed::{cu_seqlens, ragged},
    tensor::unwritten,
};

/// The op.
#[derive(Debug)]
pub struct Attention;

case! {
    /// `B` sequences of `T` new tokens, `TK` with the cached ones.
    pub struct Case {
        /// Sequences.
        "B" b,
        /// New tokens of each.
        "T" t,
        /// Tokens of each sequence, cached and new: at least `T`.
        "TK" tk,
        /// `num_attention_heads`, a multiple of `HKV`.
        "HQ" hq,
        /// `num_key_value_heads`.
        "HKV" hkv,
        /// `head_dim`.
        "H" h,
    }
}

tensors! {
    /// Inputs.
    pub struct Inputs<R> {
        /// `[N, HQ, H]` normed, rotated queries of the new tokens, all sequences one after another.
        pub q: Tensor3<R>,
        /// `[M, HKV, H]` normed, rotated keys: of each sequence, cache then new tokens.
        pub k: Tensor3<R>,
        /// `[M, HKV, H]` values.
        pub v: Tensor3<R>,
        /// `[N, HQ, H]` raw output gate; none leaves the output as it is.
        pub gate: Option<Tensor3<R>>,
        /// `[S + 1]` first query of each sequence, then `N`.
        pub cu_seqlens_q: Tensor1<i64>,
        /// `[S + 1]` first key of each sequence, then `M`.
        pub cu_seqlens_k: Tensor1<i64>,
    }
}

tensors! {
    /// Outputs.
    pub struct Outputs<R> {
        /// `[N, HQ, H]`.
        pub o: Tensor3<R>,
    }
}

const FILLS: &[Fill] = &[
    Fill {
        name: DOMAIN,
        why: "normed queries and keys with weights around one, so that scores spread by a few units",
        cites: &[],
    },
    Fill {
        name: "packed",
        why: "sequences of 0, 1, 2, … tokens and one long one: a mask that lets a neighbour in shows",
        cites: &["https://github.com/huggingface/transformers/issues/44867"],
    },
    Fill {
        name: "sharp",
        why: "one key that takes nearly all the probability, far from the query: a dropped block shows",
        cites: &["https://github.com/vllm-project/vllm/issues/25365"],
    },
    Fill {
        name: "flat",
        why: "equal scores everywhere: the sum over all values, each with the same small weight",
        cites: &["https://github.com/ggml-org/llama.cpp/issues/23606"],
    },
    Fill {
        name: "large-scores",
        why: "scores around 1000: a softmax without its maximum subtracted overflows",
        cites: &["https://github.com/ollama/ollama/issues/15865"],
    },
    Fill {
        name: "open-gate",
        why: "gates of -90 and 90: a sigmoid that overflows is NaN",
        cites: &["https://github.com/ggml-org/llama.cpp/issues/16095"],
    },
];

impl Op for Attention {
    const NAME: &'static str = "attention";
    type Case = Case;
    type Inputs<R: Number> = Inputs<R>;
    type Outputs<R: Number> = Outputs<R>;

    fn fills() -> &'static [Fill] {
        FILLS
    }

    fn specs(set: Set) -> Vec<Spec<Case>> {
        let new = |(b, t, tk, hq, hkv, h)| Spec::new(Case { b, t, tk, hq, hkv, h });
        let mut specs: Vec<_> =
            [(1, 1, 1, 1, 1, 2), (1, 5, 5, 4, 2, 8), (2, 1, 9, 6, 2, 16), (1, 3, 10, 8, 1, 32)]
                .map(new)
                .to_vec();
        specs.extend(FILLS[1..].iter().map(|fill| new((4, 7, 7, 4, 2, 16)).fill(fill.name)));
        if set >= Set::Ci {
            specs.extend([63, 64, 65, 127, 128, 129, 273].map(|t| new((1, t, t, 4, 2, 32))));
            specs.extend([(2, 64, 129, 4, 4, 32), (3, 1, 273, 16, 2, 64)].map(new));
            specs.extend([
                new((2, 1, 9, 6, 2, 16)).dtype(Dtype::Bf16),
                new((1, 7, 10, 4, 2, 20)).dtype(Dtype::Bf16),
                new((1, 65, 130, 16, 2, 64)).dtype(Dtype::Bf16),
                new((4, 33, 70, 4, 2, 32)).fill("packed").dtype(Dtype::Bf16),
                new((1, 65, 130, 4, 2, 32)).dtype(Dtype::F16),
                // Tensor cores want the model's channels.
                new((2, 1, 300, 16, 2, 256)).dtype(Dtype::Bf16),
                new((1, 3, 200, 8, 1, 256)).dtype(Dtype::Bf16),
                new((1, 20, 90, 8, 1, 256)).dtype(Dtype::Bf16),
                new((3, 12, 40, 8, 1, 256)).fill("packed").dtype(Dtype::Bf16),
            ]);
        }
        if set >= Set::Nightly {
            specs.extend([(1, 512, 512, 16, 2, 256), (1, 1, 4096, 16, 2, 256)].map(new));
        }
        specs
    }

    fn refuse(c: &Case) -> Option<String> {
        if !c.hq.is_multiple_of(c.hkv) {
            return Some(format!("HQ {} is no multiple of HKV {}", c.hq, c.hkv));
        }
        (c.tk < c.t).then(|| format!("TK {} is below T {}", c.tk, c.t))
    }

    fn unfelt(spec: &Spec<Case>, input: &str, output: &str) -> Option<&'static str> {
        match (input, output) {
            ("q" | "k", "o") if spec.case.tk == 1 => Some("one key has the weight one"),
            ("k", "o") if spec.is("flat") => Some("queries are zero: so are all scores"),
            _ => None,
        }
    }

    fn inputs(spec: &Spec<Case>, rng: &mut Rng) -> Inputs {
        let Case { b, t, tk, hq, hkv, h } = spec.case;
        let new = if spec.is("packed") { ragged(b, t, rng) } else { vec![t; b] };
        let all: Vec<usize> = new.iter().map(|t_new| t_new + tk - t).collect();
        let scale = match spec.fill.as_str() {
            "flat" => 0.0,
            "large-scores" => 300.0,
            _ => 1.0,
        };
        let mut k = rng.normals((b * tk, hkv, h), 0.0, 1.0);
        if spec.is("sharp") {
            // The first key of each sequence is long, and queries lean towards it.
            (0..b).for_each(|i| k.index_axis_mut(ndarray::Axis(0), i * tk).fill(3.0));
        }
        let lean = if spec.is("sharp") { 1.0 } else { 0.0 };
        let mut gate = rng.normals((b * t, hq, h), 0.0, 1.0);
        if spec.is("open-gate") {
            gate.mapv_inplace(|x| 90.0_f32.copysign(x));
        }
        Inputs {
            q: spec.round(rng.normals((b * t, hq, h), lean, 1.0).map(|&q| q * scale).into_shared()),
            k: spec.round(k),
            v: spec.round(rng.normals((b * tk, hkv, h), 0.0, 1.0)),
            gate: Some(spec.round(gate)),
            cu_seqlens_q: cu_seqlens(&new),
            cu_seqlens_k: cu_seqlens(&all),
        }
    }

    fn unwritten(_: &Spec<Case>, x: &Inputs) -> Outputs {
        Outputs { o: unwritten(x.q.raw_dim()) }
    }

    fn lift<R: Number>(inputs: &Inputs) -> Inputs<R> {
        Inputs::lift(inputs)
    }

    fn cost(spec: &Spec<Case>) -> Cost {
        let Case { b, t, tk, hq, hkv, h } = spec.case;
        let [b, t, tk, hq, hkv, h] = [b, t, tk, hq, hkv, h].map(|size| size as u64);
        let seen = b * (t * (tk - t) + t * (t + 1) / 2);
        let size = spec.dtype.size() as u64;
        Cost {
            bytes: size * (3 * b * t * hq * h + 2 * b * tk * hkv * h),
            flops: seen * hq * (4 * h + 5),
        }
    }
}
