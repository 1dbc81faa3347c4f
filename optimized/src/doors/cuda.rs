//! The CUDA door: source, PTX or a cubin, launched as `kernel.toml` says.
//!
//! Tensors go to the device with their guard bands and come back with them. Source is compiled for the
//! device at hand; without one it is compiled all the same, so that its mistakes show anywhere.

use std::{fs, path::Path, sync::Arc};

use golden::{Calls, Clocked, Dtype};

use super::{
    Door, Fault, Memory, Problem, Session, World,
    block::{Block, Layout},
    launch::{Arg, Launch, Role, Width},
    manifest::Code,
};
use crate::cuda::{
    device::{self, Device, Error, Function, Shape, TARGET, Value},
    events,
    place::Place,
};

/// Loaded kernels.
pub(super) struct Kernels {
    device: Arc<Device>,
    launches: Arc<Vec<(Launch, Function)>>,
    /// The most that a workspace may take.
    memory: u64,
}

/// What is to be loaded.
pub(super) struct Source<'a> {
    pub(super) code: Code,
    pub(super) file: &'a Path,
    pub(super) folder: &'a Path,
    pub(super) options: &'a [String],
    pub(super) targets: &'a [String],
    pub(super) launches: &'a [Launch],
}

impl Kernels {
    /// Compiles what has to be compiled, loads it, and looks every entry up.
    pub(super) fn open(source: &Source<'_>, world: &World) -> Result<Kernels, Fault> {
        let told = |why: String| format!("{}: {why}", source.file.display());
        let bytes = fs::read(source.file).map_err(|e| Fault::Refused(told(e.to_string())))?;
        let device = match Device::first() {
            Ok(device) => device,
            Err(error) => return Err(without(source, &bytes, &error)),
        };
        let device = Arc::new(device);
        let target = device.target().map_err(fault)?;
        if !source.targets.is_empty() && !source.targets.contains(&target) {
            let all = source.targets.join(", ");
            return Err(Fault::Unfit(format!("is for {all}; this device is {target}")));
        }
        let image = match source.code {
            Code::Source => compiled(source, &bytes, &target)?,
            Code::Ptx | Code::Cubin => bytes,
        };
        let module = device.load(&image).map_err(|error| refused(error, &told))?;
        let mut launches = Vec::new();
        for launch in source.launches {
            let missing = || no_entry(&launch.entry);
            let function = module.function(&launch.entry);
            let function = function.map_err(|_| Fault::Refused(told(missing())))?;
            if let Some(sizes) = function.parameters() {
                signature(launch, &sizes).map_err(|why| Fault::Refused(told(why)))?;
            }
            launches.push((launch.clone(), function));
        }
        Ok(Kernels { device, launches: Arc::new(launches), memory: world.memory })
    }
}

/// Where there is no device: what can be said of the source without one.
fn without(source: &Source<'_>, bytes: &[u8], why: &Error) -> Fault {
    let unfit = |error: &Error| match error {
        Error::Absent(why) | Error::Compile(why) | Error::Driver(why) => Fault::Unfit(why.clone()),
    };
    if source.code != Code::Source {
        return unfit(why);
    }
    let any = [TARGET.to_owned()];
    for target in if source.targets.is_empty() { &any } else { source.targets } {
        let cubin = match compiled(source, bytes, target) {
            Ok(cubin) => cubin,
            Err(fault) => return fault,
        };
        for launch in source.launches {
            // The code of a kernel is a section of the file, named after it.
            let section = format!(".text.{}\0", launch.entry);
            if !cubin.windows(section.len()).any(|window| window == section.as_bytes()) {
                let missing = no_entry(&launch.entry);
                return Fault::Refused(format!("{}: {missing}", source.file.display()));
            }
        }
    }
    unfit(why)
}

fn no_entry(entry: &str) -> String {
    format!("no kernel {entry} (is it extern \"C\" __global__?)")
}

