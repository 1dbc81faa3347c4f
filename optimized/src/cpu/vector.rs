//! What every fast kernel shares as a variant: an instruction set that the processor may lack,
//! activations in f32, weights as the problem stores them.

use std::marker::PhantomData;

use golden::{Claims, Error, Host, Op, Plan, Plant, Prepared, Spec, Tensors, Variant, ViewMut};
use ndarray::{ArcArray, Dimension};

use super::{
    portable::{HONEST, Kernel, Pack, Planted, Portable},
    simd::{Simd, Wide},
};

/// An op that fast kernels compute.
pub(crate) trait Fast: Op {
    /// What the kernels read, weights in `E`.
    type Packed<E: Wide>: Send;

    /// Makes a problem ready.
    fn pack<E: Wide>(spec: &Spec<Self::Case>, inputs: &Self::Inputs<f32>) -> Self::Packed<E>;

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
    fn boxed(spec: &Spec<O::Case>, inputs: &O::Inputs<f32>) -> Box<dyn Kernel<O>> {
        let unwritten = O::unwritten(spec, inputs);
        Box::new(Loaded::<S, O, E> {
            s: S::new().expect("skipped where the processor lacks it"),
            inputs: inputs.clone(),
            packed: O::pack(spec, inputs),
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

/// A variant on an instruction set.
pub(crate) struct Vector<O: Op> {
    /// Whether the processor has it.
    there: fn() -> bool,
    of: Portable<O>,
}

impl<O: Fast> Vector<O>
where
    O::Inputs<f32>: Send,
    O::Outputs<f32>: Send,
{
    /// The kernels of an op on `S`.
    pub(crate) const fn on<S: Simd>(
        name: &'static str,
        plan: fn(&Spec<O::Case>) -> Plan,
        plants: &'static [Plant],
    ) -> Vector<O> {
        let pack = Pack {
            f32: Loaded::<S, O, f32>::boxed,
            bf16: Loaded::<S, O, half::bf16>::boxed,
            f16: Loaded::<S, O, half::f16>::boxed,
        };
        let claims = super::portable::CLAIMS;
        Vector {
            there: || S::new().is_some(),
            of: Portable { name, pack, plan, claims, plants, plant: HONEST },
        }
    }
}

impl<O: Op> Variant<O> for Vector<O> {
    fn name(&self) -> &str {
        self.of.name()
    }

    fn skip(&self, _: &Host, _: &Spec<O::Case>) -> Option<String> {
        let lacks = || format!("this processor lacks what {} needs", self.of.name);
        (!(self.there)()).then(lacks)
    }

    fn plan(&self, spec: &Spec<O::Case>) -> Plan {
        self.of.plan(spec)
    }

    fn claims(&self) -> Claims {
        self.of.claims()
    }

    fn plants(&self) -> &'static [Plant] {
        self.of.plants()
    }

    fn planted(&self, name: &str) -> Option<Box<dyn Variant<O>>> {
        Some(Box::new(Vector { there: self.there, of: self.of.with(name)? }))
    }

    fn prepare(
        &self,
        spec: &Spec<O::Case>,
        inputs: &O::Inputs<f32>,
    ) -> Result<Box<dyn Prepared<O>>, Error> {
        self.of.prepare(spec, inputs)
    }
}

/// The elements of a tensor, in order.
pub(crate) fn flat<D: Dimension>(x: &ArcArray<f32, D>) -> Vec<f32> {
    x.iter().copied().collect()
}

/// The elements of an output, which is in order.
pub(crate) fn flat_mut<D: Dimension>(x: &mut ArcArray<f32, D>) -> &mut [f32] {
    x.as_slice_mut().expect("an output of its own shape")
}
