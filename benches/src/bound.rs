//! Where bounds come from: the oracle, and runs of the reference in stochastic arithmetic.
//!
//! Twelve runs screen; what is over its bound is derived again from 256 fresh runs, and only that
//! verdict counts. A bound is kept in memory and, where a folder was given, on disk, by op, problem,
//! its inputs, plan and the text of the reference: a second check costs no more than the kernels.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, OnceLock},
};

use golden::{
    Plan, Spec, Tensors, View,
    compare::derived::{Derived, Moments},
    plan::{Form, Grid, Term},
    recording::{Recorded, serialize},
};
use ndarray::{ArrayD, ShapeError};
use rayon::prelude::*;
use reference::real::{Planned, Rounding, under};
use safetensors::SafeTensors;

use crate::{answer::Answer, files};

/// Runs that screen.
pub const SCREEN: u32 = 12;
/// Runs that decide.
pub const DECIDE: u32 = 256;

/// One output's bound: derived where it holds numbers, exact where it holds integers.
#[derive(Clone, Debug)]
pub enum Output {
    /// Numbers.
    Numbers(Derived),
    /// Integers, and for each element those that a run gave in place of the oracle's.
    Integers {
        /// The oracle's.
        want: ArrayD<i64>,
        /// Per run, all elements.
        runs: Vec<Vec<i64>>,
    },
}

/// Every output's bound, in the order of the op.
pub type Outputs = Vec<(&'static str, Output)>;

/// Where bounds are kept, and how many derivations were needed.
static FOLDER: OnceLock<PathBuf> = OnceLock::new();

type Memory = Mutex<HashMap<String, Arc<Outputs>>>;

fn memory() -> &'static Memory {
    static MEMORY: OnceLock<Memory> = OnceLock::new();
    MEMORY.get_or_init(Memory::default)
}

/// Keeps bounds in a folder from now on. The first call counts.
pub fn keep_in(folder: &Path) {
    let _ = FOLDER.set(folder.to_owned());
}

/// Seeds from here on are drawn once, for false alarms: their bounds are not kept on disk.
const FRESH: u64 = 1_000_000;

/// What kept bounds are of: another text of the reference gives another.
pub fn version() -> &'static str {
    reference::source_hash()
}

/// Drops the bounds kept in memory: problems that are drawn once fill it for nothing.
pub fn forget() {
    if let Ok(mut memory) = memory().lock() {
        memory.clear();
    }
}

/// What tells two questions apart.
pub(crate) struct Question<'a, O: Answer> {
    pub(crate) spec: &'a Spec<O::Case>,
    pub(crate) inputs: &'a O::Inputs<f32>,
    pub(crate) plan: &'a Plan,
    /// Experts given, where a candidate chose otherwise within the margin of a near tie.
    pub(crate) experts: Option<&'a ArrayD<i64>>,
    /// One source of rounding alone.
    pub(crate) only: Option<Term>,
}

impl<O: Answer> Question<'_, O> {
    fn key(&self, runs: u32) -> String {
        let mut hasher = blake3::Hasher::new();
        let text = format!("{}/{}\n{}\n{runs}", O::NAME, self.spec, self.plan);
        hasher.update(text.as_bytes());
        // A fill that draws otherwise asks another question under the same name.
        for (name, view) in self.inputs.tensors() {
            hasher.update(name.as_bytes());
            hasher.update(&bytes(&view.to_f64()));
        }
        hasher.update(reference::source_hash().as_bytes());
        hasher.finalize().to_hex()[..32].to_owned()
    }

    /// The bound from so many runs. Kept, unless experts are given or a term stands alone: those are
    /// rare.
    pub(crate) fn derive(&self, runs: u32) -> Arc<Outputs> {
        if self.experts.is_some() || self.only.is_some() {
            return Arc::new(self.run(runs));
        }
        let key = self.key(runs);
        if let Some(found) = memory().lock().ok().and_then(|memory| memory.get(&key).cloned()) {
            return found;
        }
        let folder = FOLDER.get().filter(|_| self.spec.seed < FRESH);
        let file = folder.map(|folder| folder.join(format!("{key}.safetensors")));
        let names = <O::Outputs<f32> as Tensors>::names();
        let grid = |name: &str| O::grid(name, self.plan);
        let kept = file.as_ref().and_then(|file| read(file, runs, names, &grid));
        let outputs = Arc::new(kept.unwrap_or_else(|| {
            let outputs = self.run(runs);
            if let Some(file) = &file {
                // A bound that cannot be kept is derived again: slower, never wrong.
                let _ = write(file, &outputs);
            }
            outputs
        }));
        if let Ok(mut memory) = memory().lock() {
            memory.insert(key, outputs.clone());
        }
        outputs
    }

    fn run(&self, runs: u32) -> Outputs {
        let wide = O::wide::<f64>(self.inputs);
        let want = O::answer(&wide, Form::Plain, self.experts);
        // Runs take the experts of the oracle: a swap in a near tie is judged by its margin, not by
        // what it does to everything after it.
        let mut forced = self.experts.cloned();
        if forced.is_none() {
            forced = want.tensors().into_iter().find_map(|(name, view)| match view {
                View::I64(ids) if name == "ids" => Some(ids.to_owned()),
                _ => None,
            });
        }
        let mut outputs: Outputs = want
            .tensors()
            .into_iter()
            .map(|(name, view)| {
                let output = match view {
                    View::I64(x) => Output::Integers { want: x.to_owned(), runs: Vec::new() },
                    view => {
                        let grid = O::grid(name, self.plan);
                        Output::Numbers(Derived::new(view.shape(), view.to_f64(), grid))
                    }
                };
                (name, output)
            })
            .collect();
        let planned = O::wide::<Planned>(self.inputs);
        // The screen and the verdict must not share a run.
        let first = if runs == SCREEN { 0 } else { 1 << 20 };
        add(&mut outputs, first..first + runs, &|rounding| {
            let run = under(self.plan, self.only, rounding, || {
                O::answer(&planned, self.plan.form, forced.as_ref())
            });
            run.tensors().into_iter().map(|(_, view)| view.to_f64()).collect()
        });
        outputs
    }
}