fn compiled(source: &Source<'_>, bytes: &[u8], target: &str) -> Result<Vec<u8>, Fault> {
    let name = source.file.display().to_string();
    let text = std::str::from_utf8(bytes)
        .map_err(|_| Fault::Refused(format!("{name}: expected text in UTF-8")))?;
    let mut options = vec![
        format!("--gpu-architecture={target}"),
        format!("--include-path={}", source.folder.display()),
        "-lineinfo".to_owned(),
    ];
    options.extend(source.options.iter().cloned());
    let compiled = device::compile(text, &name, &options).map(|compiled| compiled.cubin);
    compiled.map_err(|error| match error {
        Error::Compile(log) => {
            Fault::Refused(format!("{name}: does not compile for {target}\n{log}"))
        }
        Error::Absent(why) | Error::Driver(why) => Fault::Unfit(why),
    })
}

/// What loading came to: code for another device is no mistake.
fn refused(error: Error, told: &dyn Fn(String) -> String) -> Fault {
    match error {
        Error::Driver(why) if why.contains("NO_BINARY_FOR_GPU") => Fault::Unfit(told(why)),
        Error::Driver(why) | Error::Compile(why) => Fault::Refused(told(why)),
        Error::Absent(why) => Fault::Unfit(why),
    }
}

fn fault(error: Error) -> Fault {
    match error {
        Error::Absent(why) | Error::Compile(why) | Error::Driver(why) => Fault::Died(why),
    }
}

/// Whether arguments are as many and as large as the kernel's parameters.
fn signature(launch: &Launch, sizes: &[usize]) -> Result<(), String> {
    let Launch { entry, args, .. } = launch;
    if args.len() != sizes.len() {
        let (want, got) = (sizes.len(), args.len());
        return Err(format!("{entry} takes {want} parameters, args: got {got}"));
    }
    for (at, (arg, &want)) in args.iter().zip(sizes).enumerate() {
        let got = match arg {
            Arg::Tensor(..) | Arg::Workspace => 8,
            Arg::Integer(_, width) | Arg::Scalar(_, width) => width.value(0.0).size(),
        };
        if got != want {
            return Err(format!(
                "parameter {at} of {entry} takes {want} bytes, args: {arg} has {got}"
            ));
        }
    }
    Ok(())
}

impl Width {
    /// A number of this width.
    fn value(self, number: f64) -> Value {
        match self {
            Width::I32 => Value::I32(number as i32),
            Width::I64 => Value::I64(number as i64),
            Width::F32 => Value::F32(number as f32),
            Width::F64 => Value::F64(number),
        }
    }
}

impl Door for Kernels {
    fn begin(&self, problem: &Problem, memory: &mut Memory) -> Result<Box<dyn Session>, Fault> {
        let size = |letter: &str| {
            let found = problem.sizes.iter().find(|(known, _)| *known == letter);
            found.map(|&(_, size)| size as i64)
        };
        let mut workspace = 0;
        let mut runs = Vec::new();
        for (at, (launch, _)) in self.launches.iter().enumerate() {
            if launch.op == problem.op {
                let asked = launch.workspace.value(&size).and_then(|bytes| {
                    u64::try_from(bytes).map_err(|_| format!("workspace is {bytes}"))
                });
                workspace = workspace.max(asked.map_err(Fault::Refused)?);
                runs.push((at, shape(launch, &size).map_err(Fault::Refused)?));
            }
        }
        if self.memory < workspace {
            let most = self.memory;
            let why = format!("asks for a workspace of {workspace} bytes, at most {most}");
            return Err(Fault::Died(why));
        }
        if 0 < workspace {
            let shape = vec![workspace as usize];
            let layout = Layout { name: "workspace", dtype: Dtype::U8, shape };
            memory.workspace = Some(Block::new(layout));
        }
        let place = |block: &Block| Place::new(&self.device, block).map_err(fault);
        let places = memory.blocks().map(place).collect::<Result<Vec<_>, _>>()?;
        let mut launches = Vec::new();
        for (at, shape) in runs {
            let args = &self.launches[at].0.args;
            let value = |arg: &Arg| self.value(arg, problem, memory, &places, &size);
            let values = args.iter().map(value).collect::<Result<Vec<_>, _>>();
            launches.push((at, shape, values.map_err(Fault::Refused)?));
        }
        let device = self.device.clone();
        Ok(Box::new(Launching { device, kernels: self.launches.clone(), launches, places }))
    }
}

