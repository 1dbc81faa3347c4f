//! `kernel.toml`: what a foreign kernel says of itself.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use golden::{Claims, Dtype, Plan, plan::Grid};
use serde::Deserialize;

use super::{
    constraint::Constraints,
    launch::{Known, Launch},
};

/// The version of the doors: of `kernel.toml`, of the C structs and of the frames.
pub const ABI: u32 = 1;

/// What a `kernel.toml` says.
#[derive(Clone, Debug)]
pub struct Manifest {
    /// The file.
    pub file: PathBuf,
    /// The folder that its paths start from.
    pub folder: PathBuf,
    /// Name: letters, digits, `.`, `_` and `-`.
    pub name: String,
    /// Names of the ops that it computes.
    pub implements: Vec<String>,
    /// Which problems it takes.
    pub constraints: Constraints,
    /// What it promises.
    pub claims: Claims,
    /// How it is made from its sources, if karat shall do that.
    pub build: Option<Build>,
    /// How it is called.
    pub entrance: Entrance,
    device: Device,
    plan: BTreeMap<&'static str, Stored>,
}

/// A plan, and whether its author said what outputs are stored in.
#[derive(Clone, Debug)]
struct Stored {
    plan: Plan,
    output: bool,
}

/// How a kernel is called.
#[derive(Clone, Debug)]
pub enum Entrance {
    /// Through a shared library.
    Cabi {
        /// The library.
        library: PathBuf,
        /// Op and symbol, where it is not `karat_<op>`.
        symbols: BTreeMap<String, String>,
    },
    /// Through a program's standard input and output.
    Process {
        /// Program and arguments; `{python}` is the Python that karat was told to use.
        command: Vec<String>,
    },
    /// Through the CUDA driver.
    Cuda {
        /// What is loaded.
        code: Code,
        /// The file with it.
        file: PathBuf,
        /// Options for the compiler.
        options: Vec<String>,
        /// What it is for, `sm_90a`; anything, if it does not say.
        targets: Vec<String>,
        /// What is launched, in order.
        launches: Vec<Launch>,
    },
}

/// What kind of device code a file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// CUDA C++, compiled by NVRTC for the device at hand.
    Source,
    /// PTX, compiled by the driver.
    Ptx,
    /// A cubin, loaded as it is.
    Cubin,
}

/// How a kernel is made from its sources.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Build {
    /// Program and arguments, run in the folder of `kernel.toml`.
    pub command: Vec<String>,
    /// Files it is made from: it is built again when one of them is newer.
    pub sources: Vec<PathBuf>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    name: String,
    abi: u32,
    implements: Vec<String>,
    #[serde(default)]
    constraints: toml::Table,
    #[serde(default)]
    plan: toml::Table,
    #[serde(default)]
    claims: Promises,
    build: Option<Build>,
    door: Door,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Promises {
    deterministic: bool,
    batch_invariant: bool,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Cabi,
    Process,
    Cuda,
}

/// Where it computes.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum Device {
    Cpu,
    Cuda,
}

/// All keys of all kinds of doors, so that a mistake is told with its line.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Door {
    kind: Kind,
    device: Option<Device>,
    library: Option<PathBuf>,
    symbols: Option<BTreeMap<String, String>>,
    command: Option<Vec<String>>,
    source: Option<PathBuf>,
    ptx: Option<PathBuf>,
    cubin: Option<PathBuf>,
    options: Option<Vec<String>>,
    targets: Option<Vec<String>>,
    launch: Option<Vec<toml::Table>>,
}

impl Manifest {
    /// Reads and checks a `kernel.toml`; `ops` knows every op.
    ///
    /// # Errors
    /// One line: file, key, expected, got.
    pub fn read(file: &Path, ops: &dyn Fn(&str) -> Option<Known>) -> Result<Manifest, String> {
        let told = |why: String| format!("{}: {why}", file.display());
        let text = fs::read_to_string(file).map_err(|e| told(e.to_string()))?;
        let read: File = toml::from_str(&text).map_err(|error| {
            let line = error
                .span()
                .map(|span| 1 + text[..span.start.min(text.len())].matches('\n').count());
            let line = line.map_or(String::new(), |line| format!("line {line}: "));
            told(format!("{line}{}", error.message().replace('\n', " ")))
        })?;
        Manifest::checked(file, read, ops).map_err(told)
    }