/// Runs, and what they say of the outputs.
fn add(
    outputs: &mut Outputs,
    seeds: std::ops::Range<u32>,
    run: &(dyn Fn(Rounding) -> Vec<Vec<f64>> + Sync),
) {
    let all: Vec<_> =
        seeds.into_par_iter().map(|seed| run(Rounding::Random(u64::from(seed)))).collect();
    for run in all {
        for ((_, output), run) in outputs.iter_mut().zip(run) {
            match output {
                Output::Numbers(derived) => derived.add(&run),
                Output::Integers { runs, .. } => {
                    runs.push(run.into_iter().map(|x| x as i64).collect());
                }
            }
        }
    }
}

fn bytes(x: &[f64]) -> Vec<u8> {
    x.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn raw(moments: &[Moments]) -> Vec<f64> {
    moments.iter().flat_map(Moments::raw).collect()
}

/// Writes beside the place and renames: another process may do the same at the same time.
fn write(file: &Path, outputs: &Outputs) -> Result<(), Box<dyn std::error::Error>> {
    let mut tensors = Vec::new();
    let mut add = |name: String, shape: &[usize], x: Vec<f64>| -> Result<(), ShapeError> {
        tensors.push((name, Recorded::F64(ArrayD::from_shape_vec(shape, x)?)));
        Ok(())
    };
    for (name, output) in outputs {
        match output {
            Output::Numbers(d) => {
                add(format!("{name}/want"), &d.shape, d.want.clone())?;
                add(format!("{name}/squares"), &d.shape, d.squares.clone())?;
                for (what, moments) in
                    [("sums", &d.sums), ("slopes", &d.slopes), ("means", &d.means)]
                {
                    let raw = raw(moments);
                    add(format!("{name}/{what}"), &[raw.len()], raw)?;
                }
            }
            Output::Integers { want, runs } => {
                let ints = want.iter().map(|&x| x as f64).collect();
                add(format!("{name}/ints"), want.shape(), ints)?;
                let flat = runs.iter().flatten().map(|&x| x as f64).collect();
                add(format!("{name}/runs"), &[runs.len(), want.len()], flat)?;
            }
        }
    }
    let data = serialize(&tensors, &[])?;
    files::replace(file, &data)?;
    Ok(())
}

/// A kept bound, if it is there, whole, and of this op.
fn read(
    file: &Path,
    runs: u32,
    names: &[&'static str],
    grid: &dyn Fn(&str) -> Grid,
) -> Option<Outputs> {
    let data = fs::read(file).ok()?;
    let parsed = SafeTensors::deserialize(&data).ok()?;
    let numbers = |name: &str| -> Option<(Vec<usize>, Vec<f64>)> {
        match Recorded::of(&parsed.tensor(name).ok()?)? {
            Recorded::F64(x) => Some((x.shape().to_vec(), x.into_raw_vec_and_offset().0)),
            _ => None,
        }
    };
    let moments = |name: &str| -> Option<Vec<Moments>> {
        let (_, raw) = numbers(name)?;
        Some(raw.as_chunks::<3>().0.iter().map(|&raw| Moments::from_raw(raw)).collect())
    };
    let mut outputs = Vec::new();
    for &name in names {
        if let Some((shape, want)) = numbers(&format!("{name}/want")) {
            let empty = Derived::new(&shape, want, grid(name));
            let derived = Derived {
                runs,
                squares: numbers(&format!("{name}/squares"))?.1,
                sums: moments(&format!("{name}/sums"))?,
                slopes: moments(&format!("{name}/slopes"))?,
                means: moments(&format!("{name}/means"))?,
                ..empty.clone()
            };
            let same = (derived.sums.len(), derived.slopes.len(), derived.squares.len())
                == (empty.sums.len(), empty.slopes.len(), empty.squares.len());
            outputs.push((name, Output::Numbers(same.then_some(derived)?)));
        } else if let Some((shape, want)) = numbers(&format!("{name}/ints")) {
            let n = want.len().max(1);
            let want = want.into_iter().map(|x| x as i64).collect();
            let (_, flat) = numbers(&format!("{name}/runs"))?;
            let runs = flat.chunks(n).map(|run| run.iter().map(|&x| x as i64).collect()).collect();
            outputs.push((
                name,
                Output::Integers { want: ArrayD::from_shape_vec(shape, want).ok()?, runs },
            ));
        }
    }
    (!outputs.is_empty()).then_some(outputs)
}
