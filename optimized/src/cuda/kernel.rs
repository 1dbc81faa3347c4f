//! What every CUDA variant shares: parameters of its kernels are bound by name, tensors go to the device
//! with guard bands, and stay there.

use std::marker::PhantomData;

use golden::{
    Calls, Claims, Clocked, Dtype, Error, Host, Narrow, Op, Plan, Plant, Prepared, Spec, Tensors,
    Variant, View,
    plan::Grid,
    recording::Recorded,
    tensor::{Read, Source as Named},
};
use kernels::{Build, Entry, Kind, Parameter, Source};
use ndarray::{ArrayD, ArrayView1};

use super::{
    device::{self, Function, Shape, Value},
    entry::{ACTIVATION_BYTES, Launch, MULTIPROCESSORS, Scratch, Sizes, WEIGHT_BYTES},
    events,
    gpu::{Context, gpu, lost, with},
    launch::entry,
    narrow::Codes,
    place::Place,
};
use crate::doors::block::{Block, Layout};

/// A variant of kernels of one source.
pub(super) struct Cuda<O: Op> {
    pub(super) name: &'static str,
    pub(super) source: Source,
    /// What is launched, in order.
    pub(super) launches: &'static [Launch],
    /// What kernels keep for one another.
    pub(super) scratch: &'static [Scratch],
    /// Why it does not compute a problem, if so.
    pub(super) unfit: fn(&Spec<O::Case>) -> Option<&'static str>,
    /// How it rounds.
    pub(super) plan: fn(&Spec<O::Case>) -> Plan,
    pub(super) claims: Claims,
    pub(super) plants: &'static [Plant],
}

/// Every problem.
pub(super) fn any<C>(_: &Spec<C>) -> Option<&'static str> {
    None
}

/// What the naive kernels promise: every element is computed by one block in one order, whatever else is
/// in the batch.
pub(super) const CLAIMS: Claims = Claims { deterministic: true, batch_invariant: true, cuts: None };

/// The same of those that walk a sequence from its first token on, and keep all that they carry.
pub(super) const CUT_ANYWHERE: Claims = Claims { cuts: Some(1), ..CLAIMS };

/// Of a table of faults those of these names.
pub(super) const fn chosen<const N: usize>(all: &[Plant], names: [&str; N]) -> [Plant; N] {
    let mut found = [all[0]; N];
    let mut n = 0;
    while n < N {
        let mut at = 0;
        while !same(all[at].name, names[n]) {
            at += 1;
        }
        found[n] = all[at];
        n += 1;
    }
    found
}

const fn same(a: &str, b: &str) -> bool {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    let mut i = 0;
    while i < a.len() && i < b.len() && a[i] == b[i] {
        i += 1;
    }
    i == a.len() && i == b.len()
}

impl<O: Op> Variant<O> for Cuda<O> {
    fn name(&self) -> &str {
        self.name
    }

    fn unfit(&self, spec: &Spec<O::Case>) -> Option<String> {
        (self.unfit)(spec).map(str::to_owned)
    }

    fn skip(&self, _: &Host, spec: &Spec<O::Case>) -> Option<String> {
        let gpu = match gpu() {
            Ok(gpu) => gpu,
            Err(why) => return Some(why.clone()),
        };
        if let Some(why) = lost() {
            return Some(why);
        }
        let targets = self.source.targets;
        if targets != kernels::PORTABLE && !targets.contains(&gpu.target.as_str()) {
            return Some(format!("is for {}; {} is {}", targets.join(", "), gpu.name, gpu.target));
        }
        let needs = O::cost(spec).bytes + ROOM;
        let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
        (gpu.memory < needs).then(|| {
            let (needs, has) = (gib(needs), gib(gpu.memory));
            format!("needs {needs:.1} GiB, {} has {has:.1} GiB", gpu.name)
        })
    }

    fn plan(&self, spec: &Spec<O::Case>) -> Plan {
        (self.plan)(spec)
    }

