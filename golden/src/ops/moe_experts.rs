//! Routed experts:
//!
//! `o = sum_a weights_a * down_e( silu(gate_e x) * (up_e x) )`, `e = ids_a`.
//!
//! The routing weight multiplies the expert's *output*, after `down_proj`. The sum runs in
//! ascending order of the experts, as the official eager code does, which stores it after each of them
//! (the site `expert_sum`); the default grouped code adds in top-k order.
//! Source: `Qwen3NextExperts.forward` in transformers 5.23.0, `modeling_qwen3_next.py` (which holds
//! gate and up as one tensor, gate rows first; checkpoints hold them apart, one expert at a time).

use crate::{
    Cost, DOMAIN, Dtype, Fill, Narrow, Number, Op, Rng, Set, Spec, Tensor2, Tensor3,
    tensor::unwritten,
};

/// The op.
#[derive(Debug)]
pub struct MoeExperts;

case! {
    /// `N` tokens of `D` channels, each through `A` of `E` experts of width `F`.
    pub struct Case {
        /// Tokens.
        "N" n,
        /// `hidden_size`.
        "D" d,
        /// `num_experts`.
        "E" e,
        /// `num_experts_per_tok`.
        "A" a,
        /// `moe_intermediate_size`.
        "F" f,
    }
}

tensors! {
    /// Inputs.
    pub struct Inputs<R> {
        /// `[N, D]` normed hidden states.
        pub x: Tensor2<R>,
        /// `[N, A]` different experts, each in `0 .. E`.
        pub ids: Tensor2<i64>,
        /// `[N, A]` their weights.
        pub weights: Tensor2<R>,
        /// `[E, F, D]`.
        pub gate_proj: Tensor3<f32>,
        /// `[E, F, D]`.
        pub up_proj: Tensor3<f32>,
        /// `[E, D, F]`.
        pub down_proj: Tensor3<f32>,
    }
}

tensors! {
    /// Outputs.
    pub struct Outputs<R> {
        /// `[N, D]`.
        pub o: Tensor2<R>,
    }
}

const FILLS: &[Fill] = &[
    Fill { name: DOMAIN, why: "experts drawn evenly, weights that sum to one", cites: &[] },
    Fill {
        name: "hot-expert",
        why: "every token uses expert 0 first: a group larger than a tile shows its edge",
        cites: &["https://github.com/NVIDIA-NeMo/Automodel/issues/3233"],
    },
    Fill {
        name: "empty-experts",
        why: "only the last experts are used: empty groups before them shift the offsets",
        cites: &["https://github.com/huggingface/transformers/issues/45315"],
    },
    Fill {
        name: "no-renormalise",
        why: "weights that sum to less than one: dividing by their sum here shows",
        cites: &["https://github.com/1bit-MONSTER/1bit-MONSTER/issues/2134"],
    },
    Fill {
        name: "outlier",
        why: "one token 1e3 times the others (30 times in f16): rows that share a scale with it lose theirs, hidden \
              activations in f16 overflow",
        cites: &[
            "https://github.com/sgl-project/sglang/issues/31622",
            "https://github.com/ollama/ollama/issues/15865",
        ],
    },
];