impl Kernels {
    /// What is passed for an argument. Inputs come first among places, then outputs, then the
    /// workspace.
    fn value(
        &self,
        arg: &Arg,
        problem: &Problem,
        memory: &Memory,
        places: &[Place],
        size: &dyn Fn(&str) -> Option<i64>,
    ) -> Result<Value, String> {
        let address = |at: usize| Value::Address(places[at].address(&self.device));
        let at = |blocks: &[Block], name: &str| {
            blocks.iter().position(|block| block.layout.name == name)
        };
        let n = memory.inputs.len();
        Ok(match arg {
            // The manifest was checked: a name that is not here is of a tensor that this problem does
            // without.
            Arg::Tensor(role, name) => {
                let input = at(&memory.inputs, name).filter(|_| *role != Role::Output);
                let output = at(&memory.outputs, name).filter(|_| *role != Role::Input);
                let place = input.or(output.map(|at| n + at));
                place.map_or(Value::Address(0), address)
            }
            Arg::Workspace => {
                memory.workspace.as_ref().map_or(Value::Address(0), |_| address(places.len() - 1))
            }
            Arg::Integer(expr, width) => {
                let value = expr.value(size)?;
                if *width == Width::I32 && i32::try_from(value).is_err() {
                    return Err(format!("args: {expr} is {value}, too large for i32"));
                }
                match width {
                    Width::I32 => Value::I32(value as i32),
                    _ => Value::I64(value),
                }
            }
            Arg::Scalar(name, width) => {
                let found = problem.scalars.iter().find(|(known, _)| known == name);
                let (_, value) = found.ok_or_else(|| format!("args: no scalar {name}"))?;
                width.value(*value)
            }
        })
    }
}

fn shape(launch: &Launch, size: &dyn Fn(&str) -> Option<i64>) -> Result<Shape, String> {
    let number = |what: &str, expr: &super::expr::Expr, least: i64| {
        let value = expr.value(size)?;
        let fits = u32::try_from(value).ok().filter(|_| least <= value);
        fits.ok_or_else(|| format!("{}: {what}: {expr} is {value}", launch.entry))
    };
    let three = |what: &str, all: &[super::expr::Expr; 3]| -> Result<[u32; 3], String> {
        Ok([number(what, &all[0], 1)?, number(what, &all[1], 1)?, number(what, &all[2], 1)?])
    };
    Ok(Shape {
        grid: three("grid", &launch.grid)?,
        block: three("block", &launch.block)?,
        shared: number("shared", &launch.shared, 0)?,
        early: false,
    })
}

struct Launching {
    device: Arc<Device>,
    kernels: Arc<Vec<(Launch, Function)>>,
    launches: Vec<(usize, Shape, Vec<Value>)>,
    places: Vec<Place>,
}

impl Launching {
    /// Copies everything to the device.
    fn put(&mut self, memory: &Memory) -> Result<(), Fault> {
        let mut all = memory.blocks().zip(&mut self.places);
        all.try_for_each(|(block, place)| place.put(&self.device, block)).map_err(fault)
    }

    /// Copies everything back.
    fn get(&self, memory: &mut Memory) -> Result<(), Fault> {
        let mut all = memory.blocks_mut().zip(&self.places);
        all.try_for_each(|(block, place)| place.get(&self.device, block)).map_err(fault)
    }
}

impl Session for Launching {
    fn run(&mut self, _: &Problem, memory: &mut Memory) -> Result<(), Fault> {
        self.put(memory)?;
        for (at, shape, values) in &self.launches {
            let (launch, function) = &self.kernels[*at];
            let died = |error| match error {
                Error::Absent(why) | Error::Compile(why) | Error::Driver(why) => {
                    Fault::Died(format!("{}: {why}", launch.entry))
                }
            };
            function.launch(*shape, values).map_err(died)?;
            // One at a time, so that a fault is told of the kernel that made it.
            self.device.wait().map_err(died)?;
        }
        self.get(memory)
    }

    fn clocked(
        &mut self,
        _: &Problem,
        memory: &mut Memory,
        calls: &Calls,
    ) -> Result<Option<Clocked>, Fault> {
        self.put(memory)?;
        let mut call = || {
            let mut all = self.launches.iter();
            all.try_for_each(|(at, shape, values)| self.kernels[*at].1.launch(*shape, values))
        };
        let clocked = events::clocked(&self.device, calls, &mut call).map_err(fault)?;
        self.get(memory)?;
        Ok(Some(clocked))
    }
}