    fn claims(&self) -> Claims {
        self.claims
    }

    fn plants(&self) -> &'static [Plant] {
        self.plants
    }

    fn planted(&self, name: &str) -> Option<Box<dyn Variant<O>>> {
        let plant = self.plants.iter().find(|plant| plant.name == name)?;
        let number = self.source.plant(plant.name)?;
        Some(Box::new(Planted { of: Cuda { ..*self }, number }))
    }

    fn prepare(
        &self,
        spec: &Spec<O::Case>,
        inputs: &O::Inputs<f32>,
    ) -> Result<Box<dyn Prepared<O>>, Error> {
        Ok(Box::new(Loaded::new(self, spec, inputs, 0)?))
    }
}

/// What the driver and guard bands take beside the tensors.
const ROOM: u64 = 1 << 30;

/// A variant with a fault in force.
struct Planted<O: Op> {
    of: Cuda<O>,
    number: i32,
}

impl<O: Op> Variant<O> for Planted<O> {
    fn name(&self) -> &str {
        self.of.name
    }

    fn unfit(&self, spec: &Spec<O::Case>) -> Option<String> {
        self.of.unfit(spec)
    }

    fn skip(&self, host: &Host, spec: &Spec<O::Case>) -> Option<String> {
        self.of.skip(host, spec)
    }

    fn plan(&self, spec: &Spec<O::Case>) -> Plan {
        self.of.plan(spec)
    }

    fn claims(&self) -> Claims {
        self.of.claims
    }

    fn prepare(
        &self,
        spec: &Spec<O::Case>,
        inputs: &O::Inputs<f32>,
    ) -> Result<Box<dyn Prepared<O>>, Error> {
        Ok(Box::new(Loaded::new(&self.of, spec, inputs, self.number)?))
    }
}