impl Op for MoeExperts {
    const NAME: &'static str = "moe_experts";
    const NARROW: bool = true;
    const WIDE: &'static [&'static str] = &["weights"];
    type Case = Case;
    type Inputs<R: Number> = Inputs<R>;
    type Outputs<R: Number> = Outputs<R>;

    fn fills() -> &'static [Fill] {
        FILLS
    }

    fn specs(set: Set) -> Vec<Spec<Case>> {
        let new = |(n, d, e, a, f)| Spec::new(Case { n, d, e, a, f });
        let mut specs: Vec<_> =
            [(1, 4, 1, 1, 3), (5, 8, 4, 2, 6), (9, 16, 16, 3, 8)].map(new).to_vec();
        specs.extend(FILLS[1..].iter().map(|fill| new((9, 16, 16, 3, 8)).fill(fill.name)));
        if set >= Set::Ci {
            specs.extend([
                new((130, 64, 32, 10, 32)),
                new((130, 32, 8, 2, 24)).fill("hot-expert"),
                new((65, 32, 16, 3, 24)).dtype(Dtype::Bf16),
                new((9, 16, 16, 3, 8)).fill("empty-experts").dtype(Dtype::Bf16),
                new((130, 72, 16, 3, 40)).dtype(Dtype::Bf16),
                new((1, 330, 8, 3, 76)).dtype(Dtype::Bf16),
                new((33, 32, 16, 3, 24)).dtype(Dtype::F16),
                new((9, 16, 16, 3, 8)).fill("outlier").dtype(Dtype::F16),
            ]);
            specs.push(new((33, 144, 4, 2, 144)).weights(Narrow::Fp8));
            // Rows long enough for the other kernel of eight bits.
            specs.push(new((1, 1050, 4, 2, 72)).weights(Narrow::Int8));
            for narrow in Narrow::ALL {
                specs.push(new((1, 64, 16, 4, 48)).weights(narrow));
                specs.push(new((65, 72, 8, 2, 40)).weights(narrow).fill("hot-expert"));
            }
        }
        if set >= Set::Nightly {
            specs.push(new((64, 2048, 64, 10, 512)));
        }
        specs
    }

    fn refuse(c: &Case) -> Option<String> {
        (c.e < c.a).then(|| format!("A {} is above E {}", c.a, c.e))
    }

    fn inputs(spec: &Spec<Case>, rng: &mut Rng) -> Inputs {
        let Case { n, d, e, a, f } = spec.case;
        let mut ids = Tensor2::zeros((n, a));
        let mut all: Vec<i64> = (0..e as i64).collect();
        for mut row in ids.rows_mut() {
            // The first A of a shuffle; for `empty-experts` of the last A experts only.
            let first = if spec.is("empty-experts") { e - a } else { 0 };
            for i in 0..a {
                all.swap(first + i, first + i + rng.below(e - first - i));
                row[i] = all[first + i];
            }
            if spec.is("hot-expert")
                && let Some(at) = row.iter().position(|&id| id == 0).or(Some(0))
            {
                row[at] = row[0];
                row[0] = 0;
            }
            if spec.is("empty-experts") {
                all = (0..e as i64).collect();
            }
        }
        let mut weights = rng.uniforms((n, a), 0.1, 1.0);
        for mut row in weights.rows_mut() {
            let sum = row.sum();
            let kept = if spec.is("no-renormalise") { rng.uniform(0.2, 0.8) } else { 1.0 };
            row.mapv_inplace(|w| w / sum * kept);
        }
        let mut x = rng.normals((n, d), 0.0, 1.0);
        if spec.is("outlier") {
            // What comes out of an expert grows with the square, and f16 ends at 65504.
            let scale = if spec.dtype == Dtype::F16 { 30.0 } else { 1e3 };
            x.row_mut(n / 2).mapv_inplace(|x| x * scale);
        }
        let (by_d, by_f) = ((d as f32).sqrt().recip(), (f as f32).sqrt().recip());
        Inputs {
            x: spec.round(x),
            ids,
            weights,
            gate_proj: spec.weight(rng.normals((e, f, d), 0.0, by_d)),
            up_proj: spec.weight(rng.normals((e, f, d), 0.0, by_d)),
            down_proj: spec.weight(rng.normals((e, d, f), 0.0, by_f)),
        }
    }

    fn unwritten(_: &Spec<Case>, x: &Inputs) -> Outputs {
        Outputs { o: unwritten(x.x.raw_dim()) }
    }

    fn lift<R: Number>(inputs: &Inputs) -> Inputs<R> {
        Inputs::lift(inputs)
    }

    fn cost(spec: &Spec<Case>) -> Cost {
        let Case { n, d, e, a, f } = spec.case;
        let [n, d, e, a, f] = [n, d, e, a, f].map(|size| size as u64);
        // The least: as few experts as the tokens can share.
        let _ = e;
        Cost {
            bytes: spec.dtype.size() as u64 * 2 * n * d
                + a * (2 * spec.weight_bytes(f, d) + spec.weight_bytes(d, f)),
            flops: n * a * (6 * d * f + 4 * f + 2 * d),
        }
    }
}
