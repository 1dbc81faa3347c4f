//! What every fast kernel shares as a variant: an instruction set that the processor may lack,
//! activations in f32, weights as the problem stores them.

use std::marker::PhantomData;

use golden::{Op, Plan, Plant, Spec, Tensors, ViewMut};
use ndarray::{ArcArray, Dimension};

use super::{
    linear::activations::Reads,
    portable::{Kernel, Only, Pack, Planted, Portable},
    simd::{Simd, Wide},
};

/// An op that fast kernels compute.
pub(crate) trait Fast: Op {
    /// Outputs that stay in f32 whatever activations are stored in, beside those that the contract names.
    const KEPT: &'static [&'static str] = &[];

    /// What the kernels read, weights in `E`.
    type Packed<E: Wide>: Send;

    /// Makes a problem ready; of products that can read their factors in several ways, `reads` says
    /// which to take.
    fn pack<E: Wide>(
        spec: &Spec<Self::Case>,
        inputs: &Self::Inputs<f32>,
        reads: Reads,
    ) -> Self::Packed<E>;

    /// Computes every output.
    fn run<S: Simd, E: Wide>(
        s: S,
        packed: &Self::Packed<E>,
        outputs: &mut Self::Outputs<f32>,
        plant: Planted,
    );
}

/// How the products of a variant read their factors, as a type.
pub(crate) trait Reading: 'static {
    const READS: Reads;
}

pub(crate) struct AsStored;
pub(crate) struct InPairs;
pub(crate) struct InEights;

impl Reading for AsStored {
    const READS: Reads = Reads::F32;
}
impl Reading for InPairs {
    const READS: Reads = Reads::Bf16;
}
impl Reading for InEights {
    const READS: Reads = Reads::Int8;
}

/// A problem in memory, on instruction set `S`.
pub(crate) struct Loaded<S, O: Fast, E: Wide> {
    s: S,
    inputs: O::Inputs<f32>,
    packed: O::Packed<E>,
    unwritten: O::Outputs<f32>,
    outputs: O::Outputs<f32>,
    stored: PhantomData<E>,
}

impl<S: Simd, O: Fast, E: Wide> Loaded<S, O, E>
where
    O::Inputs<f32>: Send,
    O::Outputs<f32>: Send,
{
    fn boxed<R: Reading>(spec: &Spec<O::Case>, inputs: &O::Inputs<f32>) -> Box<dyn Kernel<O>> {
        let unwritten = O::unwritten(spec, inputs);
        Box::new(Loaded::<S, O, E> {
            s: S::new().expect("skipped where the processor lacks it"),
            inputs: inputs.clone(),
            packed: O::pack(spec, inputs, R::READS),
            outputs: unwritten.clone(),
            unwritten,
            stored: PhantomData,
        })
    }
}

impl<S: Simd, O: Fast, E: Wide> Kernel<O> for Loaded<S, O, E>
where
    O::Inputs<f32>: Send,
    O::Outputs<f32>: Send,
{
    fn poison(&mut self) {
        self.outputs = self.unwritten.clone();
    }

    fn run(&mut self, plant: Planted) {
        O::run::<S, E>(self.s, &self.packed, &mut self.outputs, plant);
        for (name, view) in self.outputs.tensors_mut() {
            if let ViewMut::F32(mut x) = view
                && !O::WIDE.contains(&name)
                && !O::KEPT.contains(&name)
            {
                x.mapv_inplace(|x| E::store(x).load());
            }
        }
    }

    fn inputs(&self) -> O::Inputs<f32> {
        self.inputs.clone()
    }

    fn outputs(&self) -> O::Outputs<f32> {
        self.outputs.clone()
    }
}

/// The kernels of an op on `S`, where the processor has it and `unfit` says nothing against it.
pub(crate) const fn on<S: Simd, O: Fast, R: Reading>(
    name: &'static str,
    unfit: fn(&Spec<O::Case>) -> Option<String>,
    plan: fn(&Spec<O::Case>) -> Plan,
    plants: &'static [Plant],
) -> Only<O>
where
    O::Inputs<f32>: Send,
    O::Outputs<f32>: Send,
{
    let pack = Pack {
        f32: Loaded::<S, O, f32>::boxed::<R>,
        bf16: Loaded::<S, O, half::bf16>::boxed::<R>,
        f16: Loaded::<S, O, half::f16>::boxed::<R>,
    };
    Only {
        unfit,
        lacks: || {
            let lacks = || format!("this processor lacks what cpu/{} needs", S::NAME);
            S::new().is_none().then(lacks)
        },
        of: Portable::new(name, pack, plan, plants),
    }
}

/// Variants of an op: those given, and its fast kernels on every instruction set of this architecture,
/// with their plan and the faults that they can be told to have.
///
/// Behind `paired`, those that multiply bf16 pairs: which problems they do not run, and their plan. Behind
/// `int8`, those that keep in eight bits what is multiplied, with plan and faults of their own.
macro_rules! variants {
    ([$($plain:expr),* $(,)?], $plan:expr, $plants:expr $(, paired: $unpaired:expr, $paired:expr)?
        $(, int8: $int8:expr, $own:expr)?) => {
        &[
            $($plain,)*
            #[cfg(target_arch = "x86_64")]
            &$crate::cpu::vector::on::<$crate::cpu::avx2::Avx2, _, $crate::cpu::vector::AsStored>(
                "cpu/avx2", |_| None, $plan, $plants
            ),
            #[cfg(target_arch = "x86_64")]
            &$crate::cpu::vector::on::<$crate::cpu::avx512::Avx512, _, $crate::cpu::vector::AsStored>(
                "cpu/avx512", |_| None, $plan, $plants
            ),
            $(
                #[cfg(target_arch = "x86_64")]
                &$crate::cpu::vector::on::<$crate::cpu::avx2::Avx2, _, $crate::cpu::vector::InPairs>(
                    "cpu/avx2-bf16", $unpaired, $paired, $plants
                ),
                #[cfg(target_arch = "x86_64")]
                &$crate::cpu::vector::on::<$crate::cpu::avx512::Avx512, _, $crate::cpu::vector::InPairs>(
                    "cpu/avx512-bf16", $unpaired, $paired, $plants
                ),
            )?
            $(
                #[cfg(target_arch = "x86_64")]
                &$crate::cpu::vector::on::<$crate::cpu::avx2::Avx2, _, $crate::cpu::vector::InEights>(
                    "cpu/avx2-int8", |_| None, $int8, $own
                ),
                #[cfg(target_arch = "x86_64")]
                &$crate::cpu::vector::on::<$crate::cpu::avx512::Avx512, _, $crate::cpu::vector::InEights>(
                    "cpu/avx512-int8", |_| None, $int8, $own
                ),
            )?
        ]
    };
}
pub(crate) use variants;

/// The elements of a tensor, in order.
pub(crate) fn flat<D: Dimension>(x: &ArcArray<f32, D>) -> Vec<f32> {
    x.iter().copied().collect()
}

/// The elements of an output, which is in order.
pub(crate) fn flat_mut<D: Dimension>(x: &mut ArcArray<f32, D>) -> &mut [f32] {
    x.as_slice_mut().expect("an output of its own shape")
}