/// A problem on the device.
struct Loaded<O: Op> {
    /// Which, for whom a fault is told of.
    id: String,
    source: Source,
    build: Build,
    launches: Vec<&'static Launch>,
    scratch: &'static [Scratch],
    entries: Vec<Entry>,
    shapes: Shapes,
    scalars: Vec<(&'static str, f64)>,
    plant: i32,
    inputs: Vec<Block>,
    outputs: Vec<Block>,
    between: Vec<Block>,
    there: There,
    op: PhantomData<fn() -> O>,
}

/// Inputs and outputs as the op has them: the storage of narrowed weights has another shape.
struct Shapes {
    inputs: Vec<(&'static str, Vec<usize>)>,
    outputs: Vec<(&'static str, Vec<usize>)>,
    narrow: Option<Narrow>,
    sizes: Sizes,
}

/// What is on the device.
#[derive(Default)]
struct There {
    /// Of inputs, then of outputs, then of scratch memory.
    places: Vec<Place>,
    launches: Vec<(Function, Shape, Vec<Value>)>,
}

impl There {
    /// Puts every kernel into the stream. A grid without blocks is no launch.
    fn launch(&self) -> Result<(), device::Error> {
        let is_some = |(_, shape, _): &&(Function, Shape, Vec<Value>)| !shape.grid.contains(&0);
        let mut all = self.launches.iter().filter(is_some);
        all.try_for_each(|(function, shape, values)| function.launch(*shape, values))
    }
}

impl<O: Op> Loaded<O> {
    fn new(
        kernel: &Cuda<O>,
        spec: &Spec<O::Case>,
        inputs: &O::Inputs<f32>,
        plant: i32,
    ) -> Result<Loaded<O>, Error> {
        let stored = match spec.dtype {
            Dtype::Bf16 => "bf16",
            Dtype::F16 => "f16",
            _ => "f32",
        };
        let weights = match spec.weights {
            None => stored,
            Some(Narrow::Fp8) => "Fp8",
            Some(Narrow::Int8) => "Int8",
            Some(Narrow::Int4) => "Int4",
        };
        let source = kernel.source;
        let build =
            Build { activations: stored, weights: Some(weights).filter(|_| source.narrow()) };
        let launches: Vec<&Launch> =
            kernel.launches.iter().filter(|launch| (launch.of)(&build)).collect();
        let entries = launches.iter().map(|launch| entry(&source, launch.entry));
        let entries = entries.collect::<Result<Vec<_>, _>>()?;

        let plan = kernel.plan(spec);
        let unwritten = O::unwritten(spec, inputs);
        let shape = |(name, view): &(&'static str, View<'_>)| (*name, view.shape().to_vec());
        let mut sizes = Sizes::default();
        // Without a GPU nothing runs: an H200's, so that all else can be looked at.
        let multiprocessors = gpu().as_ref().map_or(132, |gpu| gpu.multiprocessors);
        sizes.0.insert(MULTIPROCESSORS.to_owned(), i64::from(multiprocessors));
        let bytes = |stored: &str| match stored {
            "f32" => 4,
            "bf16" | "f16" => 2,
            _ => 1,
        };
        sizes.0.insert(WEIGHT_BYTES.to_owned(), build.weights.map_or(0, bytes));
        sizes.0.insert(ACTIVATION_BYTES.to_owned(), bytes(build.activations));
        let mut shapes = Shapes {
            inputs: inputs.tensors().iter().map(shape).collect(),
            outputs: unwritten.tensors().iter().map(shape).collect(),
            narrow: spec.weights,
            sizes,
        };
        for entry in &entries {
            shapes.read(entry)?;
        }

        let mut blocks = Vec::new();
        for (name, view) in inputs.tensors() {
            let dtype = if O::WIDE.contains(&name) { Dtype::F32 } else { spec.dtype };
            blocks.extend(shapes.blocks(name, &view, dtype, &entries));
        }
        let output = |(name, view): &(&'static str, View<'_>)| {
            let dtype = match (view, O::grid(name, &plan)) {
                (View::I64(_), _) => Dtype::I64,
                (_, Grid::F16) => Dtype::F16,
                (_, Grid::Bf16) => Dtype::Bf16,
                (_, Grid::F32 | Grid::Tf32 | Grid::Fp8) => Dtype::F32,
            };
            Block::new(Layout { name, dtype, shape: view.shape().to_vec() })
        };
        let between = |scratch: &Scratch| {
            let bytes = (scratch.bytes)(&shapes.sizes) as usize;
            Block::new(Layout { name: scratch.name, dtype: Dtype::U8, shape: vec![bytes] })
        };
        let between = kernel.scratch.iter().map(between).collect();
        let mut loaded = Loaded {
            id: format!("{}/{spec}@{}", O::NAME, kernel.name),
            source,
            build,
            launches,
            scratch: kernel.scratch,
            entries,
            shapes,
            scalars: inputs.scalars(),
            plant,
            inputs: blocks,
            outputs: unwritten.tensors().iter().map(output).collect(),
            between,
            there: There::default(),
            op: PhantomData,
        };
        // What is wrong with a signature is wrong on every machine.
        for (launch, entry) in loaded.launches.iter().zip(&loaded.entries) {
            loaded.values(launch, entry, &|_| Value::Address(0))?;
        }
        loaded.there = with(&loaded.id, |context| loaded.bring(context))?;
        Ok(loaded)
    }

    /// What is passed to a kernel.
    fn values(
        &self,
        launch: &Launch,
        entry: &Entry,
        address: &dyn Fn(usize) -> Value,
    ) -> Result<Vec<Value>, String> {
        let value = |parameter| self.value(launch, parameter, address);
        let values = entry.parameters.iter().map(value);
        values.collect::<Result<_, _>>().map_err(|why| format!("{}: {why}", entry.name))
    }

    /// Compiles, makes room, and copies.
    fn bring(&self, context: &mut Context) -> Result<There, device::Error> {
        let module = context.module(&self.source, self.build)?;
        let device = &context.device;
        let mut places = Vec::new();
        for block in self.inputs.iter().chain(&self.outputs).chain(&self.between) {
            let mut place = Place::new(device, block)?;
            place.put(device, block)?;
            places.push(place);
        }
        let address = |at: usize| Value::Address(places[at].address(device));
        let mut launches = Vec::new();
        for (launch, entry) in self.launches.iter().zip(&self.entries) {
            let values = self.values(launch, entry, &address).map_err(device::Error::Compile)?;
            let function = module.function(&entry.name)?;
            let sizes: Vec<usize> = values.iter().map(|value| value.size()).collect();
            if let Some(taken) =
                function.first_parameters(sizes.len()).filter(|taken| *taken != sizes)
            {
                let why = format!("{}: takes {taken:?} bytes, got {sizes:?}", entry.name);
                return Err(device::Error::Compile(why));
            }
            let Launch { grid, threads, shared, early, .. } = launch;
            let n = &self.shapes.sizes;
            let shape = Shape::of(grid(n).map(|n| n as u32), threads(n) as u32, shared(n) as u32);
            let shape = Shape { early: *early, ..shape };
            launches.push((function, shape, values));
        }
        Ok(There { places, launches })
    }

    /// What is passed for a parameter; nothing (an address of 0) for a tensor that this problem does
    /// without.
    fn value(
        &self,
        launch: &Launch,
        parameter: &Parameter,
        address: &dyn Fn(usize) -> Value,
    ) -> Result<Value, String> {
        let Parameter { name, kind, .. } = parameter;
        let scalar = || self.scalars.iter().find(|(known, _)| known == name).map(|&(_, x)| x);
        let find = |blocks: &[Block], element: &str, known: &[&str], before: usize| {
            let at = blocks.iter().position(|block| block.layout.name == *name);
            if let Some(at) = at {
                let (want, got) = (self.dtype(element), blocks[at].layout.dtype);
                let fits = want == Some(got);
                return if fits {
                    Ok(address(before + at))
                } else {
                    Err(format!("{name} is {element}, stored in {got}"))
                };
            }
            let known = known.contains(&name.trim_end_matches("_scales"));
            if known { Ok(Value::Address(0)) } else { Err(format!("no tensor {name}")) }
        };
        let between = |name: &str| self.scratch.iter().position(|scratch| scratch.name == name);
        match kind {
            Kind::Input(_) | Kind::Output(_) if let Some(at) = between(name) => {
                Ok(address(self.inputs.len() + self.outputs.len() + at))
            }
            // What an earlier launch answered.
            Kind::Input(element)
                if self.outputs.iter().any(|o| o.layout.name == *name)
                    && !self.inputs.iter().any(|x| x.layout.name == *name) =>
            {
                find(&self.outputs, element, &[], self.inputs.len())
            }
            Kind::Input(element) => {
                find(&self.inputs, element, <O::Inputs<f32> as Tensors>::names(), 0)
            }
            Kind::Output(element) => {
                let known = <O::Outputs<f32> as Tensors>::names();
                find(&self.outputs, element, known, self.inputs.len())
            }
            Kind::Int if name == "plant" => Ok(Value::I32(self.plant)),
            Kind::Int => {
                let own = launch.numbers.iter().find(|(known, _)| known == name);
                let own = own.map(|(_, number)| number(&self.shapes.sizes));
                let size = self.shapes.sizes.0.get(name).copied();
                let value = own.or(size).or_else(|| scalar().map(|x| x as i64));
                let value = value.ok_or_else(|| format!("no size or scalar {name}"))?;
                let fits = i32::try_from(value).map(Value::I32);
                fits.map_err(|_| format!("{name} is {value}, too large for int"))
            }
            Kind::Float => {
                let value = scalar().ok_or_else(|| format!("no scalar {name}"))?;
                Ok(Value::F32(value as f32))
            }
        }
    }

    /// What elements of a type are stored in.
    fn dtype(&self, element: &str) -> Option<Dtype> {
        let of = |stored: &str| match stored {
            "f32" | "float" => Some(Dtype::F32),
            "bf16" => Some(Dtype::Bf16),
            "f16" => Some(Dtype::F16),
            "long long" => Some(Dtype::I64),
            "unsigned char" | "Fp8" | "Int8" | "Int4" => Some(Dtype::U8),
            _ => None,
        };
        match element {
            "E" => of(self.build.activations),
            "W" => of(self.build.weights?),
            element => of(element),
        }
    }

    fn named<'a>(&'a self, blocks: &'a [Block]) -> Held<'a> {
        Held { blocks, scalars: &self.scalars, shapes: &self.shapes }
    }
}

impl Shapes {
    /// Takes the sizes that the shapes behind the parameters of a kernel tell.
    fn read(&mut self, entry: &Entry) -> Result<(), String> {
        for Parameter { name, kind, shape } in &entry.parameters {
            let among = match kind {
                Kind::Input(_) => &self.inputs,
                Kind::Output(_) => &self.outputs,
                Kind::Int | Kind::Float => continue,
            };
            let Some((_, got)) = among.iter().find(|(known, _)| known == name) else { continue };
            if shape.len() != got.len() {
                return Err(format!("{}: {name} has shape {got:?}", entry.name));
            }
            for (letter, value) in shape.iter().zip(got).filter_map(|(size, &n)| size.letter(n)) {
                let before = *self.sizes.0.entry(letter.to_owned()).or_insert(value);
                if before != value {
                    let (entry, name) = (&entry.name, &name);
                    return Err(format!("{entry}: {letter} is {before}, and {value} by {name}"));
                }
            }
        }
        Ok(())
    }

    /// An input in memory: itself, or codes and scales of narrowed weights.
    fn blocks(
        &self,
        name: &'static str,
        view: &View<'_>,
        dtype: Dtype,
        entries: &[Entry],
    ) -> Vec<Block> {
        let stored = |name, dtype, view: &View<'_>| {
            let mut block = Block::new(Layout { name, dtype, shape: view.shape().to_vec() });
            block.store(view);
            block
        };
        let is_weight = |parameter: &Parameter| {
            parameter.name == name && parameter.kind == Kind::Input("W".to_owned())
        };
        let mut parameters = entries.iter().flat_map(|entry| &entry.parameters);
        if let (Some(narrow), View::F32(x)) = (self.narrow, view)
            && parameters.any(is_weight)
        {
            let (rows, d) = matrix(view.shape());
            let weights: Vec<f32> = x.iter().copied().collect();
            let Codes { codes, scales } = Codes::new(&weights, rows, d, narrow);
            let codes = View::U8(ArrayView1::from(&codes).into_dyn());
            let scales = View::F32(ArrayView1::from(&scales).into_dyn());
            // As the checkpoint has them, or in bf16, which they are.
            let wide = |parameter: &Parameter| {
                parameter.name == scales_of(name)
                    && parameter.kind == Kind::Input("float".to_owned())
            };
            let mut parameters = entries.iter().flat_map(|entry| &entry.parameters);
            let dtype = if parameters.any(wide) { Dtype::F32 } else { Dtype::Bf16 };
            return vec![stored(name, Dtype::U8, &codes), stored(scales_of(name), dtype, &scales)];
        }
        let dtype = match view {
            View::I64(_) => Dtype::I64,
            View::U8(_) => Dtype::U8,
            _ => dtype,
        };
        vec![stored(name, dtype, view)]
    }
}

/// Rows and columns of matrices of a shape.
fn matrix(shape: &[usize]) -> (usize, usize) {
    (shape[shape.len() - 2], shape[shape.len() - 1])
}

/// What the scales of narrowed weights are called.
fn scales_of(name: &str) -> &'static str {
    let all = ["weight_scales", "gate_proj_scales", "up_proj_scales", "down_proj_scales"];
    let found = all.into_iter().find(|scales| scales.strip_suffix("_scales") == Some(name));
    found.unwrap_or_else(|| panic!("no name for the scales of {name}"))
}

/// Blocks as a source of named tensors.
struct Held<'a> {
    blocks: &'a [Block],
    scalars: &'a [(&'static str, f64)],
    shapes: &'a Shapes,
}

