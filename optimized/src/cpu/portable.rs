//! What every portable variant shares: it is packed into its storage type, run, and unpacked.

use golden::{
    Case, Claims, Dtype, Error, Host, Op, Plan, Plant, Prepared, Spec, Variant,
    tap::{Part, Tap, Value},
};
use ndarray::{ArcArray, ArrayD, Dimension};

use super::stored::Stored;

/// A problem packed into memory as a kernel wants it, and its kernel.
pub(crate) trait Kernel<O: Op>: Send {
    /// Outputs and scratch to NaN, integers to their least value.
    fn poison(&mut self);
    /// Computes every output.
    fn run(&mut self, plant: Planted);
    /// The inputs, unpacked.
    fn inputs(&self) -> O::Inputs<f32>;
    /// The outputs, unpacked.
    fn outputs(&self) -> O::Outputs<f32>;
    /// What a composite op held in between.
    fn inside(&self) -> Vec<Tap> {
        Vec::new()
    }
}

/// A problem packed into a storage type.
pub(crate) type Packer<O> =
    fn(&Spec<<O as Op>::Case>, &<O as Op>::Inputs<f32>) -> Box<dyn Kernel<O>>;

/// Packs a problem, one function per storage type.
pub(crate) struct Pack<O: Op> {
    pub(crate) f32: Packer<O>,
    pub(crate) bf16: Packer<O>,
    pub(crate) f16: Packer<O>,
}

/// `Pack` of a generic struct `$loaded<E>` that has `new(spec, inputs)`.
macro_rules! pack {
    ($loaded:ident) => {
        $crate::cpu::portable::Pack {
            f32: |spec, x| Box::new($loaded::<f32>::new(spec, x)),
            bf16: |spec, x| Box::new($loaded::<half::bf16>::new(spec, x)),
            f16: |spec, x| Box::new($loaded::<half::f16>::new(spec, x)),
        }
    };
}
pub(crate) use pack;

/// A variant of plain safe Rust.
pub(crate) struct Portable<O: Op> {
    name: &'static str,
    pack: Pack<O>,
    /// How it rounds; what it stores outputs in is filled in from the problem.
    plan: fn(&Spec<O::Case>) -> Plan,
    plants: &'static [Plant],
    plant: Planted,
}

/// The plan of what stores its outputs as the problem does, and all between them in f32.
pub(crate) fn as_stored<C: Case>(spec: &Spec<C>) -> Plan {
    Plan::stored(spec.dtype)
}

/// The fault that is in force, if any.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Planted(pub(crate) Option<&'static str>);

impl Planted {
    /// Whether it is this one. Asked outside of loops.
    pub(crate) fn is(self, name: &str) -> bool {
        self.0 == Some(name)
    }
}

/// Nothing is planted.
pub(crate) const HONEST: Planted = Planted(None);

/// What the portable kernels promise: every element is summed by one thread in one order, whatever
/// else is in the batch.
const CLAIMS: Claims = Claims { deterministic: true, batch_invariant: true, cuts: None };

impl<O: Op> Portable<O> {
    /// One in which nothing is planted yet.
    pub(crate) const fn new(
        name: &'static str,
        pack: Pack<O>,
        plan: fn(&Spec<O::Case>) -> Plan,
        plants: &'static [Plant],
    ) -> Self {
        Portable { name, pack, plan, plants, plant: HONEST }
    }

    /// The same variant with the fault of that name.
    pub(crate) fn with(&self, name: &str) -> Option<Portable<O>> {
        let plant = self.plants.iter().find(|plant| plant.name == name)?;
        let Pack { f32, bf16, f16 } = self.pack;
        Some(Portable { pack: Pack { f32, bf16, f16 }, plant: Planted(Some(plant.name)), ..*self })
    }
}

impl<O: Op> Variant<O> for Portable<O> {
    fn name(&self) -> &str {
        self.name
    }