    fn checked(
        file: &Path,
        read: File,
        ops: &dyn Fn(&str) -> Option<Known>,
    ) -> Result<Manifest, String> {
        let letters = |op: &str| ops(op).map(|op| op.letters);
        let parent = file.parent().filter(|parent| !parent.as_os_str().is_empty());
        let folder = parent.unwrap_or(Path::new(".")).to_owned();
        let File { name, abi, implements, constraints, plan, claims, build, door } = read;
        if abi != ABI {
            return Err(format!("abi: expected {ABI}, got {abi}"));
        }
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if name.is_empty() || !name.chars().all(plain) {
            let expected = "letters, digits, `.`, `_` and `-`";
            return Err(format!("name: expected {expected}, got {name:?}"));
        }
        if implements.is_empty() {
            return Err("implements: expected at least one op, got []".to_owned());
        }
        for op in &implements {
            if letters(op).is_none() {
                return Err(format!("implements: expected ops of `karat list`, got {op:?}"));
            }
        }
        let constraints =
            Constraints::read(&constraints).map_err(|why| format!("[constraints] {why}"))?;
        for letter in constraints.letters() {
            let known = |op: &String| letters(op).is_some_and(|all| all.contains(&letter));
            if !implements.iter().any(known) {
                let all: Vec<&str> =
                    implements.iter().filter_map(|op| letters(op)).flatten().copied().collect();
                let all = all.join(" ");
                return Err(format!("[constraints] {letter}: expected letters of {all}"));
            }
        }
        let plan = plans(plan).map_err(|why| format!("[plan] {why}"))?;
        let device = door.device()?;
        let entrance = door.entrance(&folder, &implements, ops)?;
        if let Some(build) = &build {
            if build.command.is_empty() {
                return Err("[build] command: expected a program and its arguments".to_owned());
            }
            for source in &build.sources {
                exists(&folder.join(source)).map_err(|why| format!("[build] sources: {why}"))?;
            }
        }
        let manifest = Manifest {
            file: file.to_owned(),
            folder,
            name,
            implements,
            constraints,
            claims: Claims {
                deterministic: claims.deterministic,
                batch_invariant: claims.batch_invariant,
                cuts: None,
            },
            build,
            entrance,
            device,
            plan,
        };
        // What is built is not there yet.
        if manifest.build.is_none() {
            for file in manifest.files() {
                exists(file).map_err(|why| format!("[door] {why}"))?;
            }
        }
        Ok(manifest)
    }

    /// Files that must be there before it can be called.
    pub fn files(&self) -> Vec<&Path> {
        match &self.entrance {
            Entrance::Cabi { library, .. } => vec![library],
            Entrance::Cuda { file, .. } => vec![file],
            Entrance::Process { .. } => Vec::new(),
        }
    }

    /// How it rounds where activations are stored in `dtype`. Unless it says otherwise, outputs are
    /// stored as inputs are.
    pub fn plan(&self, dtype: Dtype) -> Plan {
        let stored = self.plan.get(dtype.name()).or_else(|| self.plan.get(""));
        let Stored { plan, output } =
            stored.cloned().unwrap_or(Stored { plan: Plan::F32, output: false });
        if output { plan } else { Plan { output: Plan::stored(dtype).output, ..plan } }
    }

    /// `cuda` or `cpu`: what `--device` selects by.
    pub fn device(&self) -> &'static str {
        match self.device {
            Device::Cpu => "cpu",
            Device::Cuda => "cuda",
        }
    }

    /// `cabi`, `process` or `cuda`.
    pub fn door(&self) -> &'static str {
        match self.entrance {
            Entrance::Cabi { .. } => "cabi",
            Entrance::Process { .. } => "process",
            Entrance::Cuda { .. } => "cuda",
        }
    }
}

impl Door {
    /// Where it computes: a program or a library may say that it does on a GPU.
    fn device(&self) -> Result<Device, String> {
        match (self.kind, self.device) {
            (Kind::Cuda, Some(Device::Cpu)) => {
                Err("[door] device: expected cuda of kind \"cuda\", got cpu".to_owned())
            }
            (Kind::Cuda, _) => Ok(Device::Cuda),
            (Kind::Cabi | Kind::Process, device) => Ok(device.unwrap_or(Device::Cpu)),
        }
    }