impl Named for Held<'_> {
    fn tensor(&self, name: &str) -> Option<Recorded> {
        let of = |name: &str| self.blocks.iter().find(|block| block.layout.name == name);
        let held = of(name)?.read()?;
        let scales = of(&format!("{name}_scales")).and_then(Block::read);
        let (Recorded::U8(codes), Some(Recorded::F32(scales)), Some(narrow)) =
            (&held, scales, self.shapes.narrow)
        else {
            return Some(held);
        };
        let (_, shape) = self.shapes.inputs.iter().find(|(known, _)| *known == name)?;
        let (rows, d) = matrix(shape);
        let codes = Codes {
            codes: codes.iter().copied().collect(),
            scales: scales.iter().copied().collect(),
        };
        let weights = codes.weights(rows, d, narrow);
        ArrayD::from_shape_vec(shape.clone(), weights).ok().map(Recorded::F32)
    }

    fn scalar(&self, name: &str) -> Option<f64> {
        self.scalars.iter().find(|(known, _)| *known == name).map(|&(_, value)| value)
    }
}

impl<O: Op> Prepared<O> for Loaded<O> {
    fn poison(&mut self) -> Result<(), Error> {
        self.outputs.iter_mut().chain(&mut self.between).for_each(Block::poison);
        let zero = self.scratch.iter().zip(&mut self.between).filter(|(scratch, _)| scratch.zero);
        zero.for_each(|(_, block)| block.data_mut().fill(0));
        let places = &mut self.there.places[self.inputs.len()..];
        with(&self.id, |context| {
            let mut all = places.iter_mut().zip(self.outputs.iter().chain(&self.between));
            all.try_for_each(|(place, block)| place.put(&context.device, block))
        })
    }

