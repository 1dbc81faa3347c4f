//! Foreign kernels: code that karat did not build, called through one of three doors.
//!
//! A `kernel.toml` ([`Manifest`]) says what it computes and how it is called; [`Foreign`] is that
//! kernel as a [`Variant`] of any op. Tensors go by name and in storage types, so that a door knows no
//! op. Whatever foreign code may do to the process it is called in, it does: who calls it in a
//! process of its own is `benches`.

pub(crate) mod block;
mod cabi;
mod constraint;
mod cuda;
mod expr;
mod frame;
mod launch;
mod manifest;
mod process;
pub mod scaffold;

use std::sync::Arc;

use golden::{
    Calls, Case, Claims, Clocked, Dtype, Error, Host, Op, Plan, Prepared, Spec, Tensors, Variant,
    View,
    plan::Grid,
    recording::Recorded,
    tensor::{Read, Source},
};

use self::block::{Block, Layout};
pub use self::{
    constraint::Constraints,
    launch::Known,
    manifest::{ABI, Build, Code, Entrance, Manifest},
};

/// The C header of the shared-library door.
pub const HEADER: &str = include_str!("doors/karat.h");
/// The Python helper of the process door.
pub const PYTHON: &str = include_str!("doors/karat_kernel.py");

/// Why a foreign kernel gave no answer.
#[derive(Debug)]
pub enum Fault {
    /// It cannot be called as it says: no such symbol, another ABI, it does not compile.
    Refused(String),
    /// This machine cannot run it.
    Unfit(String),
    /// It died, said that it failed, or said what is no answer.
    Died(String),
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (Fault::Refused(why) | Fault::Unfit(why) | Fault::Died(why)) = self;
        f.write_str(why)
    }
}

impl std::error::Error for Fault {}

/// A problem as code sees it that knows no op.
#[derive(Clone, Debug)]
struct Problem {
    op: &'static str,
    spec: String,
    sizes: Vec<(&'static str, usize)>,
    dtype: Dtype,
    scalars: Vec<(&'static str, f64)>,
}

/// Its tensors in memory, each between guard bands.
#[derive(Debug)]
struct Memory {
    inputs: Vec<Block>,
    outputs: Vec<Block>,
    workspace: Option<Block>,
    /// What the other side says it did that it should not have.
    confessed: Option<String>,
}

impl Memory {
    /// Inputs, outputs, workspace.
    fn blocks(&self) -> impl Iterator<Item = &Block> {
        self.inputs.iter().chain(&self.outputs).chain(&self.workspace)
    }

    /// The same, writable.
    fn blocks_mut(&mut self) -> impl Iterator<Item = &mut Block> {
        self.inputs.iter_mut().chain(&mut self.outputs).chain(&mut self.workspace)
    }
}

/// Opened foreign code.
trait Door: Send + Sync {
    /// Makes ready for a problem: room for a workspace, memory of the device.
    fn begin(&self, problem: &Problem, memory: &mut Memory) -> Result<Box<dyn Session>, Fault>;
}

/// Foreign code, ready for one problem.
trait Session {
    /// Computes every output from the inputs.
    fn run(&mut self, problem: &Problem, memory: &mut Memory) -> Result<(), Fault>;
    /// Times calls, where a clock around `run` would time more than them: see [`Prepared::clocked`].
    fn clocked(
        &mut self,
        _problem: &Problem,
        _memory: &mut Memory,
        _calls: &Calls,
    ) -> Result<Option<Clocked>, Fault> {
        Ok(None)
    }
}

/// What opening needs to know of the world; chosen by the command line.
#[derive(Clone, Debug, Default)]
pub struct World {
    /// The Python that `{python}` stands for.
    pub python: String,
    /// The most memory that a workspace may take, in bytes.
    pub memory: u64,
}

/// A foreign kernel, opened: a variant of every op that it implements.
pub struct Foreign {
    name: String,
    manifest: Manifest,
    door: Arc<dyn Door>,
}

impl std::fmt::Debug for Foreign {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Foreign").field("manifest", &self.manifest).finish_non_exhaustive()
    }
}

/// The name of a kernel among variants.
pub fn variant(manifest: &Manifest) -> String {
    format!("foreign/{}", manifest.name)
}

impl Foreign {
    /// Opens the door: loads the library, starts the program, compiles the source.
    ///
    /// # Errors
    /// If it cannot be called as it says.
    pub fn open(manifest: Manifest, world: &World) -> Result<Foreign, Fault> {
        let door: Arc<dyn Door> = match &manifest.entrance {
            Entrance::Cabi { library, symbols } => {
                Arc::new(cabi::Library::open(library, symbols, &manifest.implements, world)?)
            }
            Entrance::Process { command } => Arc::new(process::Program::start(
                command,
                &manifest.folder,
                &manifest.implements,
                world,
            )?),
            Entrance::Cuda { code, file, options, targets, launches } => {
                let folder = &manifest.folder;
                let source = cuda::Source { code: *code, file, folder, options, targets, launches };
                Arc::new(cuda::Kernels::open(&source, world)?)
            }
        };
        Ok(Foreign { name: variant(&manifest), manifest, door })
    }
}

impl<O: Op> Variant<O> for Foreign {
    fn name(&self) -> &str {
        &self.name
    }