    fn skip(&self, _: &Host, _: &Spec<O::Case>) -> Option<String> {
        None
    }

    fn plan(&self, spec: &Spec<O::Case>) -> Plan {
        (self.plan)(spec)
    }

    fn claims(&self) -> Claims {
        CLAIMS
    }

    fn plants(&self) -> &'static [Plant] {
        self.plants
    }

    fn planted(&self, name: &str) -> Option<Box<dyn Variant<O>>> {
        Some(Box::new(self.with(name)?))
    }

    fn prepare(
        &self,
        spec: &Spec<O::Case>,
        inputs: &O::Inputs<f32>,
    ) -> Result<Box<dyn Prepared<O>>, Error> {
        let pack = match spec.dtype {
            Dtype::Bf16 => self.pack.bf16,
            Dtype::F16 => self.pack.f16,
            _ => self.pack.f32,
        };
        Ok(Box::new(Loaded { kernel: pack(spec, inputs), plant: self.plant }))
    }
}

/// A variant that does not run everywhere, or not every problem.
pub(crate) struct Only<O: Op> {
    /// What the processor lacks for it, if anything.
    pub(crate) lacks: fn() -> Option<String>,
    /// Why it does not compute a problem, if so.
    pub(crate) unfit: fn(&Spec<O::Case>) -> Option<String>,
    pub(crate) of: Portable<O>,
}

impl<O: Op> Variant<O> for Only<O> {
    fn name(&self) -> &str {
        self.of.name()
    }

    fn unfit(&self, spec: &Spec<O::Case>) -> Option<String> {
        (self.unfit)(spec)
    }

    fn skip(&self, _: &Host, _: &Spec<O::Case>) -> Option<String> {
        (self.lacks)()
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
        Some(Box::new(Only { of: self.of.with(name)?, ..*self }))
    }

    fn prepare(
        &self,
        spec: &Spec<O::Case>,
        inputs: &O::Inputs<f32>,
    ) -> Result<Box<dyn Prepared<O>>, Error> {
        self.of.prepare(spec, inputs)
    }
}

struct Loaded<O: Op> {
    kernel: Box<dyn Kernel<O>>,
    plant: Planted,
}

impl<O: Op> Prepared<O> for Loaded<O> {
    fn poison(&mut self) -> Result<(), Error> {
        self.kernel.poison();
        Ok(())
    }

    fn inputs(&mut self) -> Result<O::Inputs<f32>, Error> {
        Ok(self.kernel.inputs())
    }

    fn execute(&mut self) -> Result<(), Error> {
        self.kernel.run(self.plant);
        Ok(())
    }

    fn outputs(&mut self) -> Result<O::Outputs<f32>, Error> {
        Ok(self.kernel.outputs())
    }

    fn inside(&mut self) -> Result<Vec<Tap>, Error> {
        Ok(self.kernel.inside())
    }
}

/// A tensor that an op inside computed.
pub(crate) fn held<E: Stored>(
    op: &'static str,
    tensor: &'static str,
    x: &[E],
    shape: &[usize],
) -> Tap {
    let values = x.iter().map(|x| f64::from(x.load())).collect();
    let x = ArrayD::from_shape_vec(shape, values).expect("as many elements as the shape says");
    let value = Value::Numbers(x);
    Tap { part: Part::Alone, op: op.into(), tensor: tensor.into(), value }
}

/// A tensor in row-major order, in its storage type.
pub(crate) fn packed<E: Stored, D: Dimension>(x: &ArcArray<f32, D>) -> Vec<E> {
    x.iter().map(|&x| E::store(x)).collect()
}

/// The same, widened again.
pub(crate) fn unpacked<E: Stored, D: Dimension>(x: &[E], shape: D) -> ArcArray<f32, D> {
    let values = x.iter().map(|x| x.load()).collect();
    ArcArray::from_shape_vec(shape, values).expect("as many elements as the shape says")
}
