//! Foreign kernels on the command line: `--kernel`, and how they are kept apart.

use std::{
    path::{Path, PathBuf, absolute},
    str::FromStr,
    sync::{Arc, OnceLock},
    time::Duration,
};

use benches::foreign::{Isolation, Kernel, Unusable};
use serde_json::json;

use crate::{
    block::quoted,
    exit::{Exit, Failure, refuse},
    out::{self, Out},
};

#[derive(Debug, clap::Args)]
pub(crate) struct Kernels {
    /// The kernel that this kernel.toml describes; may be given again. Only such kernels run, and in bench
    /// what karat has for their problems.
    #[arg(long, value_name = "K.toml")]
    kernel: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) limits: Limits,
}

/// How foreign code is kept apart.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Limits {
    /// Seconds that one job of a foreign kernel may take.
    #[arg(long, value_name = "SECONDS", default_value = "60", env = "KARAT_TIMEOUT")]
    timeout: Seconds,
    /// Memory that it may take beyond its inputs and outputs.
    #[arg(long, value_name = "SIZE", default_value = "4GiB", env = "KARAT_MEMORY")]
    memory: Bytes,
    /// What {python} stands for in a kernel.toml.
    #[arg(long, value_name = "PROGRAM", default_value = "python3", env = "KARAT_PYTHON")]
    pub(crate) python: String,
}

/// Where libnvrtc is, if somebody says.
static COMPILER: OnceLock<PathBuf> = OnceLock::new();

/// Takes libnvrtc from a folder from now on, here and in processes of foreign kernels.
///
/// # Errors
/// If it is not there.
pub(crate) fn compiler_in(folder: &Path) -> Result<(), String> {
    let _ = COMPILER.set(folder.to_owned());
    benches::kernels::compiler_in(folder)
}

/// A number of seconds above zero.
#[derive(Clone, Copy, Debug)]
struct Seconds(Duration);

impl FromStr for Seconds {
    type Err = String;

    fn from_str(s: &str) -> Result<Seconds, String> {
        let number = s.parse().ok().filter(|&number: &f64| 0.0 < number && number <= 1e6);
        let number = number.ok_or("expected a number of seconds, above 0 and at most a million")?;
        Ok(Seconds(Duration::from_secs_f64(number)))
    }
}

/// `4GiB`, `512MiB`, or a number of bytes.
#[derive(Clone, Copy, Debug)]
struct Bytes(u64);

impl FromStr for Bytes {
    type Err = String;

    fn from_str(s: &str) -> Result<Bytes, String> {
        let units = [("KiB", 10), ("MiB", 20), ("GiB", 30), ("", 0)];
        let found = units.into_iter().find_map(|(unit, shift)| {
            let number: u64 = s.strip_suffix(unit)?.trim().parse().ok()?;
            (number <= 1 << (50 - shift)).then(|| Bytes(number << shift))
        });
        found.ok_or_else(|| "expected a size such as 4GiB or 512MiB".to_owned())
    }
}

/// The most time, and memory, where nothing is typed.
const TIMEOUT: u64 = 60;
const MEMORY: u64 = 4 << 30;

impl Limits {
    /// As they are typed, where they are not what is meant anyway.
    pub(crate) fn typed(&self) -> String {
        let mut typed = String::new();
        if self.timeout.0 != Duration::from_secs(TIMEOUT) {
            typed = format!("{typed} --timeout {}", self.timeout.0.as_secs_f64());
        }
        if self.memory.0 != MEMORY {
            typed = format!("{typed} --memory {}", self.memory.0);
        }
        typed
    }

    /// This program again, with the limits.
    pub(crate) fn isolation(&self) -> anyhow::Result<Isolation> {
        let exe = std::env::current_exe().map_err(|e| refuse(format!("this program: {e}")))?;
        // A path means the same in the folder of a kernel as it does here. Links stay: a virtual
        // environment is one.
        let python = if self.python.contains('/') {
            let path = absolute(&self.python).map_err(refuse)?;
            path.to_string_lossy().into_owned()
        } else {
            self.python.clone()
        };
        let variables = COMPILER.get().map(|folder| {
            let before = std::env::var_os("LD_LIBRARY_PATH");
            let all = std::iter::once(folder.clone())
                .chain(before.iter().flat_map(std::env::split_paths));
            let joined = std::env::join_paths(all).map_err(refuse)?;
            Ok(("LD_LIBRARY_PATH", joined))
        });
        Ok(Isolation {
            exe,
            python,
            variables: variables.into_iter().collect::<anyhow::Result<_>>()?,
            timeout: self.timeout.0,
            memory: self.memory.0,
        })
    }
}

impl Kernels {
    /// Whether foreign kernels are meant.
    pub(crate) fn given(&self) -> bool {
        !self.kernel.is_empty()
    }

    /// As they are typed.
    pub(crate) fn typed(&self) -> String {
        let mut typed = String::new();
        for file in &self.kernel {
            typed = format!("{typed} --kernel {}", quoted(&file.to_string_lossy()));
        }
        if typed.is_empty() { typed } else { typed + &self.limits.typed() }
    }

    /// Opens all kernels. What cannot be used is told at once, and does not keep the others from
    /// running; the exit code is that of the gravest.
    ///
    /// # Errors
    /// If none is left.
    pub(crate) fn open(&self, out: &Out) -> anyhow::Result<(Vec<Arc<Kernel>>, Exit)> {
        let mut kernels: Vec<Arc<Kernel>> = Vec::new();
        let mut exit = Exit::Ok;
        let mut last = None;
        for file in &self.kernel {
            let opened = open(file, &self.limits)?.and_then(|kernel| {
                let name = &kernel.manifest.name;
                let twin = kernels.iter().find(|known| known.manifest.name == *name);
                match twin {
                    None => Ok(kernel),
                    Some(twin) => {
                        let (a, b) = (file.display(), twin.manifest.file.display());
                        let line = format!("{a}: name: {name:?} is the name of {b} too");
                        Err(Failure { exit: Exit::Refused, line })
                    }
                }
            });
            match opened {
                Ok(kernel) => kernels.push(Arc::new(kernel)),
                Err(failure) => {
                    exit = exit.gravest(failure.exit);
                    out.json(&json!({
                        "schema": "karat.result/1", "kind": "kernel", "file": file, "exit": failure.exit as u8,
                        "why": failure.line,
                    }));
                    if let Some(earlier) = last.replace(failure) {
                        out::warn(&format!("karat: {earlier}"));
                    }
                }
            }
        }
        match last {
            // The last line is told by whoever ends the program.
            Some(Failure { line, .. }) if kernels.is_empty() => Err(Failure { exit, line }.into()),
            Some(failure) => {
                out::warn(&format!("karat: {failure}"));
                Ok((kernels, exit))
            }
            None => Ok((kernels, exit)),
        }
    }
}

/// Opens one kernel.
pub(crate) fn open(file: &Path, limits: &Limits) -> anyhow::Result<Result<Kernel, Failure>> {
    Ok(Kernel::open(file, limits.isolation()?).map_err(|unusable| match unusable {
        Unusable::Refused(line) => Failure { exit: Exit::Refused, line },
        Unusable::Died(line) => Failure { exit: Exit::Crashed, line },
    }))
}
