//! The GPU of this machine, and what is loaded on it.
//!
//! Work is done by one job at a time, so that a fault is told of the kernel that made it. After a fault
//! the driver gives this process no other context: whatever else was to run on the GPU is skipped, and
//! says of whom.

use std::{
    cell::Cell,
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use kernels::{Build, Source};

use super::{
    cubin,
    device::{self, Device, Error, LEAST, Module},
    nccl,
    peers::{Alone, Peers},
};

/// What is known of the GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpu {
    /// What it calls itself.
    pub name: String,
    /// What the compiler calls its architecture: `sm_90a`.
    pub target: String,
    /// Its memory, in bytes.
    pub memory: u64,
    /// How many multiprocessors it has.
    pub multiprocessors: u32,
}

/// The GPU, or why this machine runs no kernel of ours. Looked for once.
pub fn gpu() -> &'static Result<Gpu, String> {
    static FOUND: OnceLock<Result<Gpu, String>> = OnceLock::new();
    FOUND.get_or_init(|| look().map_err(|error| error.to_string()))
}

fn look() -> Result<Gpu, Error> {
    let version = |version: i32| format!("{}.{}", version / 1000, version % 1000 / 10);
    let driver = device::driver_version()?;
    if driver < LEAST {
        let (got, least) = (version(driver), version(LEAST));
        return Err(Error::Absent(format!(
            "the driver runs CUDA up to {got}, older than {least}: update it"
        )));
    }
    let none = |error| match error {
        Error::Driver(text) => Error::Absent(format!("the CUDA driver has no device: {text}")),
        other => other,
    };
    let device = Device::fresh().map_err(none)?;
    let (name, target, memory) = (device.name()?, device.target()?, device.memory()?);
    let architecture = target.trim_start_matches("sm_").trim_end_matches('a');
    if architecture.parse::<u32>().is_ok_and(|number| number < 80) {
        return Err(Error::Absent(format!("{name} is {target}; kernels are for sm_80 and later")));
    }
    let compiler = device::compiler_version()?;
    if driver / 1000 < compiler / 1000 {
        let (driver, compiler) = (version(driver), version(compiler));
        return Err(Error::Absent(format!(
            "the driver runs CUDA up to {driver}, and libnvrtc is of {compiler}: update the driver, or \
             take an older libnvrtc"
        )));
    }
    Ok(Gpu { name, target, memory, multiprocessors: device.multiprocessors()? })
}

/// How many GPUs there are, and the version of what they talk through, or why they do not; `None` without a GPU.
pub fn several() -> Option<(usize, Result<String, String>)> {
    gpu().as_ref().ok()?;
    Some((Device::count().ok()?, nccl::version().map_err(|error| error.to_string())))
}

/// What is loaded.
pub(super) struct Context {
    pub(super) device: Arc<Device>,
    pub(super) peers: Arc<dyn Peers>,
    target: String,
    modules: HashMap<(&'static str, Build), Arc<Module>>,
}

impl Context {
    fn open() -> Result<Context, Error> {
        Context::of(Device::fresh()?, Arc::new(Alone))
    }

    /// Of a device that is one of several.
    pub(super) fn of(device: Device, peers: Arc<dyn Peers>) -> Result<Context, Error> {
        let target = device.target()?;
        Ok(Context { device: Arc::new(device), peers, target, modules: HashMap::new() })
    }

    /// The kernels of a source.
    pub(super) fn module(&mut self, source: &Source, build: Build) -> Result<Arc<Module>, Error> {
        if let Some(module) = self.modules.get(&(source.file, build)) {
            return Ok(module.clone());
        }
        let module = self.device.load(&cubin::cubin(source, &build, &self.target)?)?;
        self.modules.insert((source.file, build), module.clone());
        Ok(module)
    }
}

/// A fault on the GPU, and what it was told of.
#[derive(Debug)]
pub struct Trapped(String);

impl fmt::Display for Trapped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Trapped {}

/// What the fault was that took the GPU from this process.
static LOST: OnceLock<String> = OnceLock::new();

/// Why nothing runs on the GPU any more, if so.
pub(super) fn lost() -> Option<String> {
    let by = LOST.get()?;
    Some(format!("this process has lost the GPU to a fault of {by}"))
}

thread_local! {
    /// The device that this thread has for itself, if it has one.
    static OWN: Cell<Option<Context>> = const { Cell::new(None) };
}

/// Gives this thread a device of its own: its work is done there, and waits for no other thread's.
pub(super) fn take(context: Context) {
    OWN.set(Some(context));
}

/// Takes it back.
pub(super) fn give() -> Option<Context> {
    OWN.take()
}

/// Does some work on the GPU for somebody, alone.
pub(super) fn with<T>(
    whom: &str,
    work: impl FnOnce(&mut Context) -> Result<T, Error>,
) -> Result<T, golden::Error> {
    static NOW: Mutex<Option<Context>> = Mutex::new(None);
    gpu().as_ref().map_err(String::as_str)?;
    if let Some(mut here) = OWN.take() {
        let done = if let Some(why) = lost() {
            Err(Trapped(why).into())
        } else {
            on(&mut here, whom, work)
        };
        OWN.set(Some(here));
        return done;
    }
    // Whoever panicked left nothing half made: it is there or not.
    let mut now = NOW.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(why) = lost() {
        return Err(Trapped(why).into());
    }
    let here = if let Some(here) = &mut *now { here } else { now.insert(Context::open()?) };
    on(here, whom, work)
}

fn on<T>(
    here: &mut Context,
    whom: &str,
    work: impl FnOnce(&mut Context) -> Result<T, Error>,
) -> Result<T, golden::Error> {
    let error = match work(here) {
        Ok(done) => return Ok(done),
        Err(error) => error,
    };
    if here.device.wait().is_ok() {
        return Err(error.into());
    }
    let _ = LOST.set(format!("{whom}: {error}"));
    Err(Trapped(error.to_string()).into())
}
