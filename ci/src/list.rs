//! `karat list`: what would run.

use std::{fmt, str::FromStr, sync::Arc};

use benches::{
    filter::Filter,
    foreign::{self, Kernel},
    plan::{Job, plan},
};
use golden::Set;
use serde_json::json;

use crate::{
    changed,
    exit::{Exit, fail, refuse},
    out::Out,
};

/// Which problems are meant.
#[derive(Debug, clap::Args)]
pub(crate) struct Selection {
    /// Words that must be in the id; a whole id selects its problem even if no set holds it.
    #[arg(env = "KARAT_FILTER", value_delimiter = ' ')]
    filter: Vec<String>,
    /// An expression: op(gated_delta_rule) & dtype(bf16) & T>=4096 & !fill(domain)
    #[arg(short = 'E', long, value_name = "EXPR")]
    expression: Option<String>,
    /// Which problems there are.
    #[arg(long, value_enum, default_value = "smoke", env = "KARAT_SET")]
    set: SetName,
    /// Only what runs on this device.
    #[arg(long, value_enum, env = "KARAT_DEVICE")]
    device: Option<Device>,
    /// Only the i-th of n parts, so that n machines share a run: `karat merge` joins what they found
    #[arg(long, value_name = "i/n", env = "KARAT_SHARD")]
    shard: Option<Shard>,
}

/// One of several parts of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shard {
    /// From one on.
    index: usize,
    /// How many there are.
    of: usize,
}

impl Shard {
    /// Whether it holds the problem at this place.
    pub(crate) fn holds(self, at: usize) -> bool {
        at % self.of == self.index - 1
    }
}

impl FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> Result<Shard, String> {
        let found = text.split_once('/').and_then(|(index, of)| {
            let (index, of) = (index.parse().ok()?, of.parse().ok()?);
            (1 <= index && index <= of).then_some(Shard { index, of })
        });
        found.ok_or_else(|| "expected i/n with i from 1 to n".to_owned())
    }
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.index, self.of)
    }
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(crate) enum SetName {
    /// Seconds.
    Smoke,
    /// Every length, ratio and fill.
    Ci,
    /// The model's own sizes too.
    Nightly,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(crate) enum Device {
    /// This processor.
    Cpu,
    /// A GPU.
    Cuda,
}

impl SetName {
    /// As it is typed.
    pub(crate) fn name(self) -> &'static str {
        match self {
            SetName::Smoke => "smoke",
            SetName::Ci => "ci",
            SetName::Nightly => "nightly",
        }
    }
}

impl Device {
    /// As it is typed, and as names of variants begin.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Device::Cpu => "cpu",
            Device::Cuda => "cuda",
        }
    }
}

impl From<SetName> for Set {
    fn from(name: SetName) -> Set {
        match name {
            SetName::Smoke => Set::Smoke,
            SetName::Ci => Set::Ci,
            SetName::Nightly => Set::Nightly,
        }
    }
}

impl Selection {
    /// The jobs that are meant: of these foreign kernels, where there are some.
    pub(crate) fn jobs(&self, kernels: &[Arc<Kernel>]) -> anyhow::Result<Vec<Job>> {
        Ok(self.part(self.all(kernels)?))
    }

    /// The same of all shards.
    pub(crate) fn all(&self, kernels: &[Arc<Kernel>]) -> anyhow::Result<Vec<Job>> {
        let (set, filter, device) = (self.set(), self.filter()?, self.device());
        if kernels.is_empty() {
            plan(set, &filter, device).map_err(refuse)
        } else {
            foreign::jobs(set, &filter, device, kernels).map_err(refuse)
        }
    }

    /// Those of this shard: all ways to compute a problem stay together, they share its bound.
    pub(crate) fn part(&self, jobs: Vec<Job>) -> Vec<Job> {
        let Some(shard) = self.shard else { return jobs };
        let problems = jobs.chunk_by(|a, b| (a.entry.name(), &a.spec) == (b.entry.name(), &b.spec));
        let held = problems.enumerate().filter(|(at, _)| shard.holds(*at));
        held.flat_map(|(_, jobs)| jobs.to_vec()).collect()
    }

    /// Of problems of another kind those of this shard.
    pub(crate) fn held<T>(&self, all: Vec<T>) -> Vec<T> {
        let holds = |at| self.shard.is_none_or(|shard| shard.holds(at));
        all.into_iter().enumerate().filter(|(at, _)| holds(*at)).map(|(_, one)| one).collect()
    }

    /// The part of the run that is meant, if not all of it is.
    pub(crate) fn shard(&self) -> Option<Shard> {
        self.shard
    }

    /// Words and expression.
    pub(crate) fn filter(&self) -> anyhow::Result<Filter> {
        Filter::new(&self.filter, self.expression.as_deref()).map_err(refuse)
    }

    /// Whether problems are named on the command line, by words or an expression.
    pub(crate) fn names(&self) -> bool {
        let words = std::env::var("KARAT_FILTER").unwrap_or_default();
        let of_environment = words.split(' ').eq(self.filter.iter().map(String::as_str));
        (!self.filter.is_empty() && !of_environment) || self.expression.is_some()
    }

    /// Which problems there are.
    pub(crate) fn set(&self) -> Set {
        self.set.into()
    }

    /// The set as it is typed, where it is not the one that is meant anyway.
    pub(crate) fn typed(&self) -> String {
        match self.set {
            SetName::Smoke => String::new(),
            set => format!(" --set {}", set.name()),
        }
    }

    /// All of it, as another karat would be given it.
    pub(crate) fn given(&self) -> Vec<String> {
        let pair = |flag: &str, value: &str| [flag.to_owned(), value.to_owned()];
        let mut given = pair("--set", self.set.name()).to_vec();
        given.extend(self.device().iter().flat_map(|device| pair("--device", device)));
        given.extend(self.expression.iter().flat_map(|text| pair("-E", text)));
        given.push("--".to_owned());
        given.extend_from_slice(&self.filter);
        given
    }

    /// The device that is meant, if one is.
    pub(crate) fn device(&self) -> Option<&'static str> {
        self.device.map(Device::name)
    }

    /// The words, for recordings.
    pub(crate) fn words(&self) -> &[String] {
        &self.filter
    }

    /// Whether the recordings of ops are meant as well: plain words can name them, expressions over
    /// sizes cannot.
    pub(crate) fn with_recordings(&self) -> bool {
        self.expression.is_none() && !matches!(self.device, Some(Device::Cuda))
    }
}

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    selection: Selection,
    #[command(flatten)]
    changed: changed::Since,
}

pub(crate) fn run(args: &Args, out: &Out) -> anyhow::Result<Exit> {
    let mut jobs = args.selection.all(&[])?;
    if let Some(changed) = args.changed.find(&[])? {
        jobs = changed.of(jobs)?;
    }
    let jobs = args.selection.part(jobs);
    if jobs.is_empty() {
        return Err(fail(
            Exit::Nothing,
            "nothing selected; `karat list` without a filter names everything",
        ));
    }
    for job in &jobs {
        out.line(&job.id());
        let cost = job.parsed.cost;
        out.json(&json!({
            "schema": "karat.result/1", "kind": "list", "case": job.id(), "op": job.entry.name(), "variant": job.variant,
            "dtype": job.parsed.dtype, "fill": job.parsed.fill, "seed": job.parsed.seed,
            "bytes": cost.bytes, "flops": cost.flops,
        }));
    }
    out.note(&format!("{} problems", jobs.len()));
    Ok(Exit::Ok)
}