    fn inputs(&mut self) -> Result<O::Inputs<f32>, Error> {
        with(&self.id, |context| {
            let mut all = self.there.places.iter().zip(&mut self.inputs);
            all.try_for_each(|(place, block)| place.get(&context.device, block))
        })?;
        Ok(O::Inputs::read(&self.named(&self.inputs))?)
    }

    /// Launches every kernel and waits.
    fn execute(&mut self) -> Result<(), Error> {
        with(&self.id, |context| {
            self.there.launch()?;
            context.device.wait()
        })
    }

    fn clocked(&mut self, calls: &Calls) -> Result<Option<Clocked>, Error> {
        let there = &self.there;
        with(&self.id, |context| events::clocked(&context.device, calls, &mut || there.launch()))
            .map(Some)
    }

    fn outputs(&mut self) -> Result<O::Outputs<f32>, Error> {
        let places = &self.there.places[self.inputs.len()..];
        with(&self.id, |context| {
            let mut all = places.iter().zip(self.outputs.iter_mut().chain(&mut self.between));
            all.try_for_each(|(place, block)| place.get(&context.device, block))
        })?;
        Ok(O::Outputs::read(&self.named(&self.outputs))?)
    }

    fn strayed(&mut self) -> Result<Option<String>, Error> {
        let all = self.inputs.iter().chain(&self.outputs).chain(&self.between);
        let strayed = all.into_iter().find_map(Block::strayed);
        let left = || {
            let mut zero = self.scratch.iter().zip(&self.between).filter(|(of, _)| of.zero);
            let (of, _) = zero.find(|(_, block)| block.data().iter().any(|&byte| byte != 0))?;
            Some(format!("{} is not zero after the run, as the next one needs it", of.name))
        };
        Ok(strayed.or_else(left))
    }
}
