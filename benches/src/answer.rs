//! The reference of every op, sequences number type, by every form. One block per op.

use golden::{Number, Op, ops, plan::Form};
use ndarray::{ArrayD, Ix2, Ix3};
use reference::{self as r, Probe, Real};

use crate::{
    paths,
    sequence::{Parts, Sequence},
};

/// How the reference answers an op.
pub(crate) trait Answer: Op {
    /// Chunk sizes in which the chunked form is checked; empty where there is no such form.
    const CHUNKS: &'static [usize] = &[];

    /// As the contract writes it.
    fn plain<R: Real>(x: &Self::Inputs<R>) -> Self::Outputs<R>;

    /// In another form.
    fn chunked<R: Real>(x: &Self::Inputs<R>, _: usize, _: r::Gates) -> Self::Outputs<R> {
        Self::plain(x)
    }

    /// With the experts given, where the op chooses experts: `ids` of the shape of its own.
    fn forced<R: Real>(_: &Self::Inputs<R>, _: &ArrayD<i64>) -> Option<Self::Outputs<R>> {
        None
    }

    /// A composite op, with experts given or not, each op inside shown to a probe; `None` where there
    /// is none inside.
    fn seen<R: Real>(
        _: &Self::Inputs<R>,
        _: Option<&ArrayD<i64>>,
        _: &mut Probe<'_>,
    ) -> Option<Self::Outputs<R>> {
        None
    }

    /// Experts there are to choose from.
    fn experts(_: &Self::Inputs<f32>) -> usize {
        0
    }

    /// What of it belongs to which token and sequence, where its tokens form sequences.
    const PARTS: Option<Parts> = None;

    /// How it is fed along paths, where its tokens form sequences. A pointer, so that nothing of it is
    /// compiled for ops that have none.
    const PATHS: Option<paths::ops::Run<Self>> = None;

    /// In the form of a plan, with experts given or not.
    fn answer<R: Real>(
        x: &Self::Inputs<R>,
        form: Form,
        experts: Option<&ArrayD<i64>>,
    ) -> Self::Outputs<R> {
        if let Some(forced) = experts.and_then(|ids| Self::forced(x, ids)) {
            return forced;
        }
        match form {
            Form::Plain => Self::plain(x),
            Form::Chunked(chunk) => Self::chunked(x, chunk, r::Gates::Between),
            Form::Prefixed(chunk) => Self::chunked(x, chunk, r::Gates::Prefix),
        }
    }

    /// Inputs in a number type, exactly.
    fn wide<R: Number>(x: &Self::Inputs<f32>) -> Self::Inputs<R> {
        Self::lift(x)
    }
}

/// An op whose tokens form sequences: it is a [`Sequence`] too.
macro_rules! sequences {
    () => {
        const PARTS: Option<Parts> = Some(<Self as Sequence>::PARTS);
        const PATHS: Option<paths::ops::Run<Self>> = Some(paths::ops::run::<Self>);
    };
}

macro_rules! answers {
    ($($op:ident::$name:ident => $f:path $(, $sequences:ident)? $(, seen $seen:path)?;)*) => {$(
        impl Answer for ops::$op::$name {
            $($sequences! {})?

            $(fn seen<R: Real>(
                x: &Self::Inputs<R>,
                _: Option<&ArrayD<i64>>,
                probe: &mut Probe<'_>,
            ) -> Option<Self::Outputs<R>> {
                Some($seen(x, probe))
            })?

            fn plain<R: Real>(x: &Self::Inputs<R>) -> Self::Outputs<R> {
                $f(x)
            }
        }
    )*};
}

answers! {
    embedding::Embedding => r::embedding;
    rms_norm::RmsNorm => r::rms_norm;
    linear::Linear => r::linear;
    causal_conv1d::CausalConv1d => r::causal_conv1d, sequences;
    l2_norm::L2Norm => r::l2_norm;
    gdn_gates::GdnGates => r::gdn_gates;
    rms_norm_gated::RmsNormGated => r::rms_norm_gated;
    rope::Rope => r::rope;
    attention::Attention => r::attention, sequences;
    moe_experts::MoeExperts => r::moe_experts;
    shared_expert::SharedExpert => r::shared_expert;
    lm_head::LmHead => r::lm_head;
    sampling::Sampling => r::sampling;
    mtp::Mtp => r::mtp;
    fp8_dequant::Fp8Dequant => r::fp8_dequant;
    gdn_layer::GdnLayer => r::gdn_layer, sequences, seen r::gdn_layer_seen;
    attention_layer::AttentionLayer => r::attention_layer, sequences, seen r::attention_layer_seen;
}

impl Answer for ops::gated_delta_rule::GatedDeltaRule {
    const CHUNKS: &'static [usize] = &[64, 7];

    sequences! {}

    fn plain<R: Real>(x: &Self::Inputs<R>) -> Self::Outputs<R> {
        r::gated_delta_rule(x)
    }

    fn chunked<R: Real>(x: &Self::Inputs<R>, chunk: usize, gates: r::Gates) -> Self::Outputs<R> {
        r::gated_delta_rule_chunked(x, chunk, gates)
    }
}

impl Answer for ops::moe_router::MoeRouter {
    fn plain<R: Real>(x: &Self::Inputs<R>) -> Self::Outputs<R> {
        r::moe_router(x)
    }

    fn forced<R: Real>(x: &Self::Inputs<R>, ids: &ArrayD<i64>) -> Option<Self::Outputs<R>> {
        Some(r::moe_router_forced(x, &ids.clone().into_dimensionality::<Ix2>().ok()?))
    }

    fn experts(x: &Self::Inputs<f32>) -> usize {
        x.weight.nrows()
    }
}

impl Answer for ops::moe_layer::MoeLayer {
    fn plain<R: Real>(x: &Self::Inputs<R>) -> Self::Outputs<R> {
        r::moe_layer(x)
    }

    fn forced<R: Real>(x: &Self::Inputs<R>, ids: &ArrayD<i64>) -> Option<Self::Outputs<R>> {
        Some(r::moe_layer_forced(x, &ids.clone().into_dimensionality::<Ix2>().ok()?))
    }

    fn seen<R: Real>(
        x: &Self::Inputs<R>,
        ids: Option<&ArrayD<i64>>,
        probe: &mut Probe<'_>,
    ) -> Option<Self::Outputs<R>> {
        let ids = ids.and_then(|ids| ids.clone().into_dimensionality::<Ix2>().ok());
        Some(r::moe_layer_seen(x, ids.as_ref(), probe))
    }

    fn experts(x: &Self::Inputs<f32>) -> usize {
        x.router.nrows()
    }
}

impl Answer for ops::model::Model {
    fn plain<R: Real>(x: &Self::Inputs<R>) -> Self::Outputs<R> {
        r::model_op(x)
    }

    fn forced<R: Real>(x: &Self::Inputs<R>, ids: &ArrayD<i64>) -> Option<Self::Outputs<R>> {
        Some(r::model_op_forced(x, &ids.clone().into_dimensionality::<Ix3>().ok()?))
    }

    fn experts(x: &Self::Inputs<f32>) -> usize {
        x.experts
    }
}
