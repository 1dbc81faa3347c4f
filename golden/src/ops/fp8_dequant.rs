//! FP8 weights of the official FP8 checkpoints:
//!
//! `weight[m, d] = value(codes[m, d]) * scales[m / block_rows, d / block_cols]`.
//!
//! Codes are `float8_e4m3fn`, scales f32. The file calls the scale `weight_scale_inv`, yet it
//! *multiplies*. Blocks at the right and lower edge may be ragged. `lm_head`, embeddings, norms,
//! routers, `in_proj_ba`, the convolution and `mtp.fc` are never quantised.
//! Source: `quantization_config` of the official FP8 checkpoint (`fmt: e4m3`,
//! `weight_block_size: [128, 128]`).

use crate::{Cost, DOMAIN, Dtype, Fill, Number, Op, Rng, Set, Spec, Tensor2, tensor::unwritten};

/// The op.
#[derive(Debug)]
pub struct Fp8Dequant;

case! {
    /// An `M` by `D` matrix in square blocks of `BS`.
    pub struct Case {
        /// Rows.
        "M" m,
        /// Columns.
        "D" d,
        /// Rows and columns of a block.
        "BS" bs,
    }
}

tensors! {
    /// Inputs.
    pub struct Inputs {
        /// `[M, D]` FP8 codes.
        pub codes: Tensor2<u8>,
        /// `[ceil(M / block_rows), ceil(D / block_cols)]` factors.
        pub scales: Tensor2<f32>,
        /// Rows of a block.
        pub block_rows: usize,
        /// Columns of a block.
        pub block_cols: usize,
    }
}

tensors! {
    /// Outputs.
    pub struct Outputs<R> {
        /// `[M, D]` weights.
        pub weight: Tensor2<R>,
    }
}

const FILLS: &[Fill] = &[
    Fill { name: DOMAIN, why: "every finite code, scales of amax / 448", cites: &[] },
    Fill {
        name: "subnormal-codes",
        why: "codes below 2^-6 only: a decoder without subnormals returns powers of two",
        cites: &["https://github.com/vllm-project/vllm/issues/25079"],
    },
];

impl Op for Fp8Dequant {
    const NAME: &'static str = "fp8_dequant";
    const WIDE: &'static [&'static str] = &["scales"];
    type Case = Case;
    type Inputs<R: Number> = Inputs;
    type Outputs<R: Number> = Outputs<R>;

    fn fills() -> &'static [Fill] {
        FILLS
    }

    fn specs(set: Set) -> Vec<Spec<Case>> {
        let new = |(m, d, bs)| Spec::new(Case { m, d, bs });
        let mut specs = vec![
            new((1, 1, 1)),
            new((5, 7, 3)),
            new((16, 16, 8)),
            new((9, 8, 4)).fill("subnormal-codes"),
        ];
        if set >= Set::Ci {
            specs.extend([(192, 300, 128), (256, 128, 128), (1, 129, 128)].map(new));
            let stored = [Dtype::Bf16, Dtype::F16];
            specs.extend(stored.map(|dtype| new((130, 200, 64)).dtype(dtype)));
        }
        if set >= Set::Nightly {
            specs.push(new((12288, 2048, 128)));
        }
        specs
    }

    fn inputs(spec: &Spec<Case>, rng: &mut Rng) -> Inputs {
        let Case { m, d, bs } = spec.case;
        let codes = if spec.is("subnormal-codes") { 8 } else { 0x7f };
        let mut code = || (rng.below(2) << 7 | rng.below(codes)) as u8;
        let codes = Tensor2::from_shape_simple_fn((m, d), &mut code);
        let scales = Tensor2::from_shape_simple_fn((m.div_ceil(bs), d.div_ceil(bs)), || {
            rng.uniform(0.02, 0.2) / 448.0
        });
        Inputs { codes, scales, block_rows: bs, block_cols: bs }
    }

    fn unwritten(_: &Spec<Case>, x: &Inputs) -> Outputs {
        Outputs { weight: unwritten(x.codes.raw_dim()) }
    }

    fn lift<R: Number>(inputs: &Inputs) -> Inputs {
        Inputs::lift(inputs)
    }

    fn cost(spec: &Spec<Case>) -> Cost {
        let elements = (spec.case.m * spec.case.d) as u64;
        Cost { bytes: 5 * elements, flops: elements }
    }
}
