//! What every fast kernel shares as a variant: an instruction set that the processor may lack,
//! activations in f32, weights as the problem stores them.

use std::marker::PhantomData;

use golden::{Op, Plan, Plant, Spec, Tensors, ViewMut};
use ndarray::{ArcArray, Dimension};

use super::{
    linear::activations::Reads,
    portable::{CLAIMS, HONEST, Kernel, Only, Pack, Planted, Portable},
    simd::{Simd, Wide},
};

/// An op that fast kernels compute.
pub(crate) trait Fast: Op {
    /// Outputs that stay in f32 whatever activations are stored in, beside those that the contract names.
    const KEPT: &'static [&'static str] = &[];

    /// What the kernels read, weights in `E`.
    type Packed<E: Wide>: Send;

    /// Makes a problem ready; of products that can be those of bf16 pairs, `reads` says which to take.
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
    fn boxed<const PAIRED: bool>(
        spec: &Spec<O::Case>,
        inputs: &O::Inputs<f32>,
    ) -> Box<dyn Kernel<O>> {
        let reads = if PAIRED { Reads::Bf16 } else { Reads::F32 };
        let unwritten = O::unwritten(spec, inputs);
        Box::new(Loaded::<S, O, E> {
            s: S::new().expect("skipped where the processor lacks it"),
            inputs: inputs.clone(),
            packed: O::pack(spec, inputs, reads),
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

/// The kernels of an op on `S`, where the processor has it and `skip` says nothing against it.
pub(crate) const fn on<S: Simd, O: Fast, const PAIRED: bool>(
    name: &'static str,
    skip: fn(&Spec<O::Case>) -> Option<String>,
    plan: fn(&Spec<O::Case>) -> Plan,
    plants: &'static [Plant],
) -> Only<O>
where
    O::Inputs<f32>: Send,
    O::Outputs<f32>: Send,
{
    let pack = Pack {
        f32: Loaded::<S, O, f32>::boxed::<PAIRED>,
        bf16: Loaded::<S, O, half::bf16>::boxed::<PAIRED>,
        f16: Loaded::<S, O, half::f16>::boxed::<PAIRED>,
    };
    Only {
        skip,
        lacks: || {
            let lacks = || format!("this processor lacks what cpu/{} needs", S::NAME);
            S::new().is_none().then(lacks)
        },
        of: Portable { name, pack, plan, claims: CLAIMS, plants, plant: HONEST },
    }
}

/// Variants of an op: those given, and its fast kernels on every instruction set of this architecture,
/// with their plan and the faults that they can be told to have.
///
/// Behind `paired`, those that multiply bf16 pairs: which problems they do not run, and their plan.
macro_rules! variants {
    ([$($plain:expr),* $(,)?], $plan:expr, $plants:expr $(, paired: $unpaired:expr, $paired:expr)?) => {
        &[
            $($plain,)*
            #[cfg(target_arch = "x86_64")]
            &$crate::cpu::vector::on::<$crate::cpu::avx2::Avx2, _, false>(
                "cpu/avx2", |_| None, $plan, $plants
            ),
            #[cfg(target_arch = "x86_64")]
            &$crate::cpu::vector::on::<$crate::cpu::avx512::Avx512, _, false>(
                "cpu/avx512", |_| None, $plan, $plants
            ),
            $(
                #[cfg(target_arch = "x86_64")]
                &$crate::cpu::vector::on::<$crate::cpu::avx2::Avx2, _, true>(
                    "cpu/avx2-bf16", $unpaired, $paired, $plants
                ),
                #[cfg(target_arch = "x86_64")]
                &$crate::cpu::vector::on::<$crate::cpu::avx512::Avx512, _, true>(
                    "cpu/avx512-bf16", $unpaired, $paired, $plants
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