    fn skip(&self, host: &Host, spec: &Spec<O::Case>) -> Option<String> {
        let sizes = sizes::<O>(spec);
        let refused = self.manifest.constraints.refuse(&sizes, spec.dtype);
        refused.or_else(|| self.manifest.constraints.lacks(host))
    }

    fn plan(&self, spec: &Spec<O::Case>) -> Plan {
        self.manifest.plan(spec.dtype)
    }

    fn claims(&self) -> Claims {
        self.manifest.claims
    }

    fn prepare(
        &self,
        spec: &Spec<O::Case>,
        inputs: &O::Inputs<f32>,
    ) -> Result<Box<dyn Prepared<O>>, Error> {
        let plan = self.manifest.plan(spec.dtype);
        let problem = Problem {
            op: O::NAME,
            spec: spec.to_string(),
            sizes: sizes::<O>(spec),
            dtype: spec.dtype,
            scalars: inputs.scalars(),
        };
        let input = |(name, view): &(&'static str, View<'_>)| {
            let wide = O::WIDE.contains(name);
            let dtype = if wide { Dtype::F32 } else { spec.dtype };
            let mut block = Block::new(layout(name, view, dtype));
            block.store(view);
            block
        };
        let unwritten = O::unwritten(spec, inputs);
        let output = |(name, view): &(&'static str, View<'_>)| {
            let dtype = match O::grid(name, &plan) {
                Grid::F16 => Dtype::F16,
                Grid::Bf16 => Dtype::Bf16,
                Grid::F32 | Grid::Tf32 | Grid::Fp8 => Dtype::F32,
            };
            Block::new(layout(name, view, dtype))
        };
        let mut memory = Memory {
            inputs: inputs.tensors().iter().map(input).collect(),
            outputs: unwritten.tensors().iter().map(output).collect(),
            workspace: None,
            confessed: None,
        };
        let session = self.door.begin(&problem, &mut memory)?;
        Ok(Box::new(Ready { problem, memory, session, op: std::marker::PhantomData::<fn() -> O> }))
    }
}

fn sizes<O: Op>(spec: &Spec<O::Case>) -> Vec<(&'static str, usize)> {
    <O::Case as Case>::LETTERS.iter().copied().zip(spec.case.sizes()).collect()
}

/// Floats are stored in `dtype`, everything else as it is.
fn layout(name: &'static str, view: &View<'_>, dtype: Dtype) -> Layout {
    let dtype = match view {
        View::I64(_) => Dtype::I64,
        View::U8(_) => Dtype::U8,
        _ => dtype,
    };
    Layout { name, dtype, shape: view.shape().to_vec() }
}

/// A problem in memory.
struct Ready<O> {
    problem: Problem,
    memory: Memory,
    session: Box<dyn Session>,
    op: std::marker::PhantomData<fn() -> O>,
}

/// Blocks as a source of named tensors.
struct Named<'a>(&'a [Block], &'a Problem);

impl Source for Named<'_> {
    fn tensor(&self, name: &str) -> Option<Recorded> {
        self.0.iter().find(|block| block.layout.name == name)?.read()
    }

    fn scalar(&self, name: &str) -> Option<f64> {
        self.1.scalars.iter().find(|(known, _)| *known == name).map(|&(_, value)| value)
    }
}

impl<O: Op> Prepared<O> for Ready<O> {
    fn poison(&mut self) -> Result<(), Error> {
        self.memory.outputs.iter_mut().chain(&mut self.memory.workspace).for_each(Block::poison);
        Ok(())
    }

    fn inputs(&mut self) -> Result<O::Inputs<f32>, Error> {
        Ok(O::Inputs::read(&Named(&self.memory.inputs, &self.problem))?)
    }

    fn execute(&mut self) -> Result<(), Error> {
        Ok(self.session.run(&self.problem, &mut self.memory)?)
    }

    fn clocked(&mut self, calls: &Calls) -> Result<Option<Clocked>, Error> {
        Ok(self.session.clocked(&self.problem, &mut self.memory, calls)?)
    }

    fn outputs(&mut self) -> Result<O::Outputs<f32>, Error> {
        Ok(O::Outputs::read(&Named(&self.memory.outputs, &self.problem))?)
    }

    fn load(&mut self, inputs: &O::Inputs<f32>) -> Result<bool, Error> {
        let tensors = inputs.tensors();
        let shapes = |(block, (name, view)): (&Block, &(&'static str, View<'_>))| {
            block.layout.name == *name && block.layout.shape == view.shape()
        };
        if tensors.len() != self.memory.inputs.len()
            || !self.memory.inputs.iter().zip(&tensors).all(shapes)
        {
            return Ok(false);
        }
        for (block, (_, view)) in self.memory.inputs.iter_mut().zip(&tensors) {
            block.store(view);
        }
        self.problem.scalars = inputs.scalars();
        Ok(true)
    }

    fn strayed(&mut self) -> Result<Option<String>, Error> {
        let confessed = self.memory.confessed.clone();
        Ok(confessed.or_else(|| self.memory.blocks().find_map(Block::strayed)))
    }
}
