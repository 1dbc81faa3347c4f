//! One launch: a kernel by name, its arguments by name.
//!
//! The signature in the kernel's text says what it takes and in which order; a caller says what each
//! parameter is, and leaves none out.

use std::collections::{HashMap, hash_map::Entry as Slot};

use kernels::{Build, Entry, Kind, Parameter, Source};

use super::{
    device::{Buffer, Error, Function, Shape, Value},
    gpu::Context,
};

/// An argument.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Arg {
    /// An address of the device, 0 for none.
    At(u64),
    /// A size or another whole number.
    Int(usize),
    /// A number.
    Float(f32),
}

/// What is launched.
#[derive(Clone, Copy)]
pub(super) struct Call<'a> {
    pub(super) source: &'a Source,
    pub(super) build: Build,
    pub(super) entry: &'static str,
    /// Blocks.
    pub(super) grid: [usize; 3],
    /// Threads of a block.
    pub(super) threads: usize,
    /// Bytes of dynamic shared memory.
    pub(super) shared: usize,
    /// Whether it may start before what is before it has ended.
    pub(super) early: bool,
    /// By the names of the signature, in any order; where an input and an output share theirs, with `_in`
    /// and `_out`.
    pub(super) args: &'a [(&'static str, Arg)],
}

/// Kernels that were launched before.
#[derive(Default)]
pub(super) struct Kernels {
    found: HashMap<(&'static str, Build), (Function, Entry)>,
}

/// Takes calls.
pub(super) trait Launches {
    /// Puts a call behind those before; one without blocks is none.
    fn launch(&mut self, call: &Call<'_>) -> Result<(), Error>;

    /// Puts behind those before what gathers so many bytes of every rank, in their order.
    fn gather(&mut self, from: &Buffer, to: &Buffer, bytes: usize) -> Result<(), Error>;
}

/// The stream of the device.
pub(super) struct Stream<'a> {
    pub(super) context: &'a mut Context,
    pub(super) kernels: &'a mut Kernels,
}

impl Launches for Stream<'_> {
    fn launch(&mut self, call: &Call<'_>) -> Result<(), Error> {
        self.kernels.launch(self.context, call)
    }

    fn gather(&mut self, from: &Buffer, to: &Buffer, bytes: usize) -> Result<(), Error> {
        self.context.peers.gather(&self.context.device, from, to, bytes)
    }
}

impl Kernels {
    fn launch(&mut self, context: &mut Context, call: &Call<'_>) -> Result<(), Error> {
        if call.grid.contains(&0) {
            return Ok(());
        }
        let (function, entry) = match self.found.entry((call.entry, call.build)) {
            Slot::Occupied(found) => found.into_mut(),
            Slot::Vacant(slot) => {
                let function = context.module(call.source, call.build)?.function(call.entry)?;
                slot.insert((function, entry(call.source, call.entry)?))
            }
        };
        let values = bind(entry, call.args).map_err(Error::Compile)?;
        let grid = call.grid.map(|n| n as u32);
        let shape = Shape::of(grid, call.threads as u32, call.shared as u32);
        let shape = Shape { early: call.early, ..shape };
        function.launch(shape, &values)
    }
}

/// A kernel's signature.
pub(super) fn entry(source: &Source, name: &str) -> Result<Entry, Error> {
    let found = source.entries().into_iter().find(|entry| entry.name == name);
    found.ok_or_else(|| Error::Compile(format!("{}: no kernel {name}", source.file)))
}

/// What is passed for a parameter.
pub(super) fn argument(parameter: &Parameter, args: &[(&str, Arg)]) -> Option<Arg> {
    let Parameter { name, kind, .. } = parameter;
    let end = match kind {
        Kind::Input(_) => "_in",
        Kind::Output(_) => "_out",
        Kind::Int | Kind::Float => "",
    };
    let is = |known: &str| known == name || known.strip_suffix(end) == Some(name);
    args.iter().find(|(known, _)| is(known)).map(|&(_, arg)| arg)
}

/// The arguments in the order of the signature. A fault is planted by nobody here.
pub(super) fn bind(entry: &Entry, args: &[(&str, Arg)]) -> Result<Vec<Value>, String> {
    let mut used = 0;
    let value = |parameter: &Parameter| {
        let Parameter { name, kind, .. } = parameter;
        let Some(arg) = argument(parameter, args) else {
            let planted = *kind == Kind::Int && name == "plant";
            return if planted { Ok(Value::I32(0)) } else { Err(format!("no argument {name}")) };
        };
        used += 1;
        match (kind, arg) {
            (Kind::Input(_) | Kind::Output(_), Arg::At(address)) => Ok(Value::Address(address)),
            (Kind::Int, Arg::Int(x)) => {
                // Halves of what is wider are passed as they are.
                let fits =
                    i32::try_from(x).ok().or_else(|| Some(u32::try_from(x).ok()?.cast_signed()));
                fits.map(Value::I32).ok_or_else(|| format!("{name} is {x}, too large for int"))
            }
            (Kind::Float, Arg::Float(x)) => Ok(Value::F32(x)),
            _ => Err(format!("{name} is no {kind:?}: {arg:?}")),
        }
    };
    let values: Result<Vec<_>, _> = entry.parameters.iter().map(value).collect();
    let values = values.map_err(|why| format!("{}: {why}", entry.name))?;
    if used != args.len() {
        let names: Vec<_> = args.iter().map(|(name, _)| *name).collect();
        return Err(format!("{}: takes {used} of {names:?}", entry.name));
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use kernels::GATED_DELTA_RULE;

    use super::{Arg, bind, entry};
    use crate::cuda::device::Value;

    #[test]
    fn arguments_are_bound_by_name() {
        let entry = entry(&GATED_DELTA_RULE, "gated_delta_rule_naive").unwrap();
        let names = ["o", "q", "k", "v", "g", "beta", "cu_seqlens"];
        let mut args: Vec<_> = names.iter().map(|&name| (name, Arg::At(7))).collect();
        args.extend([("state_in", Arg::At(1)), ("state_out", Arg::At(2))]);
        args.extend(["HK", "HV", "K", "V"].map(|name| (name, Arg::Int(3))));
        args.push(("eps", Arg::Float(0.5)));
        let values = bind(&entry, &args).unwrap();
        assert_eq!(values[1], Value::Address(2));
        assert_eq!(values[7], Value::Address(1));
        assert_eq!(values[9], Value::F32(0.5));
        assert_eq!(values.last(), Some(&Value::I32(0)));
        let missing = bind(&entry, &args[1..]).unwrap_err();
        assert!(missing.contains("no argument o"), "{missing}");
        args.push(("M", Arg::Int(1)));
        let unknown = bind(&entry, &args).unwrap_err();
        assert!(unknown.contains("\"M\""), "{unknown}");
        args.pop();
        args[0].1 = Arg::Int(1);
        assert!(bind(&entry, &args).is_err());
    }
}