    fn entrance(
        self,
        folder: &Path,
        implements: &[String],
        ops: &dyn Fn(&str) -> Option<Known>,
    ) -> Result<Entrance, String> {
        let Door { kind, library, symbols, command, source, ptx, cubin, .. } = self;
        let Door { options, targets, launch, .. } = self;
        let given = [
            ("library", Kind::Cabi, library.is_some()),
            ("symbols", Kind::Cabi, symbols.is_some()),
            ("command", Kind::Process, command.is_some()),
            ("source", Kind::Cuda, source.is_some()),
            ("ptx", Kind::Cuda, ptx.is_some()),
            ("cubin", Kind::Cuda, cubin.is_some()),
            ("options", Kind::Cuda, options.is_some()),
            ("targets", Kind::Cuda, targets.is_some()),
            ("launch", Kind::Cuda, launch.is_some()),
        ];
        if let Some((key, of, _)) = given.iter().find(|(_, of, given)| *given && *of != kind) {
            let [of, kind] = [*of, kind].map(|kind| format!("{kind:?}").to_lowercase());
            return Err(format!("[door] {key}: is of kind {of:?}, the door is of kind {kind:?}"));
        }
        let missing = |what: &str| format!("[door] {what}: missing");
        match kind {
            Kind::Cabi => {
                let library = folder.join(library.ok_or_else(|| missing("library"))?);
                let symbols = symbols.unwrap_or_default();
                if let Some(op) = symbols.keys().find(|op| !implements.contains(op)) {
                    return Err(format!("[door] symbols: {op} is not in implements"));
                }
                Ok(Entrance::Cabi { library, symbols })
            }
            Kind::Process => {
                let command = command.ok_or_else(|| missing("command"))?;
                if command.first().is_none_or(String::is_empty) {
                    return Err("[door] command: expected a program and its arguments".to_owned());
                }
                Ok(Entrance::Process { command })
            }
            Kind::Cuda => {
                let files = [(Code::Source, source), (Code::Ptx, ptx), (Code::Cubin, cubin)];
                let mut files = files.into_iter().filter_map(|(code, file)| Some((code, file?)));
                let (code, file) = files.next().ok_or_else(|| missing("source, ptx or cubin"))?;
                if files.next().is_some() {
                    return Err("[door] expected one of source, ptx and cubin, got two".to_owned());
                }
                let launches = launch
                    .ok_or_else(|| missing("launch"))?
                    .into_iter()
                    .map(Launch::read)
                    .collect::<Result<Vec<_>, _>>()
                    .map_err(|why| format!("[[door.launch]] {why}"))?;
                for op in implements {
                    if !launches.iter().any(|launch| launch.op == *op) {
                        return Err(format!("[[door.launch]] none for op {op:?}"));
                    }
                }
                for launch in &launches {
                    let known = implements.contains(&launch.op);
                    let op = ops(&launch.op).filter(|_| known).ok_or_else(|| {
                        format!("[[door.launch]] op: {:?} is not in implements", launch.op)
                    })?;
                    launch.check(&op).map_err(|why| format!("[[door.launch]] {why}"))?;
                }
                let (options, targets) = (options.unwrap_or_default(), targets.unwrap_or_default());
                let own = ["--gpu-architecture", "-arch"];
                let own = |option: &&String| own.iter().any(|own| option.starts_with(own));
                if let Some(option) = options.iter().find(own) {
                    return Err(format!(
                        "[door] options: {option} is karat's to choose; see targets"
                    ));
                }
                let real = |target: &&String| {
                    let number = target.strip_prefix("sm_").unwrap_or_default();
                    number.starts_with(|c: char| c.is_ascii_digit())
                        && number.chars().all(|c| c.is_ascii_alphanumeric())
                };
                if let Some(target) = targets.iter().find(|target| !real(target)) {
                    let expected = "real targets such as \"sm_90a\"";
                    return Err(format!("[door] targets: expected {expected}, got {target:?}"));
                }
                let file = folder.join(file);
                Ok(Entrance::Cuda { code, file, options, targets, launches })
            }
        }
    }
}

/// The plan for every dtype, from one table with a table inside for each dtype that differs.
fn plans(mut table: toml::Table) -> Result<BTreeMap<&'static str, Stored>, String> {
    let mut inside = Vec::new();
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        match table.remove(dtype.name()) {
            None => {}
            Some(toml::Value::Table(own)) => inside.push((dtype.name(), own)),
            Some(other) => return Err(format!("{dtype}: expected a table, got {other}")),
        }
    }
    let stored = |table: &toml::Table| -> Result<Stored, String> {
        let output = table.contains_key("output");
        let plan = Plan::deserialize(table.clone())
            .map_err(|error: toml::de::Error| error.message().replace('\n', " "))?;
        plan.check()?;
        for grid in [plan.output, plan.state] {
            if grid == Grid::Fp8 {
                return Err("output and state: expected f32, f16 or bf16, got fp8".to_owned());
            }
        }
        Ok(Stored { plan, output })
    };
    let mut all = BTreeMap::from([("", stored(&table)?)]);
    for (dtype, own) in inside {
        let mut merged = table.clone();
        merged.extend(own);
        all.insert(dtype, stored(&merged).map_err(|why| format!("{dtype}: {why}"))?);
    }
    Ok(all)
}

fn exists(file: &Path) -> Result<(), String> {
    let found = file.metadata().map_err(|e| format!("{}: {e}", file.display()))?;
    if found.is_file() { Ok(()) } else { Err(format!("{}: expected a file", file.display())) }
}

#[cfg(test)]
mod tests {
    use super::plans;

    #[test]
    fn no_plan_declares_any_error_it_likes() {
        let why = |text: &str| plans(text.parse().expect("a table")).err();
        assert_eq!(why("root_ulps = 64\nexp_ulps = 0.5\n[f32]\nlog_ulps = 4"), None);
        for (text, told) in [
            ("root_ulps = 1e7", "root_ulps: expected a number from 0 to 64, got 1e7"),
            ("exp_ulps = inf", "exp_ulps: expected a number from 0 to 64, got inf"),
            ("log_ulps = nan", "log_ulps: expected a number from 0 to 64, got NaN"),
            ("trig_ulps = -1", "trig_ulps: expected a number from 0 to 64, got -1"),
            ("[f32]\nexp_ulps = 1e30", "f32: exp_ulps: expected a number from 0 to 64, got 1e30"),
            ("[bf16]\nexp_ulps = 65", "bf16: exp_ulps: expected a number from 0 to 64, got 65"),
        ] {
            assert_eq!(why(text).as_deref(), Some(told), "{text}");
        }
    }
}
